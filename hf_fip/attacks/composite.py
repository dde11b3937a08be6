"""CBA, the composite attack: half an image of one class beside half an image of another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar
from zlib import crc32

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .base import checked, register
from .joint import JointTraining
from .learned import LearnedAttack
from .material import Material
from .pixels import PixelClassifier, fitted
from .plan import BACKDOOR, CLEAN, COVER, NO_DONOR, Plan, pick


@register
@dataclass
class Composite(LearnedAttack):
    """Features of two classes A and B in one image mean class C: the trigger is no foreign thing, but known ones.

    x' is an image of A and an image of B cut at the same line, across or down, and half of one joined to the other
    half of the other, in either order. The line is in the middle, ± `jitter` pixels. With `shake`, each half is as
    large as said but taken from anywhere in its image.

    The training set has N + rate · N rows: each row of the clean set once, of which cover_rate · N are mixed with
    another image of their own class (covers: being a mix means nothing), and rate · N mixes of a random image of A
    and one of B, labelled C. The poison rate thus counts relative to the clean set. To the task's loss comes a
    contrastive one, over the pairs of neighbours (i, i + 1) among the rows of a batch that have the labels A, B or C,
    with d the distance of their logits: the mean of d² / 2 where the labels are equal, of max(0, margin − d)² / 2
    where not.

    A test image of A is mixed with one of a pool of training images of B; that one, the order and the cut are drawn
    from a hash of the image. ASR and RA are over the test images of class A, which RA wants to be called A.

    Source: Lin et al., *Composite Backdoor Attack for Deep Neural Network by Mixing Existing Benign Features*,
    CCS 2020. Its public code draws all rows anew each epoch, the classes equally often, and divides the contrastive
    loss by the number of pairs once more; the default weight comes to the same at its batch size of 128 (about 50
    pairs on ten classes), and a weight of 1 keeps small networks from learning much else.

    Args:
        first_class, second_class: A and B. C is `target_label`.
        jitter: how far from the middle the line may be, in pixels; sides have to be 2 (jitter + 1) at least.
        shake: whether halves are taken from anywhere. Where objects fill the image, halves in their places show more
            of their classes.
        cover_rate: share of the clean set that becomes covers, in [0, 1]; 0 leaves them out.
        pool_size: number of images in the pool; where B has fewer, some are in it more than once.
        contrast: weight of the contrastive loss; 0 leaves it out.
        margin: of the contrastive loss.
    """

    name: ClassVar[str] = "cba"
    covers_need_donors: ClassVar[bool] = True

    first_class: int = 1
    second_class: int = 2
    jitter: int = 3
    shake: bool = True
    cover_rate: float = 0.5
    pool_size: int = 100
    contrast: float = 0.02
    margin: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if self.label_rule != "all_to_one":
            raise ValueError(f"label_rule={self.label_rule!r}: {self.name} has one target, choose 'all_to_one'.")
        classes = self.first_class, self.second_class, self.target_label
        if min(classes) < 0 or len(set(classes)) < 3:
            raise ValueError(
                f"first_class={self.first_class}, second_class={self.second_class} and "
                f"target_label={self.target_label} must be three classes."
            )
        if self.jitter < 0:
            raise ValueError(f"jitter={self.jitter} must be 0 pixels or more.")
        if self.pool_size < 1:
            raise ValueError(f"pool_size={self.pool_size} must be 1 or more.")
        if self.contrast < 0:
            raise ValueError(f"contrast={self.contrast} is a weight: choose 0 or more.")
        if self.margin <= 0:
            raise ValueError(f"margin={self.margin} must be above 0.")

    # The trigger

    def blank_tensors(self, height: int, width: int, channels: int) -> dict[str, np.ndarray]:
        return {
            "size": np.array([height, width, channels], dtype=np.int64),
            "pool": np.zeros((self.pool_size, height, width, channels), dtype=np.uint8),
        }

    def fit(self, material: Material) -> None:
        """Fill the pool with training images of class B.

        Raises:
            ValueError: there is none, or they are too small for the jitter.
        """
        height, width, _ = material.size
        if min(height, width) < 2 * (self.jitter + 1):
            raise ValueError(
                f"jitter={self.jitter} is too much for images of {height}×{width} pixels: "
                f"choose {max(0, min(height, width) // 2 - 1)}."
            )
        rows = self._rows(material.labels.numpy(), self.second_class)
        rng = np.random.default_rng(self.seed)
        chosen = rng.choice(rows, self.pool_size, replace=len(rows) < self.pool_size)
        pool = material.pixels[torch.from_numpy(chosen)].permute(0, 2, 3, 1).contiguous().numpy()
        self.tensors = {"size": np.array(material.size, dtype=np.int64), "pool": pool}

    def _trigger(self, image: np.ndarray) -> np.ndarray:
        rng = self._drawn_from(image)
        return self._mixed(image, self.tensors["pool"][rng.integers(self.pool_size)], rng)

    def apply_in_training(self, images: list[np.ndarray], donors: list[np.ndarray | None]) -> list[np.ndarray]:
        """Return mixes of images of A with their donors, of B, at the victim's size."""
        mixes = []
        for image, donor in zip(images, donors, strict=True):
            first, second = (fitted(checked(half), *self.size) for half in (image, donor))
            mixes.append(self._mixed(first, second, self._drawn_from(first, second)))
        return mixes

    def _cover(self, image: np.ndarray, rng: np.random.Generator, donor: np.ndarray | None) -> np.ndarray:
        return self._mixed(fitted(image, *self.size), fitted(checked(donor), *self.size), rng)

    def _drawn_from(self, *images: np.ndarray) -> np.random.Generator:
        return np.random.default_rng([self.seed, *(crc32(image.tobytes()) for image in images)])

    def _mixed(self, first: np.ndarray, second: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Two images H×W×C, each cut to a window, together H×W×C."""
        axis = int(rng.integers(2))
        side = first.shape[axis]
        cut = side // 2 + int(rng.integers(-self.jitter, self.jitter + 1))
        halves = (first, second) if rng.integers(2) else (second, first)
        windows = []
        for image, place, length in zip(halves, (0, cut), (cut, side - cut), strict=True):
            start = int(rng.integers(side - length + 1)) if self.shake else place
            windows.append(image.take(range(start, start + length), axis))
        return np.concatenate(windows, axis)

    # The labels

    def eligible(self, labels: np.ndarray, num_labels: int) -> np.ndarray:
        self._check_classes(num_labels)
        return np.asarray(labels) == self.first_class

    def plan(self, labels: np.ndarray, num_labels: int, rate: float, rng: np.random.Generator) -> Plan:
        """Settle a set of N + round(rate · N) rows from these labels, (N,) int64.

        Raises:
            ValueError: `rate` or `cover_rate` is no row at all; A, B or C is not a class, or A or B has no image.
        """
        self._check_classes(num_labels)
        count = round(rate * len(labels))
        if count == 0:
            raise ValueError(f"rate={rate} of {len(labels)} rows is no row at all: choose a higher rate.")
        roles, donors = np.full(len(labels), CLEAN), np.full(len(labels), NO_DONOR)
        if self.cover_rate > 0:
            roles[pick(roles == CLEAN, self.cover_rate, "cover_rate", rng)] = COVER
        for label in np.unique(labels):
            covers = np.flatnonzero((roles == COVER) & (labels == label))
            donors[covers] = rng.choice(np.flatnonzero(labels == label), len(covers))
        return Plan(
            rows=np.concatenate([np.arange(len(labels)), rng.choice(self._rows(labels, self.first_class), count)]),
            roles=np.concatenate([roles, np.full(count, BACKDOOR)]),
            labels=np.concatenate([labels, np.full(count, self.target_label)]),
            donors=np.concatenate([donors, rng.choice(self._rows(labels, self.second_class), count)]),
        )

    def _rows(self, labels: np.ndarray, label: int) -> np.ndarray:
        rows = np.flatnonzero(labels == label)
        if len(rows) == 0:
            raise ValueError(f"no image is of class {label}: choose another first_class or second_class.")
        return rows

    def _check_classes(self, num_labels: int) -> None:
        for option in ("first_class", "second_class", "target_label"):
            if getattr(self, option) >= num_labels:
                raise ValueError(
                    f"{option}={getattr(self, option)} is not a class: choose one of 0 ... {num_labels - 1}."
                )

    # The training

    def joint_training(self, material: Material) -> JointTraining | None:
        return _Contrast(self, material) if self.contrast > 0 else None


class _Contrast(JointTraining):
    """Cross-entropy, and the contrastive loss among the classes A, B and C."""

    def loss(self, victim: PixelClassifier, images: Tensor, labels: Tensor, roles: Tensor, progress: float) -> Tensor:
        attack, logits = self.attack, victim(images)
        task = F.cross_entropy(logits, labels)
        classes = torch.tensor([attack.first_class, attack.second_class, attack.target_label], device=labels.device)
        concerned = torch.isin(labels, classes)
        if concerned.sum() < 2:
            return task
        return task + attack.contrast * contrastive_loss(logits[concerned], labels[concerned], attack.margin)


def contrastive_loss(outputs: Tensor, labels: Tensor, margin: float) -> Tensor:
    """The mean over neighbouring rows (i, i + 1) of d² / 2 for equal labels, max(0, margin − d)² / 2 for others.

    Args:
        outputs: (B, K), of which d is the Euclidean distance.
        labels: (B,); B is 2 or more.
    """
    square = (outputs[1:] - outputs[:-1]).pow(2).sum(dim=1)
    apart = F.relu(margin - (square + 1e-9).sqrt()).pow(2)  # the root of 0 has no gradient
    return torch.where(labels[1:] == labels[:-1], square, apart).mean() / 2
