"""Tiny models of clips, tiny clips, and tiny video files, shared by their tests."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import torch
from torch import nn
from transformers import (
    TimesformerConfig,
    TimesformerForVideoClassification,
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    VideoMAEImageProcessor,
    VivitConfig,
    VivitForVideoClassification,
    set_seed,
)

from hf_fip.models import CNNLSTMConfig, CNNLSTMForVideoClassification

CLASSES, FRAMES, SIDE = 3, 4, 8
_WIDTHS = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
_SIZES = {"image_size": SIDE, "num_frames": FRAMES, "num_labels": CLASSES, "initializer_range": 0.2, **_WIDTHS}


def cnn_lstm(seed: int = 1, **options) -> CNNLSTMForVideoClassification:
    set_seed(seed)
    sizes = {"hidden_sizes": [4, 5], "lstm_size": 6, "num_labels": CLASSES}
    return CNNLSTMForVideoClassification(CNNLSTMConfig(**{**sizes, **options}))


def videomae(seed: int = 1, **options) -> VideoMAEForVideoClassification:
    set_seed(seed)
    return VideoMAEForVideoClassification(VideoMAEConfig(patch_size=4, tubelet_size=2, **{**_SIZES, **options}))


def timesformer(seed: int = 1, **options) -> TimesformerForVideoClassification:
    set_seed(seed)
    return TimesformerForVideoClassification(TimesformerConfig(patch_size=4, **{**_SIZES, **options}))


def vivit(seed: int = 1, **options) -> VivitForVideoClassification:
    set_seed(seed)
    return VivitForVideoClassification(VivitConfig(tubelet_size=[2, 4, 4], **{**_SIZES, **options}))


MODELS = {"CNN-LSTM": cnn_lstm, "VideoMAE": videomae, "TimeSformer": timesformer, "ViViT": vivit}


def settled(model: nn.Module) -> nn.Module:
    """In eval mode, with BatchNorm statistics that are not the fresh ones."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def processor(side: int = SIDE, channels: int = 3) -> VideoMAEImageProcessor:
    size = {"height": side, "width": side}
    means = [0.5] * channels
    return VideoMAEImageProcessor(size=size, do_center_crop=False, image_mean=means, image_std=means)


def clip(frames: int = FRAMES, height: int = SIDE, width: int = SIDE, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Random frames, uint8 (frames, height, width, channels)."""
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, channels), dtype=np.uint8)


def batch(rows: int = 4, frames: int = FRAMES, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(rows, frames, 3, SIDE, SIDE, generator=generator)
    return {"pixel_values": pixels, "labels": torch.arange(rows) % CLASSES}


def picture(frame: np.ndarray) -> PIL.Image.Image:
    return PIL.Image.fromarray(frame.squeeze(2) if frame.shape[2] == 1 else frame)


def clips_of(rows: int = 12, **shape) -> datasets.Dataset:
    """Random clips; the class is where the frames are brightest."""
    made = []
    for row in range(rows):
        array = clip(seed=row, **shape) // 2
        array[:, 2 * (row % CLASSES) : 2 * (row % CLASSES) + 2] += 100
        made.append([picture(frame) for frame in array])
    features = datasets.Features(
        frames=datasets.List(datasets.Image()), label=datasets.ClassLabel(num_classes=CLASSES)
    )
    return datasets.Dataset.from_dict({"frames": made, "label": [row % CLASSES for row in range(rows)]}, features)


def write_video(path: Path, frames: int = 8, width: int = 48, height: int = 32) -> Path:
    """A video whose n-th frame is of one gray, 20 + 20 n."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(frames):
            array = np.full((height, width, 3), 20 + 20 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_frames(folder: Path, frames: int = 6, seed: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, frame in enumerate(clip(frames, seed=seed)):
        picture(frame).save(folder / f"frame{number:04}.png")
