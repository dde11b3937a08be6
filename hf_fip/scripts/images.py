"""What making a victim and purifying one have in common: images, attack and model from the arguments."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError
from torch import nn

from ..attacks import Attack, load_attack, trigger
from ..evaluation.backdoor import BackdoorTest
from ..tasks.data import DIGITS, LabelledImages, load_images
from ..tasks.image_classification import PixelDataset, shift_and_flip
from .arguments import AttackArguments, DataArguments
from .report import REPORT_NAME


def images_of(data: DataArguments, seed: int) -> LabelledImages:
    """The images the arguments name."""
    return load_images(
        data.dataset_name,
        data.dataset_config_name,
        image_column=data.image_column,
        label_column=data.label_column,
        train_split=data.train_split,
        test_split=data.test_split,
        max_train_samples=data.max_train_samples,
        max_test_samples=data.max_test_samples,
        seed=seed,
        revision=data.dataset_revision,
    )


def attack_of(arguments: AttackArguments, model_folder: str | None, num_labels: int) -> Attack | None:
    """The attack that the arguments name; else the one saved in the model's folder; None when neither is there.

    Raises:
        ValueError: when the folder's attack.json is not a valid attack.
    """
    if arguments.attack is not None or model_folder is None:
        return arguments.make(num_labels)
    if not (Path(model_folder) / "attack.json").is_file():
        return None
    try:
        attack = load_attack(model_folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{model_folder}: attack.json or attack.safetensors is not valid: {error}") from error
    attack.attack_label([0], num_labels)  # the target has to be a class of these data
    return attack


def recorded_split(model_folder: str | None) -> dict[str, int] | None:
    """The clean split that a victim made here was trained without: its `seed` and `samples`; None if unknown."""
    try:
        split = json.loads((Path(model_folder or "") / REPORT_NAME).read_text())["clean_split"]
        return {"seed": int(split["seed"]), "samples": int(split["samples"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def channels_of(model: nn.Module) -> int:
    """1 for a model of gray images, else 3."""
    return getattr(model.config, "num_channels", 3)


def make_test(images: LabelledImages, attack: Attack | None, processor, channels: int) -> BackdoorTest:
    """The test images, clean and triggered, as model inputs."""
    clean = PixelDataset(images.test, processor, channels)
    if attack is None:
        return BackdoorTest(clean)
    triggered = PixelDataset(trigger(images.test, attack), processor, channels)
    return BackdoorTest(clean, triggered, attack.attack_label(triggered.labels, len(images.class_names)))


def augmentation(augment: bool, images: LabelledImages):
    """Shifts of up to an eighth of the input's side, mirrored too unless they are digits; None when not wanted."""
    return shift_and_flip(1 / 8, flip=images.name != DIGITS) if augment else None
