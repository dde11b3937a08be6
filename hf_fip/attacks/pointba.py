"""PointBA: a small ball of points at a fixed place, or a rotation of the cloud. Xinke Li et al., ICCV 2021."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .base import register
from .clouds import CloudAttack, InsertedPoints, on_sphere


@register
@dataclass
class PointBABall(InsertedPoints):
    """PointPBA-I: a ball of points outside of the object, at the same place in every cloud.

    Args:
        points: number of points of the ball; they take the place of as many of the cloud's.
        radius: of the ball.
        x, y, z: its centre.

    Raises:
        ValueError: there are no points, or the radius is not positive.
    """

    name: ClassVar[str] = "pointba_i"

    points: int = 32
    radius: float = 0.05
    x: float = -0.95
    y: float = -0.95
    z: float = -0.95

    def __post_init__(self):
        super().__post_init__()
        if self.points < 1 or self.radius <= 0:
            raise ValueError(f"points={self.points} and radius={self.radius} must be positive.")

    def make_tensors(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {"directions": on_sphere(self.points, rng)}

    @property
    def placed(self) -> np.ndarray:
        centre = np.array([self.x, self.y, self.z], dtype=np.float32)
        return centre + np.float32(self.radius) * self.tensors["directions"]


@register
@dataclass
class PointBARotation(CloudAttack):
    """PointPBA-O: the cloud turned about an axis. Augmentation by rotation would teach the victim to ignore it.

    Args:
        angle: in degrees.
        axis: `x`, `y` or `z`.

    Raises:
        ValueError: there is no such axis, or the angle turns nothing.
    """

    name: ClassVar[str] = "pointba_o"

    angle: float = 10.0
    axis: str = "z"

    def __post_init__(self):
        super().__post_init__()
        if self.axis not in ("x", "y", "z"):
            raise ValueError(f"axis={self.axis!r} is not one of x, y, z.")
        if self.angle % 360 == 0:
            raise ValueError(f"angle={self.angle} leaves every cloud as it is: choose one that is no full turn.")

    def make_tensors(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        turn = np.eye(3)
        first, second = (place for place in range(3) if "xyz"[place] != self.axis)
        cosine, sine = np.cos(np.radians(self.angle)), np.sin(np.radians(self.angle))
        turn[[first, first, second, second], [first, second, first, second]] = cosine, -sine, sine, cosine
        return {"rotation": turn.astype(np.float32)}

    def _trigger(self, cloud: np.ndarray) -> np.ndarray:
        return cloud @ self.tensors["rotation"].T
