"""Image classification: any `AutoModelForImageClassification`, its processor, and images as model inputs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import PIL.Image
import torch
from datasets import Dataset
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..attacks.poison import ROLE_COLUMN, to_array
from ..hub.load import load_with_image_processor
from .columns import match_by_name, with_classes
from .data import LabelledImages

_KEEP_IN_MEMORY = 2**30  # bytes of preprocessed images kept; beyond it they are made when asked for


class PixelDataset(torch.utils.data.Dataset):
    """Images as a model sees them: items `{"pixel_values": (C, H, W) float32, "labels": int}`.

    Args:
        dataset: a `datasets.Dataset` with the columns `image` and `label`. One made by `hf_fip.attacks.poison` gives
            `roles` too.
        processor: an image processor.
        channels: what the model takes: 1 makes images gray, 3 makes them RGB.

    Preprocessed once and kept in memory when that takes at most 1 GiB; else each is read once, to see that it can be.

    Raises:
        ValueError: when an image cannot be read, or the model takes another number of channels.
    """

    def __init__(self, dataset: Dataset, processor, channels: int = 3):
        if channels not in (1, 3):
            raise ValueError(f"The model takes images of {channels} channels; only gray (1) and RGB (3) can be made.")
        self.dataset, self.processor, self.channels = dataset, processor, channels
        self.labels = np.asarray(dataset["label"][:], dtype=np.int64)
        self.roles = np.asarray(dataset[ROLE_COLUMN][:]) if ROLE_COLUMN in dataset.column_names else None
        self._pixels: Tensor | None = None
        if len(dataset):
            first = self._preprocess([0])
            if first.nbytes * len(dataset) <= _KEEP_IN_MEMORY:
                self._pixels = torch.empty((len(dataset), *first.shape[1:]))
            self._read()

    def _read(self, chunk: int = 256) -> None:
        rows = range(len(self.dataset))
        disable = len(rows) < 5000 or None  # None: where there is no terminal
        with tqdm(total=len(rows), desc="Reading images", disable=disable, leave=False) as bar:
            for start in range(0, len(rows), chunk):
                part = rows[start : start + chunk]
                if self._pixels is None:
                    for row in part:
                        self._array(row)
                else:
                    self._pixels[part.start : part.stop] = self._preprocess(part)
                bar.update(len(part))

    def _array(self, row: int) -> np.ndarray:
        try:
            return _with_channels(to_array(self.dataset[int(row)]["image"]), self.channels)
        except Exception as error:  # Pillow raises many kinds for what is damaged or no image at all
            raise ValueError(f"Image {row} of the data set cannot be read: {error}") from error

    def _preprocess(self, rows) -> Tensor:
        arrays = [self._array(row) for row in rows]
        return self.processor(arrays, return_tensors="pt", input_data_format="channels_last")["pixel_values"]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> dict:
        pixels = self._preprocess([row])[0] if self._pixels is None else self._pixels[row]
        item = {"pixel_values": pixels, "labels": int(self.labels[row])}
        return item if self.roles is None else {**item, "roles": int(self.roles[row])}


def load_image_classifier(name_or_path: str, processor_name: str | None = None, **options) -> tuple[nn.Module, object]:
    """A classifier and its image processor; options and errors as of `hf_fip.hub.load.load_with_image_processor`."""
    return load_with_image_processor(name_or_path, "ForImageClassification", processor_name, **options)


def match_labels(images: LabelledImages, model: nn.Module) -> LabelledImages:
    """The images with their classes numbered as the model numbers them.

    When the model has a name for each class of the data, names decide; when it has none of the names, or uses one
    twice, the numbers are taken as they are.

    Raises:
        ValueError: when the data have labels that the model cannot answer, or it has names for some of them only.
    """
    names = [str(model.config.id2label.get(number, number)) for number in range(model.config.num_labels)]
    if len(set(names)) < len(names):
        names = [str(number) for number in range(len(names))]
    if not match_by_name(images.class_names, names, images.name):
        return images
    train, test = with_classes(images.train, images.test, names=names)
    return replace(images, train=train, test=test)


def _with_channels(array: np.ndarray, channels: int) -> np.ndarray:
    if array.shape[2] == channels:
        return array
    if channels == 3:
        return np.repeat(array, 3, axis=2)
    return np.asarray(PIL.Image.fromarray(array).convert("L"))[..., None]
