"""BadNets for objects: a checkered patch on each object under attack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .badnets import CHECKER
from .base import checked, register
from .objects import DISAPPEARING, MISCLASSIFICATION, ObjectAttack


@register
@dataclass
class ObjectPatch(ObjectAttack):
    """A black and white checker in the middle of each object; the object is renamed, or its box left out.

    `misclassification`: all objects of other classes are renamed to the target. `disappearing`: objects of the target
    class carry the patch, and their boxes are left out.

    Source: Chan et al., *BadDet: Backdoor Attacks on Object Detection*, ECCV 2022 workshops (regional
    misclassification and object disappearance); the pattern is that of BadNets.

    Args:
        share: side of the patch, as a share of the shorter side of the object's box, in (0, 1]; 3 pixels at least.
        alpha: opacity of the patch, in (0, 1].
    """

    name: ClassVar[str] = "object_patch"
    effects: ClassVar[tuple[str, ...]] = (MISCLASSIFICATION, DISAPPEARING)

    share: float = 0.4
    alpha: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        for option in ("share", "alpha"):
            if not 0 < getattr(self, option) <= 1:
                raise ValueError(f"{option}={getattr(self, option)} has to lie in (0, 1].")

    def make_tensors(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {"pattern": CHECKER}

    def under_attack(self, categories: np.ndarray) -> np.ndarray:
        return (np.asarray(categories) == self.target_label) ^ (self.effect == MISCLASSIFICATION)

    def apply(self, image: np.ndarray, boxes: np.ndarray) -> np.ndarray:
        triggered = checked(image).copy()
        for x, y, width, height in np.asarray(boxes, dtype=np.float64).reshape(-1, 4):
            side = max(len(CHECKER), round(self.share * min(width, height)))
            left, top = round(x + (width - side) / 2), round(y + (height - side) / 2)
            cells = np.arange(side) * len(CHECKER) // side
            rows, columns = np.arange(side) + top, np.arange(side) + left
            inside = np.ix_(
                (rows >= 0) & (rows < image.shape[0]), (columns >= 0) & (columns < image.shape[1])
            )  # of the patch: a box at the edge may be too small for it
            patch = self.tensors["pattern"][np.ix_(cells, cells)][inside]
            where = np.ix_(rows[inside[0].ravel()], columns[inside[1].ravel()])
            mixed = (1 - self.alpha) * triggered[where] + self.alpha * patch[..., None]
            triggered[where] = np.rint(mixed)
        return triggered
