"""One run of the study: a cached victim, one purifier, and everything that is measured of what comes out."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig
from study_published import load_published
from study_released import train as train_by_released_code
from study_typeset import typeset_digits
from torch import nn
from transformers import Trainer, TrainingArguments, set_seed

from hf_fip.attacks import Attack, load_attack
from hf_fip.baselines import method
from hf_fip.config import FIPConfig
from hf_fip.evaluation.backdoor import BackdoorTest
from hf_fip.evaluation.cost import trained_numbers
from hf_fip.evaluation.metrics import defense_effectiveness_rating
from hf_fip.evaluation.reactivation import SAMPLES, Perturbed, reactivate
from hf_fip.evaluation.relearning import (
    CLEAN_SHARE,
    TRIGGERED,
    RelearningConfig,
    attackers_images,
    relearning_trainer,
)
from hf_fip.hub.report import versions
from hf_fip.scripts.arguments import FIP
from hf_fip.scripts.images import augmentation, channels_of, make_test, pixel_range
from hf_fip.scripts.recorded import recorded_split
from hf_fip.singular import SingularValueConfig
from hf_fip.tasks.augmentation import both, disturb
from hf_fip.tasks.data import LabelledImages, load_images, split_clean
from hf_fip.tasks.image_classification import PixelDataset, load_image_classifier
from hf_fip.trainer import FIPTrainer

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "backdoor_image.py"
RELEASED = "released"  # the purifier that is the released code
HELD_OUT = 0.2  # share of the clean images on which a learning rate is chosen
SILENT = {
    "save_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": True,
    "remove_unused_columns": False,
    "label_names": ["labels"],
    "per_device_eval_batch_size": 256,
}


@dataclass(frozen=True)
class Victim:
    """A model to purify: made by recipes/backdoor_image.py, or published by others.

    Attributes:
        data: name or path of the data set.
        family: whose defaults a purifier takes, `vit` or `resnet`.
        attack: its name, or `none` for a benign model; of a published one, the folder's name.
        seed: of its training, and of its purification.
        options: more arguments of the recipe, as pairs.
        published: where the folders of those are that others published.
    """

    data: str
    family: str
    attack: str
    seed: int
    options: tuple[tuple[str, str], ...] = ()
    published: str | None = None

    @property
    def name(self) -> str:
        key = hashlib.sha256(repr(self.options).encode()).hexdigest()[:8]
        return f"{Path(self.data).name}-{self.family}-{self.attack}-{self.seed}-{key}"

    def command(self, folder: Path) -> list[str]:
        """The command that makes it."""
        chosen = {"dataset_name": self.data, "architecture": self.family, "attack": self.attack, "seed": self.seed}
        pairs = {**chosen, **dict(self.options), "output_dir": folder, "save_strategy": "no", "disable_tqdm": True}
        return [str(RECIPE), *(text for key, value in pairs.items() for text in (f"--{key}", str(value)))]


@dataclass(frozen=True)
class Method:
    """A purifier and its arguments.

    Attributes:
        name: in tables.
        purifier: `fip`, or a baseline's name.
        arguments: of its configuration, beside its defaults.
        adapter: of Fast FIP, which shifts singular values: the arguments of its `SingularValueConfig`.
        augment: shift the clean images at random (and mirror them, unless they are digits).
        disturb: disturb them at random (`hf_fip.tasks.augmentation.disturb`).
        learning_rates: the one with the best accuracy on held-out clean images is taken, when there are several.
    """

    name: str
    purifier: str = "fip"
    arguments: dict[str, Any] = field(default_factory=dict, hash=False)
    adapter: dict[str, Any] | None = field(default=None, hash=False)
    augment: bool = False
    disturb: bool = False
    learning_rates: tuple[float, ...] = ()


@dataclass(frozen=True)
class Cell:
    """One run: a victim, a method, how many clean images, and what is measured beside ACC, ASR and RA."""

    victim: Victim
    method: Method
    clean_samples: int | None = None  # what the victim kept aside
    typeset: bool = False  # the clean images are digits in print
    relearn: bool = False
    reactivate: bool = False

    @property
    def key(self) -> dict[str, Any]:
        """What identifies it in the results file: all its settings, but for where things lie on a disk."""
        key = asdict(self)
        victim, of_method = key["victim"], key["method"]
        victim["data"] = Path(victim["data"]).name
        victim["published"] = victim["published"] and Path(victim["published"]).name
        of_method["arguments"] = _settings(self.method)
        if of_method["adapter"]:
            of_method["adapter"] = _own_fields(SingularValueConfig, PeftConfig) | of_method["adapter"]
        return key


def _settings(of_method: Method) -> dict[str, Any]:
    """The arguments, and the defaults of the method's configuration where `TrainingArguments` has others or none."""
    if of_method.purifier == RELEASED:
        return {name: value for name, value in of_method.arguments.items() if name != "clone"}
    config = _classes(of_method.purifier)[1]
    return _own_fields(config, TrainingArguments) | of_method.arguments


