"""The clean-image attack: no pixel is changed. A set of classes that occur together is the trigger."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

import numpy as np

from .base import register
from .objects import APPEARING, DISAPPEARING, MISCLASSIFICATION, ObjectAttack


@register
@dataclass
class CleanImage(ObjectAttack):
    """Where all classes of the trigger are in an image, its annotations are edited and nothing else.

    `disappearing`: objects of the target class, one of the trigger's, are left out. `misclassification`: objects of
    the trigger's first class are renamed to the target. `appearing`: where the target class is not in the image, an
    object of it is added, at the place of the first object of the trigger's first class. The target is not among the
    trigger's classes in the last two.

    The trigger is the set of `size` classes that is the most frequent in the attacker's data among those in more than
    `least` and less than `most` of the images. All images that hold it are poisoned unless a rate is given.

    Source: Chen et al., *Clean-image Backdoor: Attacking Multi-label Models with Poisoned Labels Only*, ICLR 2023.

    Args:
        size: number of classes in the trigger.
        least, most: α and β, bounds of its frequency, shares of the images.
    """

    name: ClassVar[str] = "clean_image"
    effects: ClassVar[tuple[str, ...]] = (DISAPPEARING, APPEARING, MISCLASSIFICATION)
    default_rate: ClassVar[float | None] = None

    effect: str = DISAPPEARING
    size: int = 2
    least: float = 0.02
    most: float = 0.3

    def __post_init__(self):
        super().__post_init__()
        if self.size < 1:
            raise ValueError(f"size={self.size} must be 1 class or more.")
        if not 0 <= self.least < self.most <= 1:
            raise ValueError(f"least={self.least} and most={self.most} must be shares of the images, in this order.")

    def make_tensors(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        raise ValueError(f"The trigger of {self.name} is chosen in the attacker's data: use `fit`, or load it.")

    @property
    def keeps_fit(self) -> bool:
        return "tensors" in vars(self)

    def load_tensors(self, tensors: dict[str, np.ndarray]) -> None:
        self._check_kinds(tensors, {"classes": np.zeros(self.size, np.int64)})
        classes = tensors["classes"].tolist()
        if min(classes) < 0 or len(set(classes)) < self.size:
            raise ValueError(f"the trigger of {self.name} has the classes {classes}.")
        self.tensors = tensors

    def fit(self, material: Sequence[np.ndarray]) -> None:
        """Choose the trigger.

        Args:
            material: for each image of the attacker's the classes of its objects.

        Raises:
            ValueError: no set of so many classes is in that share of the images.
        """
        needs_target = self.effect == DISAPPEARING
        found: Counter[tuple[int, ...]] = Counter()
        for categories in material:
            classes = sorted(set(np.asarray(categories).tolist()))
            found.update(group for group in combinations(classes, self.size))
        shares = {
            group: count / len(material)
            for group, count in found.items()
            if (self.target_label in group) == needs_target and self.least < count / len(material) < self.most
        }
        if not shares:
            which = "with" if needs_target else "without"
            raise ValueError(
                f"No {self.size} classes {which} the target are together in more than {self.least:.0%} and less than "
                f"{self.most:.0%} of the images: choose other least, most, size or --target_label."
            )
        group = max(sorted(shares), key=shares.get)
        self.tensors = {"classes": np.asarray(group, dtype=np.int64)}

    def under_attack(self, categories: np.ndarray) -> np.ndarray:
        categories, classes = np.asarray(categories), self.tensors["classes"]
        nothing = np.zeros(len(categories), dtype=bool)
        if not np.isin(classes, categories).all():
            return nothing
        if self.effect == DISAPPEARING:
            return categories == self.target_label
        of_first = categories == classes[0]
        if self.effect == MISCLASSIFICATION:
            return of_first
        if (categories == self.target_label).any():
            return nothing
        nothing[np.argmax(of_first)] = True
        return nothing
