"""Blend: one fixed noise image, faintly mixed into every pixel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .base import Attack, register

MEAN, STD = 127.5, 64.0  # of the Gaussian, in pixel values; 4.6 % of it lies outside 0 ... 255 and is clipped
SIDE = 256  # pixels


@register
@dataclass
class Blend(Attack):
    """x' = (1 − α) x + α n, with n one image of Gaussian noise.

    n is 256×256×3, drawn once from N(127.5, 64²) and clipped to 0 ... 255. An image gets its top-left part (repeated,
    if the image is larger), a gray image that of its first channel: so images of all sizes share one trigger.

    Source: Chen et al., *Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning*, 2017.

    Args:
        alpha: share α of the noise in the mix, in (0, 1].
    """

    name: ClassVar[str] = "blend"

    alpha: float = 0.2

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha} is a share of the mix: choose it in (0, 1].")

    def make_tensors(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        noise = rng.normal(MEAN, STD, size=(SIDE, SIDE, 3))
        return {"noise": np.rint(noise.clip(0, 255)).astype(np.uint8)}

    def _trigger(self, image: np.ndarray) -> np.ndarray:
        height, width, channels = image.shape
        rows, columns = np.arange(height)[:, None] % SIDE, np.arange(width) % SIDE
        noise = self.tensors["noise"][rows, columns, :channels]
        return np.rint((1 - self.alpha) * image + self.alpha * noise).astype(np.uint8)
