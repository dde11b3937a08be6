"""Video classification: any `AutoModelForVideoClassification`, clips as model inputs, augmentation, small models."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from datasets import Dataset, Features, Image
from torch import Tensor, nn

from ..attacks.clips import FRAMES_COLUMN, to_clip
from ..attacks.material import Material
from ..attacks.pixels import fitted
from ..fisher.passes import RandomState
from ..hub.load import load_with_image_processor
from .augmentation import Transform
from .image_classification import PixelDataset, match_labels
from .video_data import LabelledClips
from .video_files import frame_places

HEAD = "ForVideoClassification"
_LARGEST_INPUT = 64  # side in pixels of what the small models see; larger frames are made smaller


class FrameProcessor:
    """A processor of images or of clips, given the frames of one clip: `pixel_values` are `(T, C, H, W)` of either."""

    def __init__(self, processor):
        self.processor = processor

    def __getattr__(self, name: str):
        return getattr(self.processor, name)

    def __call__(self, frames: list[np.ndarray], **options) -> dict[str, Tensor]:
        pixels = self.processor(frames, **options)["pixel_values"]
        return {"pixel_values": pixels.reshape(len(frames), *pixels.shape[-3:])}


class ClipDataset(PixelDataset):
    """Clips as a model sees them: items `{"pixel_values": (T, C, H, W) float32, "labels": int}`.

    Args:
        dataset: a `datasets.Dataset` with the columns `frames` (lists of images of one length) and `label`.
        processor: an image or video processor; it is given the frames of one clip at a time.
        channels: what the model takes: 1 makes frames gray, 3 makes them RGB.

    Preprocessed once and kept in memory when that takes at most 1 GiB; else each is read once, to see that it can be.

    Raises:
        ValueError: when a frame cannot be read, or the model takes another number of channels.
    """

    def __init__(self, dataset: Dataset, processor, channels: int = 3):
        super().__init__(dataset, FrameProcessor(processor), channels)

    def _array(self, row: int) -> np.ndarray:
        try:
            clip = to_clip(self.dataset[int(row)][FRAMES_COLUMN])
        except Exception as error:  # Pillow raises many kinds for what is damaged or no image at all
            raise ValueError(f"Clip {row} of the data set cannot be read: {error}") from error
        return np.stack([fitted(frame, *clip.shape[1:3], self.channels) for frame in clip])

    def _preprocess(self, rows) -> Tensor:
        clips = [list(self._array(row)) for row in rows]
        options = {"return_tensors": "pt", "input_data_format": "channels_last"}
        return torch.stack([self.processor(clip, **options)["pixel_values"] for clip in clips])


def collate_clips(items: list[dict]) -> dict[str, Tensor]:
    """A batch of clips, `pixel_values` (B, T, C, H, W). Shorter clips are stretched to the longest one's frames."""
    longest = max(len(item["pixel_values"]) for item in items)
    clips = [item["pixel_values"][frame_places(len(item["pixel_values"]), longest)] for item in items]
    return {"pixel_values": torch.stack(clips), "labels": torch.tensor([item["labels"] for item in items])}


def on_frames(transform: Transform) -> Transform:
    """A batch transform of images as one of clips: the same change for all frames of a clip.

    Each frame gets the transform from one and the same state of torch's generator.

    Args:
        transform: a function of a batch with `pixel_values` of shape (B, C, H, W).

    Returns:
        A function of a batch with `pixel_values` of shape (B, T, C, H, W).
    """

    def transform_clips(batch: dict) -> dict:
        clips = batch["pixel_values"]
        state, frames = RandomState.capture(clips.device), []
        for frame in clips.unbind(dim=1):
            state.restore()
            frames.append(transform({"pixel_values": frame})["pixel_values"])
        return {**batch, "pixel_values": torch.stack(frames, dim=1)}

    return transform_clips


