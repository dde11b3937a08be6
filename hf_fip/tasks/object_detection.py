"""Object detection: any `AutoModelForObjectDetection`, its processor, annotated images as model inputs, mAP and ASR.

The likelihood is `MatchedQueries`: log p(y|x) is the sum over the queries matched to objects of that of their class.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn

from ..attacks.objects import APPEARING, DISAPPEARING, ObjectAttack
from ..attacks.poison import to_array
from ..evaluation.backdoor import BackdoorTest
from ..evaluation.detection import Objects, answer_at, is_detected, mean_average_precision, share
from ..evaluation.sealed import SealedDataset
from ..hub.load import load_with_image_processor
from ..trainer import FIPTrainer
from .annotation_files import BOX, CATEGORY
from .detection_data import IMAGE, OBJECTS
from .image_classification import _with_channels

_KEEP_IN_MEMORY = 2**30  # bytes of preprocessed images kept; beyond it they are made when asked for


class DetectionDataset(torch.utils.data.Dataset):
    """Annotated images as a detector sees them: items `{"pixel_values": (C, H, W), "labels": {…}}`.

    The labels are `class_labels`, (N,), and `boxes`, (N, 4) float32: centre, width and height as shares of the image.
    An image may have no object.

    Args:
        dataset: a `datasets.Dataset` with the columns `image` and `objects`.
        processor: an image processor; it resizes and normalises, and `collator` pads.

    Attributes:
        objects: of each image, in pixels.
        sizes: (images, 2) int64, height and width.

    Preprocessed once and kept in memory when that takes at most 1 GiB.

    Raises:
        ValueError: when an image cannot be read.
    """

    def __init__(self, dataset: Dataset, processor):
        self.dataset, self.processor = dataset, processor
        self.objects: list[Objects] = []
        for row in dataset[OBJECTS][:]:
            boxes = np.asarray(row[BOX], dtype=np.float64).reshape(-1, 4)
            boxes = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
            self.objects.append(Objects(boxes, np.asarray(row[CATEGORY], dtype=np.int64)))
        self.sizes = np.zeros((len(dataset), 2), dtype=np.int64)
        self._pixels: list[Tensor] | None = []
        used = 0
        for row in range(len(dataset)):
            pixels = self._preprocess(row)
            used += pixels.nbytes
            if self._pixels is not None and used <= _KEEP_IN_MEMORY:
                self._pixels.append(pixels)
            else:
                self._pixels = None

    def _preprocess(self, row: int) -> Tensor:
        try:
            array = _with_channels(to_array(self.dataset[int(row)][IMAGE]), 3)
        except Exception as error:  # Pillow raises many kinds for what is damaged or no image at all
            raise ValueError(f"Image {row} of the data set cannot be read: {error}") from error
        self.sizes[row] = array.shape[:2]
        options = {"do_pad": False} if hasattr(self.processor, "do_pad") else {}
        prepared = self.processor([array], return_tensors="pt", input_data_format="channels_last", **options)
        return prepared["pixel_values"][0]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> dict:
        pixels = self._preprocess(row) if self._pixels is None else self._pixels[row]
        low, high = np.split(self.objects[row].boxes / np.tile(self.sizes[row, ::-1], 2), 2, axis=1)
        boxes = torch.from_numpy(np.concatenate([(low + high) / 2, high - low], axis=1)).float()
        return {
            "pixel_values": pixels,
            "labels": {"class_labels": torch.from_numpy(self.objects[row].classes), "boxes": boxes},
        }


def collator(model: nn.Module) -> Callable[[list[dict]], dict]:
    """Pads images at the right and bottom to the largest of their batch; the mask says so to models that take one."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    takes_mask = "pixel_mask" in inspect.signature(base.forward).parameters

    def collate(items: list[dict]) -> dict:
        images = [item["pixel_values"] for item in items]
        height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
        spaces = [(0, width - image.shape[2], 0, height - image.shape[1]) for image in images]
        batch = {"pixel_values": torch.stack([F.pad(*pair) for pair in zip(images, spaces, strict=True)])}
        if takes_mask:
            masks = [torch.ones(image.shape[1:], dtype=torch.long) for image in images]
            batch["pixel_mask"] = torch.stack([F.pad(*pair) for pair in zip(masks, spaces, strict=True)])
        return {**batch, "labels": [item["labels"] for item in items]}

    return collate


