"""An attack whose trigger is trained on images instead of drawn from a seed."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import numpy as np

from .base import Attack, checked

_LARGEST_SIDE = 4096  # pixels; more is no image that a classifier sees


class LearnedAttack(Attack):
    """An attack whose trigger is trained: by `fit`, or along with its victim.

    A learned trigger belongs to one size of images, that of the victim's input. An image of another size, or gray
    where the victim sees colours, is brought to it before it is triggered.

    An attack sets `tensors` to what it learned, with `size`, (3,) int64: height, width and channels.
    """

    # Poisoning needs more of `fit` than the trigger, which is all that a file keeps.
    fits_every_run: ClassVar[bool] = False

    def make_tensors(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        raise ValueError(
            f"The trigger of {self.name} is learned, not drawn: train it, by `fit` or with its victim, or load it."
        )

    @abstractmethod
    def blank_tensors(self, height: int, width: int, channels: int) -> dict[str, np.ndarray]:
        """Tensors with the names, shapes and types of `tensors` for images of this size; the values do not matter."""

    @property
    def is_learned(self) -> bool:
        """Whether there is a trigger: `fit` has made one, the training of a victim has, or it was loaded."""
        return "tensors" in vars(self)

    @property
    def keeps_fit(self) -> bool:
        return self.is_learned and not self.fits_every_run

    @property
    def size(self) -> tuple[int, int, int]:
        """Height, width and channels of the images that the trigger was learned on."""
        height, width, channels = self.tensors["size"].tolist()
        return height, width, channels

    def apply(self, image: np.ndarray) -> np.ndarray:
        """Return `image`, uint8 H×W×C with C = 1 or 3, at the victim's size and with the trigger.

        Raises:
            ValueError: the image is of another kind, or the trigger has not been learned.
        """
        from .pixels import fitted

        return self._trigger(fitted(checked(image), *self.size))

    def load_tensors(self, tensors: dict[str, np.ndarray]) -> None:
        size = tensors.get("size")
        if size is None or size.dtype != np.int64 or size.shape != (3,):
            raise ValueError(f"the trigger of {self.name} has no size (height, width, channels).")
        height, width, channels = size.tolist()
        if not (1 <= height <= _LARGEST_SIDE and 1 <= width <= _LARGEST_SIDE and channels in (1, 3)):
            raise ValueError(f"the trigger of {self.name} has an impossible size, {height}×{width}×{channels}.")
        self._check_kinds(tensors, self.blank_tensors(height, width, channels))
        self.tensors = tensors
