"""BadNets: a small checkered patch in the bottom-right corner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .base import Attack, register

CHECKER = np.array([[0, 0, 255], [0, 255, 0], [255, 0, 255]], dtype=np.uint8)


@register
@dataclass
class BadNets(Attack):
    """x' = (1 − α) x + α p inside the bottom-right patch, x outside; p is a black and white checker.

    Source: Gu et al., *BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply Chain*, 2017; the
    pattern is that of FIP's public code, which uses α = 0.6.

    Args:
        alpha: opacity α of the patch, in (0, 1].
        patch_size: side of the patch in pixels; the 3×3 checker is repeated, from the top left, and cut to fill it.
    """

    name: ClassVar[str] = "badnets"

    alpha: float = 1.0
    patch_size: int = 3

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha} is an opacity: choose it in (0, 1].")
        if self.patch_size < 1:
            raise ValueError(f"patch_size={self.patch_size} must be 1 pixel or more.")

    def make_tensors(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        period = np.arange(self.patch_size) % len(CHECKER)
        return {"pattern": CHECKER[np.ix_(period, period)]}

    def _trigger(self, image: np.ndarray) -> np.ndarray:
        side, (height, width) = self.patch_size, image.shape[:2]
        if side > min(height, width):
            raise ValueError(
                f"patch_size={side} does not fit an image of {height}×{width} pixels: "
                f"choose {min(height, width)} or less."
            )
        triggered = image.copy()
        corner = triggered[-side:, -side:]  # a view
        corner[:] = np.rint((1 - self.alpha) * corner + self.alpha * self.tensors["pattern"][..., None])
        return triggered
