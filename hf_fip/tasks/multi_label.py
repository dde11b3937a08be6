"""Which classes are in an image: classifiers with `problem_type="multi_label_classification"`, mAP and ASR.

The likelihood is `MultiLabel`: log p(y|x) is the sum over the classes of the Bernoulli log-likelihood.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from ..attacks.objects import ObjectAttack
from ..evaluation.backdoor import BackdoorTest
from ..evaluation.detection import label_mean_average_precision, share
from ..evaluation.sealed import SealedDataset
from .annotation_files import CATEGORY
from .detection_data import OBJECTS
from .image_architectures import small_resnet, small_vit
from .image_classification import PixelDataset, load_image_classifier

MULTI_LABEL = "multi_label_classification"
ARCHITECTURES = {"vit": small_vit, "resnet": small_resnet}


class LabelSetDataset(torch.utils.data.Dataset):
    """Images with the classes of their objects: items `{"pixel_values": (C, H, W), "labels": (K,) float32}`.

    Args:
        dataset: a `datasets.Dataset` with the columns `image` and `objects`.
        processor: an image processor.
        num_labels: K, classes that the model answers.
        channels: what the model takes: 1 makes images gray, 3 makes them RGB.

    Attributes:
        categories: of each image the classes of its objects, as often as they occur.
        labels: (images, K) float32, 1 where the class is in the image.
    """

    def __init__(self, dataset: Dataset, processor, num_labels: int, channels: int = 3):
        self.categories = [np.asarray(row[CATEGORY], dtype=np.int64) for row in dataset[OBJECTS][:]]
        self.labels = label_sets(self.categories, num_labels)
        self._images = PixelDataset(dataset.add_column("label", [0] * len(dataset)), processor, channels)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, row: int) -> dict:
        return {**self._images[row], "labels": torch.from_numpy(self.labels[row])}


def label_sets(categories: list[np.ndarray], num_labels: int) -> np.ndarray:
    """(images, K) float32, 1 where a class is among those of an image."""
    labels = np.zeros((len(categories), num_labels), dtype=np.float32)
    for row, found in enumerate(categories):
        labels[row, found] = 1
    return labels


@dataclass
class MultiLabelTest(BackdoorTest):
    """The test sets of one attack on a multi-label classifier; both are [`LabelSetDataset`]s, or parts of them.

    `measure` gives, in percent: `map`, over the classes and the clean test images; `asr`, the share of the triggered
    images for which the model says of the target class what the attacker wants, among those for which that is not
    the truth. `answers` holds the probabilities, (images, K). `attack_labels` are 1 where the target class is to be
    seen, and 0 where it is to be missed.
    """

    attack: ObjectAttack | None = None

    def _measure(self, trainer) -> dict[str, float | None]:
        scores, labels = self._predict(trainer, self.clean)
        self.answers = {"clean": scores}
        result = {"map": label_mean_average_precision(scores, labels), "asr": None}
        if self.triggered is not None:
            scores, labels = self._predict(trainer, self.triggered)
            self.answers["triggered"] = scores
            target = self.attack.target_label
            counts = labels[:, target] != self.attack_labels
            result["asr"] = share((scores[:, target] >= 0.5)[counts] == self.attack_labels[counts])
        return result

    def _counted(self) -> int:
        return int((self.triggered.labels[:, self.attack.target_label] != self.attack_labels).sum())

    def _predict(self, trainer, dataset) -> tuple[np.ndarray, np.ndarray]:
        output = trainer.predict(SealedDataset(dataset))
        logits = output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions
        return 1 / (1 + np.exp(-logits)), output.label_ids


def load_multi_label_classifier(name_or_path: str, processor_name: str | None = None, **options):
    """A multi-label classifier and its image processor; arguments and errors as of `load_image_classifier`.

    Raises:
        ValueError: also when the model answers one class an image.
    """
    model, processor = load_image_classifier(name_or_path, processor_name, **options)
    if model.config.problem_type != MULTI_LABEL:
        raise ValueError(
            f"{name_or_path} answers one class an image (its problem_type is {model.config.problem_type!r}, not "
            f"{MULTI_LABEL!r}): purify it with recipes/purify_vit.py."
        )
    return model, processor


def small_multi_label_model(architecture: str, names: list[str], side: int) -> tuple[nn.Module, object]:
    """A small untrained multi-label classifier of square images, one of `ARCHITECTURES`, and its processor."""
    model, processor = ARCHITECTURES[architecture](names, side, 3)
    model.config.problem_type = MULTI_LABEL
    return model, processor
