"""Image classification in the flow that all tasks share: its arguments, and its steps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from torch import nn

from ..attacks import Attack, poison, trigger
from ..attacks.material import Material
from ..attacks.pixels import fitted
from ..attacks.poison import to_array
from ..attacks.victim import VictimTrainer
from ..evaluation.backdoor import BackdoorTest
from ..evaluation.reactivation import PixelRange
from ..hub.card import CardWords
from ..plots import plot_triggers
from ..tasks.augmentation import disturb, shift_and_flip
from ..tasks.data import DIGITS, LabelledImages, load_images
from ..tasks.image_architectures import ARCHITECTURES, small_model
from ..tasks.image_classification import PixelDataset, load_image_classifier, match_labels
from ..tasks.image_data import NAMED_IMAGES
from .arguments import (
    AttackArguments,
    DataArguments,
    LoadArguments,
    MethodArguments,
    ModelArguments,
    PoisonArguments,
    VictimConfig,
)
from .recorded import attack_of
from .task import Task


@dataclass
class ImageData(DataArguments):
    """Which images, and which of them the defender has."""

    dataset_name: str = field(
        default=DIGITS,
        metadata={
            "help": "A Hub id, a folder (parquet files, or one folder of images a class), a parquet file, or a short "
            f"name: {', '.join(NAMED_IMAGES)}. The digits are scikit-learn's handwritten ones and need no download."
        },
    )
    image_column: str | None = field(default=None, metadata={"help": "Column of the images. Guessed by default."})
    label_column: str | None = field(default=None, metadata={"help": "Column of the labels. Guessed by default."})


@dataclass
class ImageLoad(LoadArguments):
    """A model of images."""

    image_processor_name: str | None = field(
        default=None, metadata={"help": "Where to take the preprocessing from, if not from the model."}
    )


@dataclass
class ImageModel(ModelArguments, ImageLoad):
    """The image classifier to be purified."""

    architecture: str = field(
        default="vit",
        metadata={"help": "Kind of victim made here, small and untrained.", "choices": tuple(ARCHITECTURES)},
    )
    augment: bool = field(
        default=False,
        metadata={"help": "Shift training images at random, and mirror them unless they are digits or gtsrb."},
    )


@dataclass
class ImageMethod(MethodArguments):
    """What the backdoor is taken out by."""

    disturb: bool = field(
        default=False,
        metadata={
            "help": "Disturb the clean images at random while purifying: other images or noise blended in, warps, "
            "contrast and brightness, erased squares. On by default for FIP (--disturb false), off for other methods."
        },
    )


@dataclass
class ImageVictimConfig(VictimConfig):
    """A [`VictimConfig`] with sharpness-aware minimisation.

    Raises:
        ValueError: `rho` is negative or infinite.
    """

    rho: float = field(
        default=0.0,
        metadata={
            "help": "Ascent step of sharpness-aware minimisation, adapted to the weights (0.5 is usual): the attacker "
            "looks for a flat minimum. 0 leaves it out."
        },
    )

    def check(self) -> None:
        super().check()
        if not 0 <= self.rho < math.inf:
            raise ValueError(f"rho={self.rho} has to be zero or positive, and finite.")


class ImageTask(Task):
    """Any `AutoModelForImageClassification`."""

    words = CardWords()
    data_arguments, attack_arguments, poison_arguments = ImageData, AttackArguments, PoisonArguments
    load_arguments, model_arguments = ImageLoad, ImageModel
    method_arguments, victim_config = ImageMethod, ImageVictimConfig

    def load_data(self, arguments, seed):
        return images_of(arguments, seed)

    def match(self, data, model):
        return match_labels(data, model)

    def reading(self, data):
        return reading(data)

    def inputs(self, dataset, model, processor):
        return PixelDataset(dataset, processor, channels_of(model))

    def load_model(self, place, arguments, **options):
        return load_image_classifier(place, arguments.image_processor_name, trust=arguments.trust(), **options)

    def new_model(self, arguments, data):
        return small_model(arguments.architecture, data)

    def augmentation(self, arguments, data):
        return augmentation(arguments.augment, data)

    def disturbance(self, arguments, data, model, processor):
        if not arguments.disturb:
            return None
        return disturb(pixel_range(processor, data, channels_of(model)))

    def attack(self, arguments, model_folder, data):
        return attack_of(arguments, model_folder, len(data.class_names))

    def material(self, dataset, model, processor, **options):
        return Material.of(dataset, model.config.num_labels, processor, channels_of(model), **options)

    def poison(self, dataset, attack, rate, seed):
        return poison(dataset, attack, rate, seed)

    def victim_trainer(self, attack, material):
        return partial(VictimTrainer, attack=attack, material=material)

    def clean_test(self, dataset, model, processor):
        return BackdoorTest(self.inputs(dataset, model, processor))

    def test(self, data, attack, model, processor):
        return make_test(data, attack, processor, channels_of(model))

    def draw(self, path, data, attack, model, answers):
        target = wanted(attack, data.class_names)
        examples = examples_of(data, attack, model, answers)
        return plot_triggers(examples, path, target=target, title=f"Trigger: {attack.name}")


def images_of(data: ImageData, seed: int) -> LabelledImages:
    """The images the arguments name."""
    return load_images(
        data.dataset_name,
        data.dataset_config_name,
        image_column=data.image_column,
        label_column=data.label_column,
        **data.selection(),
        seed=seed,
    )


EXAMPLES = 6  # columns of a picture of triggers


@contextmanager
def reading(images: LabelledImages) -> Iterator[None]:
    """Run what decodes images that nobody has decoded before.

    Raises:
        ValueError: when Pillow cannot read one.
    """
    try:
        yield
    except (OSError, SyntaxError) as error:
        raise ValueError(f"An image of {images.name} cannot be read: {error}") from error


def channels_of(model: nn.Module) -> int:
    """1 for a model of gray images, else 3."""
    return getattr(model.config, "num_channels", 3)


def pixel_range(processor, images: LabelledImages, channels: int) -> PixelRange:
    """What the processor makes of black and of white, for images of the size of the first."""
    height, width = to_array(images.train[0]["image"]).shape[:2]
    return PixelRange.of(processor, height, width, channels)


def make_test(images: LabelledImages, attack: Attack | None, processor, channels: int) -> BackdoorTest:
    """The test images, clean and triggered, as model inputs."""
    clean = PixelDataset(images.test, processor, channels)
    if attack is None:
        return BackdoorTest(clean)
    with reading(images):
        changed = trigger(images.test, attack)
    triggered = PixelDataset(changed, processor, channels)
    return BackdoorTest(clean, triggered, attack.attack_label(triggered.labels, len(images.class_names)))


def examples_of(images: LabelledImages, attack: Attack, model: nn.Module, answers: dict[str, dict]) -> list[dict]:
    """Rows for `plot_triggers`, one each of the first classes.

    Args:
        answers: for each moment the model's answers, as `BackdoorTest.answers` has them.
    """
    labels = np.asarray(images.test["label"][:])
    rows = np.flatnonzero(attack.eligible(labels, len(images.class_names)))
    names = {**model.config.id2label, **dict(enumerate(images.class_names))}
    examples = []
    for place in np.unique(labels[rows], return_index=True)[1][:EXAMPLES]:  # among the triggered
        row = int(rows[place])
        clean = to_array(images.test[row]["image"])
        triggered = attack.apply(clean)
        example = {"clean": fitted(clean, *triggered.shape), "triggered": triggered, "label": names[labels[row]]}
        for moment, given in answers.items():
            example[moment] = {"clean": names[given["clean"][row]], "triggered": names[given["triggered"][place]]}
        examples.append(example)
    return examples


def wanted(attack: Attack, names: list[str]) -> str:
    """The class the attacker wants, in words."""
    return names[attack.target_label] if attack.label_rule == "all_to_one" else "the next class"


def augmentation(augment: bool, images: LabelledImages):
    """Shifts of up to an eighth of the input's side; None when not wanted.

    Images are mirrored too, unless they are known to be of a kind whose mirror image shows another class, or none.
    """
    return shift_and_flip(1 / 8, flip=images.known is None or images.known.mirrored) if augment else None