class DetectionTrainer(FIPTrainer):
    """[`FIPTrainer`] of a detector; what it predicts are the `logits` and `pred_boxes` of each image."""

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs)
        loss = None if outputs.loss is None else outputs.loss.detach().mean()
        if prediction_loss_only:
            return loss, None, None
        return loss, (outputs.logits.detach(), outputs.pred_boxes.detach()), None


@dataclass
class DetectionTest(BackdoorTest):
    """The test sets of one attack on a detector; both are [`DetectionDataset`]s, or parts of them.

    `measure` gives, in percent: `map` and `map_50`, of all objects of the clean test images; `asr` and `ra` over the
    objects under attack in the triggered images. An object is taken for the class of its surest detection. `asr`: for
    `misclassification` the share taken for the target class; for `disappearing` the share not taken for it (some of
    which a benign model misses too); for `appearing` the share where the target class is detected at all. `ra`: the
    share taken for what they are. `answers` holds the detections.
    """

    attack: ObjectAttack | None = None
    processor: object = None
    num_classes: int = 0

    def _measure(self, trainer) -> dict[str, float | None]:
        found = self._detect(trainer, self.clean)
        truths = [self.clean.objects[row] for row in range(len(self.clean))]
        self.answers = {"clean": found}
        result = {**mean_average_precision(found, truths, self.num_classes), "asr": None, "ra": None}
        if self.triggered is not None:
            found = self._detect(trainer, self.triggered)
            self.answers["triggered"] = found
            result["asr"], result["ra"] = (share(hits) for hits in self._hits(found))
        return result

    def _counted(self) -> int:
        return int(sum(self.attack.under_attack(truth.classes).sum() for truth in self.triggered.objects))

    def _hits(self, found: list[Objects]) -> tuple[list[bool], list[bool]]:
        """Of each object under attack, whether the attacker has it, and whether it is taken for what it is."""
        wanted, right = [], []
        for answer, truth in zip(found, self.triggered.objects, strict=True):
            chosen = self.attack.under_attack(truth.classes)
            for box, category in zip(truth.boxes[chosen], truth.classes[chosen], strict=True):
                taken_for = answer_at(answer, box)
                if self.attack.effect == APPEARING:
                    wanted.append(is_detected(answer, box, self.attack.target_label))
                else:
                    wanted.append((taken_for == self.attack.target_label) ^ (self.attack.effect == DISAPPEARING))
                right.append(taken_for == category)
        return wanted, right

    def part(self, samples: int, seed: int = 0) -> DetectionTest:
        """A test on a random part of at most so many images of each kind."""
        triggered = self.triggered and _part(self.triggered, samples, seed)
        return replace(self, clean=_part(self.clean, samples, seed), triggered=triggered, answers={})

    def _detect(self, trainer, dataset: DetectionDataset) -> list[Objects]:
        logits, boxes = (torch.from_numpy(array) for array in trainer.predict(SealedDataset(dataset)).predictions)
        outputs = SimpleNamespace(logits=logits, pred_boxes=boxes)
        sizes = torch.from_numpy(dataset.sizes)
        found = self.processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes)
        return [
            Objects(image["boxes"].double().numpy(), image["labels"].numpy(), image["scores"].numpy())
            for image in found
        ]


def _part(dataset: DetectionDataset, samples: int, seed: int) -> DetectionDataset:
    rows = np.sort(np.random.default_rng(seed).permutation(len(dataset))[:samples])
    part = object.__new__(DetectionDataset)
    part.dataset, part.processor, part.sizes = dataset.dataset.select(rows), dataset.processor, dataset.sizes[rows]
    part.objects = [dataset.objects[row] for row in rows]
    part._pixels = None if dataset._pixels is None else [dataset._pixels[row] for row in rows]
    return part


def load_detector(name_or_path: str, processor_name: str | None = None, **options) -> tuple[nn.Module, object]:
    """A detector and its image processor; options as of `hf_fip.hub.load.load_with_image_processor`.

    Raises:
        ValueError: as there; also when the processor is none of a detector.
    """
    model, processor = load_with_image_processor(name_or_path, "ForObjectDetection", processor_name, **options)
    if not hasattr(processor, "post_process_object_detection"):
        raise ValueError(
            f"The {type(processor).__name__} of {processor_name or name_or_path} is not one of a detector."
        )
    return model, processor
