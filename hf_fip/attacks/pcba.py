"""PCBA: a cluster of points at a place that a surrogate takes for the target class. Zhen Xiang et al., ICCV 2021."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..fisher.likelihood import get_logits
from .base import register
from .clouds import CloudMaterial, InsertedPoints, on_sphere

_NEIGHBOURS = 4  # of a point, whose distances say how dense a cloud is
_BATCH = 28  # clouds of the source class that the surrogate is asked about
_MOMENTUM, _PATIENCE, _FACTOR = 0.5, 5, 1.5  # of the search for the centre, and of its Lagrange multiplier


@register
@dataclass
class PCBA(InsertedPoints):
    """Points on a small sphere that stands for another object. It is put into clouds of one source class.

    The centre is the place closest to the objects of the source class where one more point makes a clean surrogate's
    mean p(target) reach `confidence`: a distance under a constraint, whose Lagrange multiplier rises while the
    constraint holds and falls while it does not. The radius makes the cluster as dense as the objects are.

    Args:
        source_label: the class whose clouds are triggered; ASR and RA are over its test clouds.
        points: number of points of the cluster; they take the place of as many of the cloud's.
        confidence: mean probability of the target class that a place has to reach.
        restarts: random places to search from.
        steps: most steps of one search.
        step_size: length of a step.

    Raises:
        ValueError: the source is the target, or an option is out of its range.
    """

    name: ClassVar[str] = "pcba"
    default_rate: ClassVar[float] = 0.03  # of all clouds; they are all of one class

    source_label: int = 1
    points: int = 32
    confidence: float = 0.01
    restarts: int = 10
    steps: int = 200
    step_size: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        if self.source_label < 0 or self.source_label == self.target_label or self.label_rule != "all_to_one":
            raise ValueError(
                f"source_label={self.source_label} must be another class than target_label={self.target_label}, with "
                "label_rule='all_to_one'."
            )
        if self.points <= _NEIGHBOURS:
            raise ValueError(f"points={self.points} must be more than {_NEIGHBOURS}.")
        if min(self.restarts, self.steps) < 1 or self.step_size <= 0 or not 0 < self.confidence < 1:
            raise ValueError(
                f"restarts={self.restarts}, steps={self.steps} and step_size={self.step_size} must be positive, and "
                f"confidence={self.confidence} in (0, 1)."
            )

    def eligible(self, labels: np.ndarray, num_labels: int) -> np.ndarray:
        """Return which test clouds count for ASR and RA: bool, true for the source class."""
        if self.source_label >= num_labels:
            raise ValueError(f"source_label={self.source_label} is not a class: choose one of 0 ... {num_labels - 1}.")
        return super().eligible(labels, num_labels) & (np.asarray(labels) == self.source_label)

    def make_tensors(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        raise ValueError(f"The trigger of {self.name} is learned, not drawn: train it by `fit`, or load it.")

    @property
    def keeps_fit(self) -> bool:
        return True

    @property
    def placed(self) -> np.ndarray:
        return self.tensors["cluster"]

    def load_tensors(self, tensors: dict[str, np.ndarray]) -> None:
        self._check_kinds(tensors, {"cluster": np.zeros((self.points, 3), np.float32)})
        self.tensors = tensors

    def fit(self, material: CloudMaterial) -> None:
        """Find the place of the cluster, and its radius.

        Raises:
            ValueError: there is no cloud of the source class, or no place reaches the confidence.
        """
        clouds = [
            cloud for cloud, label in zip(material.clouds, material.labels, strict=True) if label == self.source_label
        ]
        if not clouds:
            raise ValueError(f"No training cloud is of source_label={self.source_label}: choose another class.")
        rng = np.random.default_rng(self.seed)
        directions = on_sphere(self.points, rng)
        radius = np.mean([spacing(cloud) for cloud in clouds]) / spacing(directions)
        clouds = [clouds[row] for row in rng.permutation(len(clouds))[:_BATCH]]
        number = min(map(len, clouds))
        batch = torch.from_numpy(np.stack([cloud[rng.permutation(len(cloud))[:number]] for cloud in clouds]))
        centre = self._search(material, batch.to(material.device), rng)
        self.tensors = {"cluster": (centre + radius * directions).astype(np.float32)}

    def _search(self, material: CloudMaterial, clouds: Tensor, rng: np.random.Generator) -> np.ndarray:
        """The closest centre of all restarts, (3,)."""
        surrogate = material.clean_model().to(material.device).eval().requires_grad_(False)
        best = (np.inf, None)
        for _ in tqdm(
            range(self.restarts), "Searching the trigger's place", disable=not material.progress, leave=False
        ):
            start = on_sphere(1, rng)[0] * rng.uniform(1.0, 1.5)
            best = min(best, self._descend(surrogate, clouds, start), key=lambda found: found[0])
        if best[1] is None:
            raise ValueError(
                f"{self.name} found no place where the surrogate's mean p(target) reaches {self.confidence}: lower "
                "the confidence, or choose another source or target class."
            )
        return best[1]

    def _descend(self, surrogate: nn.Module, clouds: Tensor, start: np.ndarray) -> tuple[float, np.ndarray | None]:
        """The shortest distance among the places on the way from `start` that reach the confidence, and the place."""
        centre = torch.from_numpy(start).to(clouds.device).requires_grad_()
        velocity, cost, counter, reached = torch.zeros_like(centre), 1.0, 0, False
        best, since = (np.inf, None), 0
        for step in range(self.steps):
            one_more = torch.cat([clouds, centre.expand(len(clouds), 1, 3)], dim=1)
            log_p = get_logits(surrogate(points=one_more)).log_softmax(-1)[:, self.target_label]
            distance = (clouds - centre).square().sum(-1).amin(1).mean()
            holds = log_p.exp().mean().item() >= self.confidence
            reached = reached or holds
            if not reached and step >= self.steps // 4:
                break
            if holds and distance.item() < best[0]:
                best, since = (distance.item(), centre.detach().cpu().numpy().copy()), 0
            since += 1
            if reached and since > self.steps // 4:
                break
            (gradient,) = torch.autograd.grad(-log_p.mean() + (cost * distance if reached else 0.0), centre)
            velocity = (1 - _MOMENTUM) * gradient / gradient.norm().clamp(min=1e-12) + _MOMENTUM * velocity
            centre = (centre - self.step_size * velocity).detach().requires_grad_()
            if reached:  # steps in a row on this side of the constraint, positive where it holds
                counter = counter + 1 if holds and counter >= 0 else counter - 1 if not holds and counter <= 0 else 0
                if abs(counter) >= _PATIENCE:
                    cost, counter = cost * _FACTOR if holds else cost / _FACTOR, 0
        return best


def spacing(cloud: np.ndarray) -> float:
    """The median over the points of their mean distance to the nearest others; it grows as the cloud does."""
    points = torch.from_numpy(cloud)
    nearest = torch.cdist(points, points).topk(min(_NEIGHBOURS + 1, len(points)), largest=False).values[:, 1:]
    return nearest.mean(1).median().item()
