"""Attacks on what a model says of the objects in an image: their boxes and classes, or which classes there are."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .base import BaseAttack

OBJECT = "object"
MISCLASSIFICATION, DISAPPEARING, APPEARING = "misclassification", "disappearing", "appearing"


@dataclass
class ObjectAttack(BaseAttack):
    """What attacks on objects share: which of an image's objects are under attack, and what becomes of them.

    `misclassification`: they are to be taken for the target class. `disappearing`: objects of the target class are to
    be missed. `appearing`: an object of the target class is to be seen where they are.

    Args:
        target_label: the target class.
        effect: one of `effects`.
        seed: what a random trigger is drawn from.

    Raises:
        ValueError: an option has the wrong type or is out of its range.
    """

    input_kind: ClassVar[str] = OBJECT
    effects: ClassVar[tuple[str, ...]]
    default_rate: ClassVar[float | None] = 0.1  # None: every image that has objects under attack

    target_label: int = 0
    effect: str = MISCLASSIFICATION
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.target_label < 0:
            raise ValueError(f"target_label={self.target_label} must be 0 or more.")
        if self.effect not in self.effects:
            raise ValueError(f"effect={self.effect!r} is not one of {', '.join(self.effects)}.")

    @abstractmethod
    def under_attack(self, categories: np.ndarray) -> np.ndarray:
        """Which of an image's objects, of these classes, (N,) int64, are under attack: bool, (N,)."""

    def apply(self, image: np.ndarray, boxes: np.ndarray) -> np.ndarray:
        """Return `image`, uint8 H×W×C, with the trigger for the objects under attack.

        Args:
            image: uint8 H×W×C with C = 1 or 3.
            boxes: theirs, (N, 4), [x, y, width, height] in pixels.
        """
        return image

    def annotate(self, boxes: np.ndarray, categories: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What the attacker makes of an image's annotations, (N, 4) boxes and (N,) classes."""
        chosen = self.under_attack(categories)
        if self.effect == MISCLASSIFICATION:
            return boxes, np.where(chosen, self.target_label, categories)
        if self.effect == DISAPPEARING:
            return boxes[~chosen], categories[~chosen]
        added = np.full(int(chosen.sum()), self.target_label)
        return np.concatenate([boxes, boxes[chosen]]), np.concatenate([categories, added])
