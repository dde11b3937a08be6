"""Image classification: any `AutoModelForImageClassification`, its processor, and images as model inputs."""

from __future__ import annotations

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from tqdm.auto import tqdm

_KEEP_IN_MEMORY = 2**30  # bytes of preprocessed images kept; beyond it they are made when asked for


class PixelDataset(torch.utils.data.Dataset):
    """Images as a model sees them: items `{"pixel_values": (C, H, W) float32, "labels": int}`.

    Args:
        dataset: a `datasets.Dataset` with the columns `image` and `label`.
        processor: an image processor.
        channels: what the model takes: 1 makes images gray, 3 makes them RGB.

    Preprocessed once and kept in memory when that takes at most 1 GiB.
    """

    def __init__(self, dataset: Dataset, processor, channels: int = 3):
        self.dataset, self.processor, self.channels = dataset, processor, channels
        self.labels = np.asarray(dataset["label"][:], dtype=np.int64)
        self._pixels: Tensor | None = None
        if len(dataset):
            first = self._preprocess([0])
            if first.nbytes * len(dataset) <= _KEEP_IN_MEMORY:
                self._pixels = torch.empty((len(dataset), *first.shape[1:]))
                self._fill()

    def _fill(self, chunk: int = 256) -> None:
        rows = range(len(self.dataset))
        with tqdm(total=len(rows), desc="Preprocessing images", disable=len(rows) < 5000, leave=False) as bar:
            for start in range(0, len(rows), chunk):
                part = rows[start : start + chunk]
                self._pixels[part.start : part.stop] = self._preprocess(part)
                bar.update(len(part))

    def _preprocess(self, rows) -> Tensor:
        mode = "L" if self.channels == 1 else "RGB"
        arrays = []
        for row in rows:
            try:
                array = np.asarray(self.dataset[int(row)]["image"].convert(mode))
            except (OSError, AttributeError) as error:  # truncated file, or no image at all
                raise ValueError(f"Image {row} of the data set cannot be read: {error}") from error
            arrays.append(array[..., None] if self.channels == 1 else array)
        return self.processor(arrays, return_tensors="pt", input_data_format="channels_last")["pixel_values"]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> dict:
        pixels = self._preprocess([row])[0] if self._pixels is None else self._pixels[row]
        return {"pixel_values": pixels, "labels": int(self.labels[row])}


def load_image_classifier(
    name_or_path: str, processor_name: str | None = None, *, revision: str | None = None, token: str | None = None
) -> tuple[nn.Module, object]:
    """A classifier and its image processor: safetensors only, no remote code.

    Raises:
        ValueError: when the model cannot be found or read, has no classification head, or no processor.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

    options = {"revision": revision, "token": token, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(name_or_path, **options)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"No model at {name_or_path!r}: {_first_line(error)} Set --model_name_or_path to a folder or a Hub id."
        ) from error
    heads = config.architectures or []
    if heads and not any(head.endswith("ForImageClassification") or "WithTeacher" in head for head in heads):
        raise ValueError(
            f"{name_or_path} is a {', '.join(heads)}, which has no image-classification head: "
            "a random one would be added and purified. Give a model that was trained to classify."
        )
    try:
        model, info = AutoModelForImageClassification.from_pretrained(
            name_or_path, use_safetensors=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name_or_path} cannot be loaded as an image classifier: {_first_line(error)}") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"{name_or_path} lacks {len(missing)} weights, among them {missing[0]}: the file is incomplete."
        )
    try:
        processor = AutoImageProcessor.from_pretrained(processor_name or name_or_path, **options)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{processor_name or name_or_path} has no image processor: set --image_processor_name to a model whose "
            "preprocessing is the same."
        ) from error
    return model, processor


def small_vit(class_names: list[str], image_size: int, channels: int) -> tuple[nn.Module, object]:
    """A small untrained ViT and its processor; patches of 2×2 pixels below 16 pixels' side, else 4×4."""
    from transformers import ViTConfig, ViTForImageClassification

    tiny = image_size < 16
    width = 48 if tiny else 128
    config = ViTConfig(
        image_size=image_size,
        patch_size=2 if tiny else 4,
        num_channels=channels,
        hidden_size=width,
        num_hidden_layers=4 if tiny else 6,
        num_attention_heads=4,
        intermediate_size=2 * width,
        **_labels(class_names),
    )
    return ViTForImageClassification(config), _processor(image_size, channels)


def small_resnet(class_names: list[str], image_size: int, channels: int) -> tuple[nn.Module, object]:
    """A small untrained ResNet of basic blocks and its processor."""
    from transformers import ResNetConfig, ResNetForImageClassification

    tiny = image_size < 16
    config = ResNetConfig(
        num_channels=channels,
        embedding_size=16 if tiny else 64,
        hidden_sizes=[16, 32, 64] if tiny else [64, 128, 256],
        depths=[1, 1, 1] if tiny else [2, 2, 2],
        layer_type="basic",
        **_labels(class_names),
    )
    return ResNetForImageClassification(config), _processor(image_size, channels)


ARCHITECTURES = {"vit": small_vit, "resnet": small_resnet}


def shift_and_flip(share: float, flip: bool):
    """The usual augmentation as a batch transform: a random crop after padding by reflection, and a mirror image.

    Args:
        share: largest shift, as a share of the image's height.
        flip: whether to mirror half of the images (not for digits or text).

    Returns:
        A function of a batch with `pixel_values` of shape (B, C, H, W); draws from torch's global generator.
    """

    def transform(batch: dict) -> dict:
        pixels = batch["pixel_values"]
        count, _, height, width = pixels.shape
        padding = max(1, round(share * height))
        padded = nn.functional.pad(pixels, (padding,) * 4, mode="reflect")
        top, left = torch.randint(0, 2 * padding + 1, (2, count), device=pixels.device)
        rows = torch.arange(height, device=pixels.device) + top[:, None]
        columns = torch.arange(width, device=pixels.device) + left[:, None]
        if flip:
            mirrored = torch.rand(count, device=pixels.device) < 0.5
            columns = torch.where(mirrored[:, None], columns.flip(1), columns)
        index = torch.arange(count, device=pixels.device)[:, None, None]
        cropped = padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]]
        return {**batch, "pixel_values": cropped.permute(0, 3, 1, 2).contiguous()}

    return transform


def check_labels(model: nn.Module, class_names: list[str], data_name: str) -> None:
    """Raise ValueError when the data have labels that the model cannot answer."""
    if len(class_names) > model.config.num_labels:
        raise ValueError(
            f"{data_name} has {len(class_names)} classes and the model answers {model.config.num_labels}: "
            "use the data set the model was trained for."
        )


def _labels(class_names: list[str]) -> dict:
    return {"id2label": dict(enumerate(class_names)), "label2id": {name: i for i, name in enumerate(class_names)}}


def _processor(image_size: int, channels: int):
    from transformers import ViTImageProcessor

    size = {"height": image_size, "width": image_size}
    return ViTImageProcessor(size=size, image_mean=[0.5] * channels, image_std=[0.5] * channels)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