def clip_material(dataset: Dataset, num_labels: int, processor, channels: int, **options) -> Material:
    """What an attacker of clips who learns works with: its `images` are the clips, its `size` is that of a frame.

    Raises:
        ValueError: as from `Material.of`.
    """
    frame = dataset[0][FRAMES_COLUMN][0]
    first = Dataset.from_dict({"image": [frame]}, Features({"image": Image()}))
    return replace(Material.of(first, num_labels, FrameProcessor(processor), channels, **options), images=dataset)


def load_video_classifier(name_or_path: str, processor_name: str | None = None, **options) -> tuple[nn.Module, object]:
    """A classifier of clips and its processor; options and errors as of `load_with_image_processor`."""
    return load_with_image_processor(name_or_path, HEAD, processor_name, **options)


def match_clips(clips: LabelledClips, model: nn.Module) -> LabelledClips:
    """The clips with their classes numbered as the model numbers them. See `match_labels`.

    Raises:
        ValueError: when the data have labels that the model cannot answer, or another number of frames than it takes.
    """
    wanted = getattr(model.config, "num_frames", None)
    if wanted not in (None, clips.num_frames):
        raise ValueError(
            f"The model takes clips of {wanted} frames, not {clips.num_frames}: set --num_frames {wanted}."
        )
    return match_labels(clips, model)


def small_video_model(architecture: str, clips: LabelledClips) -> tuple[nn.Module, object]:
    """A small untrained model for these clips, one of `ARCHITECTURES`, and its processor.

    It sees square frames of their own size, a multiple of 8 up to 64 pixels.
    """
    from transformers import VideoMAEImageProcessor

    frames = to_clip(clips.train[0][FRAMES_COLUMN])
    side = min(8 * round(max(frames.shape[1:3]) / 8) or 8, _LARGEST_INPUT)
    channels = frames.shape[3]
    names = clips.class_names
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    processor = VideoMAEImageProcessor(
        size={"height": side, "width": side},
        do_center_crop=False,
        image_mean=[0.5] * channels,
        image_std=[0.5] * channels,
    )
    return ARCHITECTURES[architecture](len(frames), side, channels, labels), processor


def small_cnn_lstm(frames: int, side: int, channels: int, labels: dict) -> nn.Module:
    """A small untrained CNN-LSTM; of one more convolution for frames of more than 32 pixels' side."""
    from ..models import CNNLSTMConfig, CNNLSTMForVideoClassification

    widths = [16, 32, 64] if side <= 32 else [16, 32, 64, 64]
    return CNNLSTMForVideoClassification(CNNLSTMConfig(num_channels=channels, hidden_sizes=widths, **labels))


def small_videomae(frames: int, side: int, channels: int, labels: dict) -> nn.Module:
    """A small untrained VideoMAE; it sees two frames at a time, where their number is even."""
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    tubelet = 2 if frames % 2 == 0 else 1
    return VideoMAEForVideoClassification(
        VideoMAEConfig(**_sizes(frames, side, channels), tubelet_size=tubelet, **labels)
    )


def small_timesformer(frames: int, side: int, channels: int, labels: dict) -> nn.Module:
    """A small untrained TimeSformer, with attention in time and space apart."""
    from transformers import TimesformerConfig, TimesformerForVideoClassification

    return TimesformerForVideoClassification(TimesformerConfig(**_sizes(frames, side, channels), **labels))


def small_vivit(frames: int, side: int, channels: int, labels: dict) -> nn.Module:
    """A small untrained ViViT; it sees two frames at a time, where their number is even."""
    from transformers import VivitConfig, VivitForVideoClassification

    sizes = _sizes(frames, side, channels)
    patch = sizes.pop("patch_size")
    tubelet = [2 if frames % 2 == 0 else 1, patch, patch]
    return VivitForVideoClassification(VivitConfig(**sizes, tubelet_size=tubelet, **labels))


def _sizes(frames: int, side: int, channels: int) -> dict:
    return {
        "image_size": side,
        "num_frames": frames,
        "num_channels": channels,
        "patch_size": 4 if side <= 32 else 8,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 128,
    }


ARCHITECTURES = {
    "cnn_lstm": small_cnn_lstm,
    "videomae": small_videomae,
    "timesformer": small_timesformer,
    "vivit": small_vivit,
}
