"""Small images and short runs, for the attacks whose trigger is a network that is trained with its victim."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from attack_cases import Shape, dataset_of, image_of
from trainer_cases import CLASSES, QUIET, identical, weights
from transformers import ResNetConfig, ResNetForImageClassification, TrainerCallback, ViTImageProcessor, set_seed

from hf_fip import FIPConfig
from hf_fip.attacks import Attack, poison
from hf_fip.attacks.material import Material
from hf_fip.attacks.victim import VictimTrainer
from hf_fip.tasks.image_classification import PixelDataset

SHAPES = [(8, 8, 1), (9, 13, 3), (20, 17, 1)]
SETTINGS = {"max_steps": 6, "per_device_train_batch_size": 8, "logging_steps": 1, "eta_f": 0.0, **QUIET}


def bright_image_of(shape: Shape, row: int) -> np.ndarray:
    """Random, and brightest where the class of the row says."""
    array, label = image_of(shape, row) // 2, row % CLASSES
    array[2 * label : 2 * label + 2] += 100
    return array


def images_of(shape: Shape = (8, 8, 1), rows: int = 32) -> datasets.Dataset:
    return dataset_of([shape], rows, CLASSES, bright_image_of)


def material_of(shape: Shape = (8, 8, 1), rows: int = 32) -> Material:
    return Material(images_of(shape, rows), CLASSES, shape, (0.5,) * shape[2], (0.5,) * shape[2])


def victim_trainer(folder, attack: Attack, shape=(8, 8, 1), rate=None, seed: int = 0, **options) -> VictimTrainer:
    """A small ResNet and its trainer, with this attack taking part."""
    set_seed(seed)
    height, width, channels = shape
    sizes = {"num_channels": channels, "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    model = ResNetForImageClassification(ResNetConfig(**sizes, layer_type="basic", num_labels=CLASSES))
    processor = ViTImageProcessor(
        size={"height": height, "width": width}, image_mean=[0.5] * channels, image_std=[0.5] * channels
    )
    material = material_of(shape)
    marked = poison(material.images, attack, attack.default_rate if rate is None else rate, seed)
    callbacks = options.pop("callbacks", None)
    return VictimTrainer(
        model,
        FIPConfig(str(folder), **{**SETTINGS, **options}),
        attack=attack,
        material=material,
        train_dataset=PixelDataset(marked, processor, channels),
        callbacks=callbacks,
    )


def both(trainer: VictimTrainer) -> dict[str, torch.Tensor]:
    """What became of the victim and of the trigger."""
    trigger = {f"trigger {name}": torch.from_numpy(value) for name, value in trainer._joint.attack.tensors.items()}
    return {**weights(trainer.model), **trigger}


class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt


def assert_a_killed_run_resumes_to_the_same(make_attack: Callable[[], Attack], folder: Path, save_steps: int) -> None:
    """The same victim and the same trigger as of a run that was not killed."""
    saving = {"save_strategy": "steps", "save_steps": save_steps}
    whole = victim_trainer(folder / "whole", make_attack(), **saving)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        victim_trainer(folder / "killed", make_attack(), callbacks=[Kill()], **saving).train()
    resumed = victim_trainer(folder / "killed", make_attack(), **saving)
    resumed.train(resume_from_checkpoint=True)
    assert identical(both(resumed), both(whole))


def assert_brings_images_to_the_size(attack: Attack, size: Shape) -> None:
    for shape in [(*size[:2], 1), (30, 20, 3), (4, 4, 3)]:
        assert attack.apply(image_of(shape)).shape == size
