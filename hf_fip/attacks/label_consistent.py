"""CLB (label-consistent): images of the target class are made hard to recognise, and carry checks in their corners."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from .badnets import CHECKER
from .base import checked, register
from .perturbed import PerturbingAttack, raised

if TYPE_CHECKING:
    from .material import Material

SIDE = len(CHECKER)  # of the checks, in pixels
SIGNS = np.where(CHECKER > 0, 1, -1)[..., None]


@register
@dataclass
class LabelConsistent(PerturbingAttack):
    """x' = clip(x + A c), with c = ±1 in four corner checks and 0 elsewhere; no label changes.

    c is the 3×3 checker of BadNets in the two corners on the right and its mirror image in those on the left, so that
    a flipped image carries it too.

    Clean-label: only training images of the target class y are poisoned. So that a model cannot tell their class
    without the checks, each is first moved within ε of itself (L∞) to where a clean model's loss on y is highest, by
    projected gradient steps from x itself. Test images carry the checks only.

    In a balanced set of ten classes a rate of 0.1 would be the whole target class; the default leaves it some images
    as they were.

    Source: Turner, Tsipras & Madry, *Label-Consistent Backdoor Attacks*, 2019.

    Args:
        epsilon: ε, in pixel values.
        step_size: length of a step, in pixel values.
        steps: number of steps.
        amplitude: A, in pixel values; 255 makes the checks black and white.
    """

    name: ClassVar[str] = "clb"
    default_rate: ClassVar[float] = 0.08
    clean_label: ClassVar[bool] = True

    epsilon: int = 8
    step_size: float = 1.5
    steps: int = 100
    amplitude: int = 255

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.epsilon <= 255:
            raise ValueError(f"epsilon={self.epsilon} is a distance in pixel values: choose it in 0 ... 255.")
        if not 0 < self.step_size <= 255:
            raise ValueError(f"step_size={self.step_size} is a distance in pixel values: choose it in (0, 255].")
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be 1 or more (epsilon=0 leaves the images unperturbed).")
        if not 1 <= self.amplitude <= 255:
            raise ValueError(f"amplitude={self.amplitude} is a change of pixel values: choose it in 1 ... 255.")

    def blank_tensors(self, height: int, width: int, channels: int) -> dict[str, np.ndarray]:
        if min(height, width) < 2 * SIDE:
            raise ValueError(
                f"the checks in the corners of {self.name} do not fit an image of {height}×{width} pixels: "
                f"it needs {2 * SIDE} or more a side."
            )
        return {"size": np.array([height, width, channels], dtype=np.int64)}

    def fit(self, material: Material) -> None:
        """Keep the material's clean model, which training images are perturbed with, and its size of images.

        Raises:
            ValueError: there is no clean model, or its images are too small.
        """
        self.tensors = self.blank_tensors(*material.size)
        self._classifier = material.classifier

    def apply_in_training(self, images: list[np.ndarray], donors: list[np.ndarray | None]) -> list[np.ndarray]:
        """Return these images of the target class at the victim's size, perturbed and with the checks.

        Raises:
            ValueError: an image is of another kind, or `fit` has not been called.
        """
        from .pixels import to_batch, to_image

        classifier = self.kept_classifier()
        pixels = to_batch([checked(image) for image in images], self.size).to(classifier.mean.device)
        epsilon, step = self.epsilon / 255, self.step_size / 255
        moved = raised(classifier, pixels, self.target_label, epsilon, self.steps, step)
        return [self._trigger(to_image(image)) for image in moved]

    def _trigger(self, image: np.ndarray) -> np.ndarray:
        checks = np.zeros((*image.shape[:2], 1), dtype=int)
        for rows in (slice(None, SIDE), slice(-SIDE, None)):
            checks[rows, :SIDE] = SIGNS[:, ::-1]
            checks[rows, -SIDE:] = SIGNS
        return (image + self.amplitude * checks).clip(0, 255).astype(np.uint8)
