"""λ_max and Tr H along a training, of a purification or of a victim."""

from __future__ import annotations

import time
from collections.abc import Iterable

from transformers import TrainerCallback

from ..fisher.passes import RandomState
from ..fisher.scores import Batch
from ..processes import share, sum_over_processes
from .measure import measure_curvature

KEYS = ("loss", "lambda_max", "trace", "trace_error")


class CurvatureCallback(TrainerCallback):
    """Measures the curvature before the first step, after every so many, and after the last.

    The figures go to the trainer's `log_history` as `curvature_loss`, `curvature_lambda_max`, `curvature_trace` and
    `curvature_trace_error`, which a checkpoint keeps and nothing can choose a model by. Training goes on as if nothing
    had been measured: weights, buffers, gradients, random state and train mode are as they were.

    Args:
        batches: what to measure on: dictionaries of inputs and labels, or a `DataLoader` of them, read once. Without
            augmentation. Several processes share them.
        every: steps from one measurement to the next.
        options: of `measure_curvature`.

    Attributes:
        seconds: what measuring took.

    Raises:
        ValueError: when `every` is below 1, or (in training) there are fewer batches than processes.
    """

    def __init__(self, batches: Iterable[Batch], every: int = 50, **options):
        if every < 1:
            raise ValueError(f"every={every} has to be at least 1.")
        with RandomState.capture().replayed():  # a DataLoader draws a seed
            self.batches = list(batches)
        self.every, self.options = every, options
        self.seconds = 0.0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            self._record(model, state)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0:
            self._record(model, state)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every:
            self._record(model, state)

    def _record(self, model, state) -> None:
        started = time.perf_counter()
        own = share(self.batches)
        found = measure_curvature(model, own, reduce=sum_over_processes, **self.options).to_dict()
        row = {f"curvature_{key}": found[key] for key in KEYS}
        state.log_history.append({"step": state.global_step, "epoch": state.epoch, **row})
        self.seconds += time.perf_counter() - started
