"""What the attacks on clips share: every frame carries the trigger; poisoned training sets and triggered test sets."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from .base import Attack, checked
from .poison import InputColumn, poison_column, to_array, to_png, trigger_column

if TYPE_CHECKING:
    import datasets
    import PIL.Image

VIDEO = "video"  # `Attack.input_kind`
FRAMES_COLUMN = "frames"


class FrameAttack:
    """Makes of an attack on images, beside it among the bases, one on clips: each frame gets the same trigger.

    A clip is uint8 (T, H, W, C) with C = 1 or 3.
    """

    input_kind: ClassVar[str] = VIDEO

    def apply(self, clip: np.ndarray) -> np.ndarray:
        """Return a copy of `clip` that carries the trigger on all frames.

        Raises:
            ValueError: it is of another kind, or its frames are too small for the trigger.
        """
        return np.stack([super(FrameAttack, self).apply(frame) for frame in checked_clip(clip)])


class ClipColumn(InputColumn):
    """Clips: uint8 (T, H, W, C), stored as a list of PNG files."""

    noun = "clips"

    def check(self, dataset):
        if not is_frames(dataset.features[self.name]):
            raise ValueError(
                f"column {self.name!r} does not hold lists of images: use dataset.cast_column({self.name!r}, "
                "datasets.List(datasets.Image()))."
            )

    def undecoded(self, dataset):
        from datasets import Image, List

        return dataset.cast_column(self.name, List(Image(decode=False)))

    def decoder(self, dataset):
        from datasets import Image

        decoder = Image()
        return lambda stored: to_clip([decoder.decode_example(frame) for frame in stored])

    def encode(self, array):
        return [{"bytes": to_png(frame), "path": None} for frame in array]


def poison_clips(dataset: datasets.Dataset, attack: Attack, rate: float, seed: int) -> datasets.Dataset:
    """As `hf_fip.attacks.poison`, for clips: columns `frames` (lists of images) and `label`, a `ClassLabel`."""
    return poison_column(dataset, attack, rate, seed, ClipColumn(FRAMES_COLUMN))


def trigger_clips(dataset: datasets.Dataset, attack: Attack) -> datasets.Dataset:
    """As `hf_fip.attacks.trigger`, for clips: columns `frames` (lists of images) and `label`, a `ClassLabel`."""
    return trigger_column(dataset, attack, ClipColumn(FRAMES_COLUMN))


def is_frames(feature) -> bool:
    """Whether a column of this feature holds a list of images a row."""
    from datasets import Image, List

    return isinstance(feature, List) and isinstance(feature.feature, Image)


def to_clip(frames: list[PIL.Image.Image]) -> np.ndarray:
    """Frames as one array, uint8 (T, H, W, C), of the size of the first; in colour when one of them is.

    Raises:
        ValueError: there is no frame, or one has 32 bits a channel.
    """
    from .pixels import fitted

    arrays = [to_array(frame) for frame in frames]
    if not arrays:
        raise ValueError("it has no frame")
    channels = max(array.shape[2] for array in arrays)
    return np.stack([fitted(array, *arrays[0].shape[:2], channels) for array in arrays])


def checked_clip(clip: np.ndarray) -> np.ndarray:
    """The clip, if it is uint8 (T, H, W, C) with a frame at least and C = 1 or 3; else ValueError."""
    if not isinstance(clip, np.ndarray) or clip.ndim != 4 or not len(clip):
        found = f"{clip.dtype} {clip.shape}" if isinstance(clip, np.ndarray) else type(clip).__name__
        raise ValueError(f"a clip must be a uint8 array of shape (T, H, W, C), not {found}.")
    checked(clip[0])
    return clip
