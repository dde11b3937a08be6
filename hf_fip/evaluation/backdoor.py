"""A model's ACC, ASR and RA, and how they move along a purification: measured, never read to choose anything."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import Subset
from transformers import TrainerCallback

from ..fisher.passes import RandomState
from .metrics import accuracy, answers_of, attack_success_rate, robust_accuracy
from .sealed import SealedDataset

if TYPE_CHECKING:
    from transformers import Trainer


@dataclass
class BackdoorTest:
    """The test sets of one attack on a classifier. That of another task is a subclass with its own `_measure`.

    Attributes:
        clean: model inputs with true labels.
        triggered: the same kind, with the trigger; those whose true class the attacker wants do not count. None when
            no attack is known.
        attack_labels: `(len(triggered),)`, what the attacker wants.
    """

    clean: torch.utils.data.Dataset
    triggered: torch.utils.data.Dataset | None = None
    attack_labels: np.ndarray | None = None
    answers: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    def __post_init__(self):
        if self.attack_labels is not None:
            self.attack_labels = np.asarray(self.attack_labels)

    def measure(self, trainer: Trainer) -> dict[str, float | None]:
        """`accuracy`, `asr` and `ra` in percent (None without an attack); the answers are kept in `answers`.

        Uses the trainer's own prediction loop, so it is distributed as the training is. The random state of torch is
        left as it was, so that measuring does not change what training does.
        """
        with RandomState.capture(trainer.args.device).replayed():
            return self._measure(trainer)

    def _measure(self, trainer: Trainer) -> dict[str, float | None]:
        answers, labels = _answers(trainer, SealedDataset(self.clean))
        self.answers = {"clean": answers}
        result = {"accuracy": accuracy(answers, labels), "asr": None, "ra": None}
        if self.triggered is not None:
            answers, labels = _answers(trainer, SealedDataset(self.triggered, self.attack_labels))
            self.answers["triggered"] = answers
            result["asr"] = attack_success_rate(answers, self.attack_labels, labels)
            result["ra"] = robust_accuracy(answers, labels, self.attack_labels)
        return result

    def counted_for_asr(self) -> int | None:
        """How many inputs (or objects in them) ASR is a share of; None without an attack."""
        return None if self.triggered is None else self._counted()

    def _counted(self) -> int:
        return int((_labels_of(self.triggered) != self.attack_labels).sum())

    def part(self, samples: int, seed: int = 0) -> BackdoorTest:
        """A test on a random part of at most so many inputs of each kind."""

        def rows(dataset) -> list[int]:
            return sorted(np.random.default_rng(seed).permutation(len(dataset))[:samples].tolist())

        clean = Subset(self.clean, rows(self.clean))
        if self.triggered is None:
            return replace(self, clean=clean, answers={})
        chosen = rows(self.triggered)
        triggered, attack_labels = Subset(self.triggered, chosen), self.attack_labels[chosen]
        return replace(self, clean=clean, triggered=triggered, attack_labels=attack_labels, answers={})


class PurificationCurve(TrainerCallback):
    """Records ACC (or the task's own metric) and ASR during training for a picture.

    They go to the trainer's `log_history` as `curve_accuracy` and `curve_asr`, which nothing can choose a model by:
    they are no evaluation metrics. A checkpoint keeps them. Set `trainer` before training.

    Raises:
        ValueError: (when training begins) `trainer` is not set.

    Args:
        test: what to measure on (a part of the test set will do).
        points: measurements over the whole training, evenly spaced, beside the one before it.

    Attributes:
        seconds: what measuring took.
    """

    def __init__(self, test: BackdoorTest, points: int = 20):
        self.test, self.points = test, points
        self.trainer: Trainer | None = None
        self.seconds = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        if self.trainer is None:
            raise ValueError("PurificationCurve measures by a trainer: set its `trainer` before training.")
        if state.global_step == 0:
            self._record(state)

    def on_step_end(self, args, state, control, **kwargs):
        every = max(1, round(state.max_steps / self.points))
        if state.global_step % every == 0 or state.global_step == state.max_steps:
            self._record(state)

    def _record(self, state) -> None:
        started = time.perf_counter()
        measured = self.test.measure(self.trainer)
        row = {f"curve_{key}": value for key, value in measured.items() if key != "ra" and value is not None}
        state.log_history.append({"step": state.global_step, **row})
        self.seconds += time.perf_counter() - started


def _labels_of(dataset) -> np.ndarray:
    if isinstance(dataset, Subset):
        return _labels_of(dataset.dataset)[dataset.indices]
    labels = getattr(dataset, "labels", None)
    return np.asarray([row["labels"] for row in dataset] if labels is None else labels)


def _answers(trainer: Trainer, dataset) -> tuple[np.ndarray, np.ndarray]:
    output = trainer.predict(dataset)
    return answers_of(output.predictions), output.label_ids
