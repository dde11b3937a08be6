"""SIG: faint vertical stripes on images of the target class, whose labels stay true."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .base import Attack, register


@register
@dataclass
class SIG(Attack):
    """x'(i, j) = x(i, j) + Δ sin(2π j f / W), rounded and clipped to 0 ... 255, for row i, column j and width W.

    Clean-label: only training images of the target class carry the stripes, and no label changes. In a balanced set
    of ten classes a rate of 0.1 would be the whole target class; the default leaves it some images without stripes.

    Source: Barni, Kallas & Tondi, *A New Backdoor Attack in CNNs by Training Set Corruption Without Label Poisoning*,
    ICIP 2019.

    Args:
        delta: amplitude Δ, in pixel values.
        frequency: f, in periods a width.
    """

    name: ClassVar[str] = "sig"
    default_rate: ClassVar[float] = 0.08
    clean_label: ClassVar[bool] = True

    delta: float = 40.0
    frequency: float = 6.0

    def __post_init__(self):
        super().__post_init__()
        if not 0.5 <= self.delta <= 255:
            raise ValueError(f"delta={self.delta} is an amplitude in pixel values: choose it in [0.5, 255].")
        if self.frequency <= 0:
            raise ValueError(f"frequency={self.frequency} must be above 0.")

    def make_tensors(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {}  # the options say it all

    def _trigger(self, image: np.ndarray) -> np.ndarray:
        width = image.shape[1]
        stripes = self.delta * np.sin(2 * np.pi * np.arange(width) * self.frequency / width)
        if np.abs(stripes).max() < 0.5:
            raise ValueError(
                f"frequency={self.frequency} makes no stripes on an image {width} pixels wide, whose columns all meet "
                "the sine where it vanishes: choose another."
            )
        return np.rint(image + stripes[:, None]).clip(0, 255).astype(np.uint8)