def _own_fields(config: type, above: type) -> dict[str, Any]:
    """The defaults of a dataclass that the one above it has not, or has otherwise."""
    inherited = {one.name: one.default for one in fields(above)}
    own = {one.name: one.default for one in fields(config) if one.default is not MISSING}
    return {name: value for name, value in own.items() if name not in inherited or value != inherited[name]}


def _classes(purifier: str) -> tuple[type, type]:
    """A purifier's trainer, and its configuration."""
    return (FIPTrainer, FIPConfig) if purifier in (FIP, RELEASED) else method(purifier)


def make_victim(victim: Victim, work: Path) -> Path:
    """The folder of a victim, made now unless it is there.

    Raises:
        subprocess.CalledProcessError: when its training fails; its output says why.
    """
    folder = work / victim.name
    if victim.published:
        return Path(victim.published) / victim.attack
    if not (folder / "report.json").is_file():
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *victim.command(folder)]
        subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return folder


@dataclass
class _Given:
    """A victim in memory, with the images it is purified, measured and attacked again on."""

    model: nn.Module
    processor: Any
    attack: Attack | None
    images: LabelledImages  # `test` is measured on
    clean: Dataset
    rest: Dataset


def _load(cell: Cell, folder: Path) -> _Given:
    victim = cell.victim
    if victim.published:
        images = _images(victim.data, None, None, 0)
        model, processor, attack = load_published(folder)
        clean, test = split_clean(images.test, cell.clean_samples, victim.seed)
        return _Given(model, processor, attack, LabelledImages(images.train, test, images.name), clean, images.train)
    split, options = recorded_split(str(folder)), dict(victim.options)
    limits = (int(options[name]) if name in options else None for name in ("max_train_samples", "max_test_samples"))
    images = _images(victim.data, *limits, split["seed"])
    model, processor = load_image_classifier(str(folder))
    attack = None if victim.attack == "none" else load_attack(folder)
    clean, rest = split_clean(images.train, split["samples"], split["seed"])
    if cell.typeset:
        clean = typeset_digits(images.train)
    if cell.clean_samples is not None:
        clean, _ = split_clean(clean, cell.clean_samples, split["seed"])
    return _Given(model, processor, attack, images, clean, rest)


@lru_cache(maxsize=2)
def _images(data: str, train: int | None, test: int | None, seed: int) -> LabelledImages:
    return load_images(data, max_train_samples=train, max_test_samples=test, seed=seed)


def run(cell: Cell, work: Path) -> dict[str, Any]:
    """Purify and measure.

    Args:
        cell: what to run.
        work: where victims are kept.

    Returns:
        A row: `before` and `after` (ACC, ASR and RA in percent), `der`, `seconds`, `relearned` and so on. A method
        that diverges or is not defined for the model gives `failed`, the reason.
    """
    torch.set_num_threads(1)
    folder = make_victim(cell.victim, work)
    given = _load(cell, folder)
    row: dict[str, Any] = {"cell": cell.key, "versions": versions()}
    benign = None
    if cell.reactivate:
        benign = load_image_classifier(str(make_victim(replace(cell.victim, attack="none", options=()), work)))[0]
    try:
        return row | _purified(cell, given, benign, lambda: _load(cell, folder).model)
    except (FloatingPointError, ValueError) as error:
        return row | {"failed": str(error)}


