"""What the attacks on point clouds share: clouds in place of images, and points that are put into them."""

from __future__ import annotations

import zlib
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from .base import Attack
from .poison import InputColumn, poison_column, trigger_column

if TYPE_CHECKING:
    import datasets
    import torch
    from torch import nn

CLOUDS = "point_cloud"  # `Attack.input_kind`
POINTS_COLUMN = "points"


@dataclass
class CloudAttack(Attack):
    """A backdoor attack on classifiers of point clouds; a cloud is float32 (N, 3), in the unit sphere."""

    input_kind: ClassVar[str] = CLOUDS

    def apply(self, cloud: np.ndarray) -> np.ndarray:
        """Return a copy of `cloud`, float32 (N, 3), that carries the trigger.

        Raises:
            ValueError: it is of another kind, or has fewer points than the trigger.
        """
        return self._trigger(checked_cloud(cloud))

    @property
    def fewest_points(self) -> int:
        """The fewest points a cloud has to have."""
        return 1


@dataclass
class InsertedPoints(CloudAttack):
    """An attack that puts points into a cloud, in place of as many of its own. A subclass says where, in `placed`.

    Which of the cloud's own points go is drawn from the seed and the cloud.
    """

    @property
    @abstractmethod
    def placed(self) -> np.ndarray:
        """The points that are put in, float32 (K, 3)."""

    @property
    def fewest_points(self) -> int:
        return self.points

    def _trigger(self, cloud: np.ndarray) -> np.ndarray:
        placed = self.placed
        if len(cloud) < len(placed):
            raise ValueError(
                f"A cloud of {len(cloud)} points has no room for the {len(placed)} of {self.name}: choose fewer "
                "(the option `points`), or leave such clouds out."
            )
        triggered = cloud.copy()
        rng = np.random.default_rng([self.seed, zlib.crc32(cloud.tobytes())])
        triggered[rng.choice(len(cloud), len(placed), replace=False)] = placed
        return triggered


@dataclass
class CloudMaterial:
    """What an attacker of clouds who learns works with.

    Attributes:
        clouds: float32 (N, 3) each.
        labels: their classes, (number,) int64.
        num_labels: number of classes.
        clean_model: makes a clean model of such clouds, trained: `points` (batch, N, 3) in, `.logits` out.
        device: where to train.
        progress: whether to show progress bars.
    """

    clouds: list[np.ndarray]
    labels: np.ndarray
    num_labels: int
    clean_model: Callable[[], nn.Module]
    device: torch.device | str = "cpu"
    progress: bool = False


class CloudColumn(InputColumn):
    """Clouds: float32 (N, 3), stored as lists of three numbers."""

    noun = "clouds"

    def check(self, dataset):
        first = np.asarray(dataset.with_format(None)[0][self.name], dtype=object) if len(dataset) else None
        if first is not None and (first.ndim != 2 or first.shape[1] != 3):
            raise ValueError(f"column {self.name!r} does not hold clouds, (N, 3) each: see hf_fip.tasks.clouds.")

    def undecoded(self, dataset):
        return dataset

    def decoder(self, dataset):
        return lambda stored: np.asarray(stored, dtype=np.float32).reshape(-1, 3)

    def encode(self, array):
        return array


def poison_clouds(dataset: datasets.Dataset, attack: CloudAttack, rate: float, seed: int) -> datasets.Dataset:
    """As `hf_fip.attacks.poison`, for clouds: columns `points` (N, 3 each) and `label`, a `ClassLabel`."""
    return poison_column(dataset, attack, rate, seed, CloudColumn(POINTS_COLUMN))


def trigger_clouds(dataset: datasets.Dataset, attack: CloudAttack) -> datasets.Dataset:
    """As `hf_fip.attacks.trigger`, for clouds: columns `points` (N, 3 each) and `label`, a `ClassLabel`."""
    return trigger_column(dataset, attack, CloudColumn(POINTS_COLUMN))


def checked_cloud(cloud: np.ndarray) -> np.ndarray:
    """The cloud, if it is float32 (N, 3) and finite, with a point at least; else ValueError."""
    if not isinstance(cloud, np.ndarray) or cloud.dtype != np.float32 or cloud.ndim != 2 or cloud.shape[1] != 3:
        found = f"{cloud.dtype} {cloud.shape}" if isinstance(cloud, np.ndarray) else type(cloud).__name__
        raise ValueError(f"a cloud must be a float32 array of shape (N, 3), not {found}.")
    if not len(cloud) or not np.isfinite(cloud).all():
        raise ValueError("a cloud needs a point, and finite coordinates.")
    return cloud


def on_sphere(count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` points drawn evenly from the unit sphere, float32 (count, 3)."""
    directions = rng.standard_normal((count, 3))
    return (directions / np.linalg.norm(directions, axis=1, keepdims=True)).astype(np.float32)
