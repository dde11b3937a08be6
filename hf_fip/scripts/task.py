"""What one kind of model and data brings to the flow that all tasks share: `backdooring` and `purification`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Protocol

from datasets import Dataset
from torch import nn

from ..attacks import Attack
from ..baselines import method_names
from ..config import FIPConfig
from ..evaluation.backdoor import BackdoorTest
from ..hub.card import CardWords
from ..trainer import FIPTrainer
from .arguments import (
    FIP,
    AttackArguments,
    DataArguments,
    LoadArguments,
    MethodArguments,
    ModelArguments,
    PoisonArguments,
    VictimConfig,
)


class Data(Protocol):
    """A data set as a task loads it."""

    train: Dataset
    test: Dataset
    name: str


class Task(ABC):
    """A task: its words, its kinds of arguments and trainer, and its steps. It holds no state.

    Everywhere `processor` is what prepares inputs and is saved with the model (an image processor, a tokenizer), or
    None; `data` is what `load_data` and `match` gave.
    """

    metric: ClassVar[str] = "accuracy"  # the task's own, among `METRICS`
    words: ClassVar[CardWords]
    data_arguments: ClassVar[type[DataArguments]]
    attack_arguments: ClassVar[type[AttackArguments]]
    poison_arguments: ClassVar[type[PoisonArguments]]  # the same where a victim is trained
    load_arguments: ClassVar[type[LoadArguments]]
    model_arguments: ClassVar[type[ModelArguments]]  # the same where a victim may have to be made
    method_arguments: ClassVar[type[MethodArguments]] = MethodArguments
    config: ClassVar[type[FIPConfig]] = FIPConfig
    victim_config: ClassVar[type[VictimConfig]] = VictimConfig
    trainer: ClassVar[type] = FIPTrainer
    methods: ClassVar[tuple[str, ...]] = (FIP, *method_names())  # purifiers that are defined for it
    defaults: ClassVar[dict[str, Any]] = {}  # of both configs, after `COMMON_DEFAULTS`

    # Data

    @abstractmethod
    def load_data(self, arguments: DataArguments, seed: int) -> Data:
        """The training and test data the arguments name; `seed` decides what is random about it."""

    def match(self, data: Data, model: nn.Module) -> Data:
        """The data with their classes numbered as the model numbers them; ValueError when the model is of others."""
        return data

    def reading(self, data: Data) -> AbstractContextManager:
        """What to read samples in that nobody has read before: it makes errors of the readers ValueErrors."""
        return nullcontext()

    @abstractmethod
    def inputs(self, dataset: Dataset, model: nn.Module, processor):
        """A part of the data (or of a poisoned set) as what a trainer takes as its data set."""

    # Models

    @abstractmethod
    def load_model(self, place: str, arguments: LoadArguments, **options) -> tuple[nn.Module, Any]:
        """The model at a Hub id or path, and its processor; `options`: `revision`, and an adapter's `base_model`."""

    @abstractmethod
    def new_model(self, arguments: ModelArguments, data: Data) -> tuple[nn.Module, Any]:
        """A small untrained model for these data, and its processor."""

    def trainer_options(self, model: nn.Module, processor) -> dict[str, Any]:
        """What every trainer of this task takes beside model, arguments and data: a collator, a likelihood."""
        return {}

    def augmentation(self, arguments: ModelArguments, data: Data) -> Callable[[dict], dict] | None:
        """The `train_transform` for victim and purification; None where `--augment` was not given."""
        return None

    def disturbance(
        self, arguments: MethodArguments, data: Data, model: nn.Module, processor
    ) -> Callable[[dict], dict] | None:
        """What else changes the clean samples while a model is purified; None where nothing does."""
        return None

    # The attack

    @abstractmethod
    def attack(self, arguments: AttackArguments, model_folder: str | None, data: Data) -> Attack | None:
        """The attack that the arguments name, else the one in the model's folder (`recorded.attack_of`), or None."""

    def material(self, dataset: Dataset, model: nn.Module, processor, **options) -> Any:
        """What `attack.fit` works with. `options`: `clean_model` (makes one), `device`, `progress`."""
        return None

    @abstractmethod
    def poison(self, dataset: Dataset, attack: Attack, rate: float, seed: int) -> Dataset:
        """The poisoned training set."""

    def victim_trainer(self, attack: Attack | None, material: Any) -> Callable[..., FIPTrainer]:
        """What makes the trainer of a victim. An attack that changes the training has a trainer of its own."""
        return self.trainer

    # Measuring

    @abstractmethod
    def clean_test(self, dataset: Dataset, model: nn.Module, processor) -> BackdoorTest:
        """The test of the task's metric alone, on a part of the data."""

    @abstractmethod
    def test(self, data: Data, attack: Attack | None, model: nn.Module, processor) -> BackdoorTest:
        """The test of the task's metric and, with an attack, of ASR, on the test data. Its `measure` gives a dict.

        The keys, in order, are `metric`, `asr` and, where it is defined, `ra`, in percent; None for what cannot be
        measured.
        """

    @abstractmethod
    def draw(self, path: Path, data: Data, attack: Attack, model: nn.Module, answers: dict[str, dict]) -> Path:
        """Draw clean and triggered samples.

        Args:
            answers: for each moment (`answer`, or `before` and `after`) the test's `answers`.
        """
