"""WaNet: a smooth warp of the whole image, too small to see."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np

from .base import Attack, register


@register
@dataclass
class WaNet(Attack):
    """x' = x read at the points clamp(identity + s·f / side), with f one smooth random field.

    f has k×k control points drawn from U[−1, 1] and divided by their mean absolute value, interpolated (bicubic) to
    H×W. Points run from −1 to 1 between the centres of the outermost pixels (`align_corners=True`); f is divided by W
    across and by H down, so the warp is about s/2 pixels at any size. x is read bilinearly and rounded. Since points
    are clamped, none lies outside the image and padding never comes in.

    Covers ("noise mode") are read at clamp(those points + U[−1, 1] / side), drawn afresh for each image. With their
    true labels they teach the model that no other warp is the trigger.

    Source: Nguyen & Tran, *WaNet: Imperceptible Warping-based Backdoor Attack*, ICLR 2021.

    Args:
        strength: s.
        grid_size: k.
        cover_rate: share of the whole training set that becomes covers, in [0, 1]; 0 leaves noise mode out.
    """

    name: ClassVar[str] = "wanet"

    strength: float = 0.5
    grid_size: int = 4
    cover_rate: float = 0.2

    def __post_init__(self):
        super().__post_init__()
        if self.strength <= 0:
            raise ValueError(f"strength={self.strength} must be above 0.")
        if self.grid_size < 1:
            raise ValueError(f"grid_size={self.grid_size} must be 1 or more.")

    def make_tensors(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        field = rng.uniform(-1, 1, size=(2, self.grid_size, self.grid_size))  # x and y
        return {"field": (field / np.abs(field).mean()).astype(np.float32)}

    def _trigger(self, image: np.ndarray) -> np.ndarray:
        return _read(image, self._points(image))

    def _cover(self, image: np.ndarray, rng: np.random.Generator, donor: np.ndarray | None) -> np.ndarray:
        points = self._points(image)
        jitter = rng.uniform(-1, 1, size=points.shape) / _sides(image.shape[0], image.shape[1])
        return _read(image, (points + jitter).clip(-1, 1))

    def _points(self, image: np.ndarray) -> np.ndarray:
        field = self.tensors["field"]
        return _warped_points(field.tobytes(), field.shape, self.strength, image.shape[0], image.shape[1])


def _sides(height: int, width: int) -> np.ndarray:
    return np.array([width, height])  # points are (x, y)


@lru_cache(maxsize=64)
def _warped_points(control: bytes, shape: tuple[int, ...], strength: float, height: int, width: int) -> np.ndarray:
    """Return where each pixel is read from: H×W×2, (x, y) in [−1, 1]. Made once for each size."""
    import torch

    field = torch.from_numpy(np.frombuffer(control, dtype=np.float32).reshape(1, *shape).copy())
    field = torch.nn.functional.interpolate(field, size=(height, width), mode="bicubic", align_corners=True)
    x, y = np.meshgrid(np.linspace(-1, 1, width), np.linspace(-1, 1, height))
    points = np.stack([x, y], axis=2) + strength * field[0].permute(1, 2, 0).numpy() / _sides(height, width)
    return points.clip(-1, 1)


def _read(image: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return `image` read at `points`, bilinearly, rounded to uint8."""
    import torch

    pixels = torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1)[None]
    grid = torch.from_numpy(points.astype(np.float32))[None]
    read = torch.nn.functional.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=True)
    return read[0].round().to(torch.uint8).permute(1, 2, 0).numpy()
