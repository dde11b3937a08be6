"""Object detection and multi-label recognition in the flow that all tasks share: their arguments, and their steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from ..attacks.objects import DISAPPEARING, OBJECT
from ..attacks.poison import to_array
from ..attacks.poison_objects import poison_objects, trigger_objects
from ..evaluation.detection import SCORE
from ..evaluation.reactivation import PixelRange
from ..hub.card import CardWords
from ..plots_detection import MAX_IMAGES, plot_objects
from ..tasks.annotation_files import CATEGORY
from ..tasks.augmentation import both, disturb, shift_and_flip
from ..tasks.detection_augmentation import erase_objects, mirror
from ..tasks.detection_data import BOX_FORMATS, OBJECTS, SCENES, load_annotated_images, match_classes
from ..tasks.detectors import ARCHITECTURES as DETECTORS
from ..tasks.detectors import LEAST_SIDE, small_detector
from ..tasks.multi_label import ARCHITECTURES as CLASSIFIERS
from ..tasks.multi_label import (
    LabelSetDataset,
    MultiLabelTest,
    load_multi_label_classifier,
    small_multi_label_model,
)
from ..tasks.object_detection import (
    DetectionDataset,
    DetectionTest,
    DetectionTrainer,
    collator,
    load_detector,
)
from .arguments import (
    FIP,
    AttackArguments,
    DataArguments,
    MethodArguments,
    ModelArguments,
    PoisonArguments,
    VictimConfig,
    attack_field,
    check_least,
)
from .images import ImageLoad, channels_of
from .recorded import attack_of
from .task import Task
from .terminal import say

BOXES, LABELS = "boxes", "labels"


@dataclass
class AnnotatedData(DataArguments):
    """Which annotated images, and which of them the defender has."""

    dataset_name: str = field(
        default=SCENES,
        metadata={
            "help": "A Hub id, a parquet file, a folder (of parquet files, or in the layout of PASCAL VOC or COCO), "
            "or 'scenes': generated shapes, which need no download."
        },
    )
    image_column: str | None = field(default=None, metadata={"help": "Column of the images. Guessed by default."})
    objects_column: str | None = field(default=None, metadata={"help": "Column of the objects. Guessed by default."})
    box_format: str = field(
        default="xywh",
        metadata={
            "help": "Of a Hub or parquet data set: left, top, width, height or corners.",
            "choices": BOX_FORMATS,
        },
    )


@dataclass
class AttackOnObjects(AttackArguments):
    """The backdoor in what is said of objects."""

    input_kind: ClassVar[str] = OBJECT
    default_attack: ClassVar[str] = "object_patch"
    attack: str | None = attack_field(input_kind, default_attack)


@dataclass
class ObjectPoison(AttackOnObjects, PoisonArguments):
    """[`AttackOnObjects`] where a victim is trained."""

    clean_model: ClassVar[None] = None  # no trigger is learned on one


@dataclass
class DetectionLoad(ImageLoad):
    """A detector, or a multi-label classifier."""

    answers: str = field(
        default=BOXES,
        metadata={
            "help": "What the model answers: boxes with classes, or labels, which classes are in the image.",
            "choices": (BOXES, LABELS),
        },
    )


@dataclass
class DetectionModel(ModelArguments, DetectionLoad):
    """The detector, or the multi-label classifier, to be purified."""

    architecture: str = field(
        default="rt_detr",
        metadata={
            "help": "Kind of victim made here: a detector, or (vit, resnet) a multi-label classifier.",
            "choices": (*DETECTORS, *CLASSIFIERS),
        },
    )
    largest_side: int = field(
        default=320, metadata={"help": "Largest side in pixels of what a victim made here sees."}
    )
    augment: bool = field(default=False, metadata={"help": "Mirror training images at random (labels: shift too)."})

    def __post_init__(self):
        check_least(self, largest_side=LEAST_SIDE if self.answers == BOXES else 2)  # a ViT's patch is of 2×2 pixels


@dataclass
class DetectionMethod(MethodArguments):
    """What the backdoor is taken out by."""

    disturb: bool = field(
        default=False,
        metadata={
            "help": "Disturb the clean images at random while purifying: other images or noise blended in, contrast "
            "and brightness, erased squares and parts of objects (labels: warps too). Boxes and labels stay."
        },
    )


@dataclass
class DetectorConfig(VictimConfig):
    """How a victim is trained."""

    num_train_epochs: float = field(default=12.0, metadata={"help": "Passes over the training set."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Batch size a device."})
    weight_decay: float = field(default=1e-4, metadata={"help": "Weight decay."})


class DetectionTask(Task):
    """Any `AutoModelForObjectDetection`."""

    metric = "map"
    words = CardWords(
        pipeline_tag="object-detection",
        evaluate="detection",
        denominator="ASR and RA are over the objects under attack in the triggered test images. One is taken for "
        f"the class of its surest detection, of a score of {SCORE} and an IoU of 0.5 or more. mAP is COCO's (IoU 0.50 "
        "to 0.95), of the whole clean test set.",
    )
    data_arguments, attack_arguments, poison_arguments = AnnotatedData, AttackOnObjects, ObjectPoison
    load_arguments, model_arguments, method_arguments = DetectionLoad, DetectionModel, DetectionMethod
    victim_config, trainer = DetectorConfig, DetectionTrainer
    methods = (FIP,)

    def load_data(self, arguments, seed):
        data = load_annotated_images(
            arguments.dataset_name,
            arguments.dataset_config_name,
            image_column=arguments.image_column,
            objects_column=arguments.objects_column,
            box_format=arguments.box_format,
            **arguments.selection(),
            seed=seed,
        )
        if data.left_out:
            say(f"warning: {len(data.left_out)} images cannot be read and are left out, such as {data.left_out[0]}.")
        if data.dropped:
            say(f"left out {data.dropped} boxes without an area inside their image.")
        return data

    def match(self, data, model):
        return match_classes(data, model)

    def inputs(self, dataset, model, processor):
        return DetectionDataset(dataset, processor)

    def load_model(self, place, arguments, **options):
        return load_detector(place, arguments.image_processor_name, trust=arguments.trust(), **options)

    def new_model(self, arguments, data):
        _check(arguments.architecture, DETECTORS, BOXES)
        most = max(len(row[CATEGORY]) for row in data.train[OBJECTS][:])
        return small_detector(arguments.architecture, data.class_names, *_size(data), most, arguments.largest_side)

    def trainer_options(self, model, processor):
        return {"data_collator": collator(model)}

    def augmentation(self, arguments, data):
        return mirror if arguments.augment else None

    def disturbance(self, arguments, data, model, processor):
        if not arguments.disturb:
            return None
        pixels = PixelRange.of(processor, *_size(data), 3)
        return both(erase_objects(pixels), disturb(pixels, warp=False))

    def attack(self, arguments, model_folder, data):
        return attack_of(arguments, model_folder, len(data.class_names))

    def material(self, dataset, model, processor, **options):
        return [np.asarray(row[CATEGORY], dtype=np.int64) for row in dataset[OBJECTS][:]]

    def poison(self, dataset, attack, rate, seed):
        return poison_objects(dataset, attack, rate, seed)

    def clean_test(self, dataset, model, processor):
        clean = self.inputs(dataset, model, processor)
        return DetectionTest(clean, processor=processor, num_classes=model.config.num_labels)

    def test(self, data, attack, model, processor):
        test = self.clean_test(data.test, model, processor)
        if attack is not None:
            test.attack = attack
            test.triggered = self.inputs(trigger_objects(data.test, attack), model, processor)
        return test

    def draw(self, path, data, attack, model, answers):
        names, triggered = data.class_names, trigger_objects(data.test, attack)
        clean = [row for row, found in enumerate(data.test[OBJECTS][:]) if attack.under_attack(_classes(found)).any()]
        examples = []
        for place, row in enumerate(clean[:MAX_IMAGES]):
            found = data.test[row][OBJECTS]
            example = {
                "clean": to_array(data.test[row]["image"]),
                "triggered": to_array(triggered[place]["image"]),
                "truth": self._truth(found, names),
            }
            for moment, given in answers.items():
                example[moment] = self._found(given["triggered"][place], names)
            examples.append(example)
        return plot_objects(examples, path, names[attack.target_label], f"Trigger: {_words(attack, names)}")

    def _truth(self, objects: dict, names: list[str]) -> list[tuple]:
        boxes = np.asarray(objects["bbox"], dtype=np.float64).reshape(-1, 4)
        boxes = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
        return [(names[number], box) for number, box in zip(objects[CATEGORY], boxes, strict=True)]

    def _found(self, answer, names: list[str]) -> list[tuple]:
        counts = answer.scores >= SCORE
        return [(names[n], box) for n, box in zip(answer.classes[counts], answer.boxes[counts], strict=True)]


class MultiLabelTask(DetectionTask):
    """Any `AutoModelForImageClassification` with `problem_type="multi_label_classification"`."""

    words = CardWords(
        evaluate="detection --answers labels",
        denominator="ASR is over the triggered test images for which what the attacker wants said of the target class "
        "is not true. mAP is the mean over the classes of the average precision on the whole clean test set.",
    )
    trainer = Task.trainer

    def inputs(self, dataset, model, processor):
        return LabelSetDataset(dataset, processor, model.config.num_labels, channels_of(model))

    def load_model(self, place, arguments, **options):
        return load_multi_label_classifier(place, arguments.image_processor_name, trust=arguments.trust(), **options)

    def new_model(self, arguments, data):
        _check(arguments.architecture, CLASSIFIERS, LABELS)
        side = min(max(_size(data)), arguments.largest_side)
        return small_multi_label_model(arguments.architecture, data.class_names, side)

    def trainer_options(self, model, processor):
        return {}

    def augmentation(self, arguments, data):
        return shift_and_flip(1 / 8, flip=True) if arguments.augment else None

    def disturbance(self, arguments, data, model, processor):
        if not arguments.disturb:
            return None
        return disturb(PixelRange.of(processor, *_size(data), channels_of(model)))

    def clean_test(self, dataset, model, processor):
        return MultiLabelTest(self.inputs(dataset, model, processor))

    def test(self, data, attack, model, processor):
        test = super().test(data, attack, model, processor)
        if attack is not None:
            test.attack_labels = np.full(len(test.triggered), int(attack.effect != DISAPPEARING))
        return test

    def _truth(self, objects, names):
        return [(names[number], None) for number in sorted(set(objects[CATEGORY]))]

    def _found(self, answer, names):
        return [(name, None) for name, probability in zip(names, answer, strict=True) if probability >= 0.5]


def _size(data) -> tuple[int, int]:
    """Height and width of the first image."""
    return to_array(data.train[0]["image"]).shape[:2]


def _classes(objects: dict) -> np.ndarray:
    return np.asarray(objects[CATEGORY], dtype=np.int64)


def _words(attack, names: list[str]) -> str:
    """The trigger in words."""
    classes = attack.tensors.get("classes")
    what = "" if classes is None else f", {' and '.join(names[number] for number in classes)} together"
    return f"{attack.name}{what}: {attack.effect}"


def _check(architecture: str, known: dict, answers: str) -> None:
    if architecture not in known:
        raise ValueError(
            f"--architecture {architecture} is none of a model that answers {answers}: choose one of "
            f"{', '.join(known)}, or another --answers."
        )