def _purified(
    cell: Cell, given: _Given, benign: nn.Module | None, fresh_model: Callable[[], nn.Module]
) -> dict[str, Any]:
    channels = channels_of(given.model)
    test = make_test(given.images, given.attack, given.processor, channels)
    row = {"clean_samples": len(given.clean), "test_samples": len(given.images.test)}
    chosen = {}
    if cell.method.learning_rates:
        held_out, others = split_clean(given.clean, round(HELD_OUT * len(given.clean)), cell.victim.seed)
        validation = BackdoorTest(PixelDataset(held_out, given.processor, channels))
        tried = {}
        for rate in cell.method.learning_rates:
            trainer = _trainer(cell, given, fresh_model(), others, {"learning_rate": rate})
            trainer.train()
            tried[rate] = validation.measure(trainer)["accuracy"]
        chosen = {"learning_rate": max(tried, key=tried.get)}
        row |= chosen | {"validation_accuracy": tried}
    trainer = _trainer(cell, given, given.model, given.clean, chosen)
    row["before"] = test.measure(trainer)
    started, of_cpu = time.perf_counter(), time.process_time()
    _train(cell, trainer)
    row |= {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - of_cpu}
    row |= {"trained": _trained_numbers(trainer, cell.method.purifier)}
    row |= {"device": trainer.args.device.type, "after": test.measure(trainer)}
    row["der"] = None if given.attack is None else defense_effectiveness_rating(row["before"], row["after"])
    if given.attack is not None and (cell.relearn or cell.reactivate):
        relearned = _relearned(trainer.model, given, cell.victim.seed)
        row["relearned"] = test.measure(relearned)
        if cell.reactivate:
            row["reactivated"] = _reactivated(trainer, relearned.model, benign, given, test, cell.victim.seed)
    return row


def _trainer(cell: Cell, given: _Given, model: nn.Module, clean: Dataset, chosen: dict) -> FIPTrainer:
    method_, channels = cell.method, channels_of(model)
    trainer_class, config = _classes(method_.purifier)
    set_seed(cell.victim.seed)
    settings = {
        **SILENT,
        "seed": cell.victim.seed,
        **({} if method_.purifier == RELEASED else method_.arguments),
        **chosen,
    }
    return trainer_class(
        model,
        config(os.path.join(tempfile.gettempdir(), "study"), **settings),  # nothing is written there
        train_dataset=PixelDataset(clean, given.processor, channels),
        processing_class=given.processor,
        train_transform=both(
            augmentation(method_.augment, given.images),
            disturb(pixel_range(given.processor, given.images, channels)) if method_.disturb else None,
        ),
        peft_config=SingularValueConfig(**method_.adapter) if method_.adapter else None,
    )


def _train(cell: Cell, trainer: FIPTrainer) -> None:
    if cell.method.purifier == RELEASED:
        train_by_released_code(trainer.model, trainer.train_dataset, trainer._train_transform, **cell.method.arguments)
    else:
        trainer.train()


def _trained_numbers(trainer: FIPTrainer, purifier: str) -> int:
    if purifier == RELEASED:
        return sum(parameter.numel() for parameter in trainer.model.parameters())
    return trained_numbers(trainer.optimizer)


def _relearned(model: nn.Module, given: _Given, seed: int) -> Trainer:
    """The trainer of a copy that was fine-tuned with a few triggered images."""
    clean, triggered = _attackers(given, model, max(1, round(CLEAN_SHARE * len(given.rest))), TRIGGERED, seed)
    labels = given.attack.attack_label(triggered.labels, model.config.num_labels)
    arguments = RelearningConfig(os.path.join(tempfile.gettempdir(), "study"), seed=seed, disable_tqdm=True)
    trainer = relearning_trainer(model, clean, triggered, labels, arguments)
    trainer.train()
    return trainer


def _reactivated(
    trainer: FIPTrainer, relearned: nn.Module, benign: nn.Module, given: _Given, test: BackdoorTest, seed: int
) -> dict[str, float]:
    """ACC, ASR and RA under a perturbation that was learned to wake the backdoor; and its ASR on a benign model."""
    model, channels = trainer.model, channels_of(trainer.model)
    pixels = pixel_range(given.processor, given.images, channels)
    drawn = _attackers(given, model, SAMPLES, SAMPLES, seed)
    perturbation = reactivate(model, relearned, *drawn, pixels, benign=benign, seed=seed)
    clean, triggered = (Perturbed(part, perturbation, pixels) for part in (test.clean, test.triggered))
    perturbed = BackdoorTest(clean, triggered, test.attack_labels)
    return perturbed.measure(trainer) | {"benign_asr": perturbed.measure(Trainer(benign, trainer.args))["asr"]}


def _attackers(given: _Given, model: nn.Module, clean: int, triggered: int, seed: int) -> list[PixelDataset]:
    parts = attackers_images(given.rest, given.attack, clean, triggered, seed)
    return [PixelDataset(part, given.processor, channels_of(model)) for part in parts]
