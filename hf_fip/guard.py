"""What keeps a long training whole: updates that are not finite are dropped, and signals end it at a checkpoint."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from transformers import TrainerCallback

from .processes import any_process

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class UpdateGuard:
    """Takes back an update whose gradient is not finite, and counts.

    The norm of the gradient, which decides, is the same on all processes.

    Attributes:
        dropped: updates that were taken back.
        fault: what was seen to go wrong in the present update, on this process.
    """

    def __init__(self):
        self.dropped = self._in_a_row = 0
        self.fault: str | None = None
        self._buffers: list[tuple[torch.Tensor, torch.Tensor]] = []

    def begin(self, model: nn.Module) -> None:
        """Remember what the forward passes of an update change: running statistics."""
        self.fault = None
        self._buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]

    def note(self, fault: str) -> None:
        """Note what went wrong first."""
        self.fault = self.fault or fault

    def finish(self, model: nn.Module, optimizers: list[Optimizer], grad_norm: float, step: int, allowed: int) -> None:
        """Drop the update unless its gradient is finite: no parameter, momentum or running statistic moves.

        Args:
            optimizers: of the model's parameters, or of others (masks of them, for example, or an attack's trigger).
            grad_norm: of the model's.

        Raises:
            FloatingPointError: more than `allowed` updates in a row were to be dropped.
        """
        if math.isfinite(grad_norm) and math.isfinite(get_total_norm(_other_gradients(model, optimizers))):
            self._in_a_row = 0
            return
        model.zero_grad()
        for optimizer in optimizers:
            optimizer.zero_grad()
        with torch.no_grad():
            for buffer, value in self._buffers:
                buffer.copy_(value)
        if self._in_a_row >= allowed:
            before = f", as in the {allowed} updates before, which were dropped" if allowed else ""
            raise FloatingPointError(
                f"{self.fault or 'The gradient is not finite'} at step {step}{before}: lower the learning rate or "
                "eta_f, and check the data for invalid values."
            )
        self._in_a_row += 1
        self.dropped += 1


def _other_gradients(model: nn.Module, optimizers: list[Optimizer]) -> list[torch.Tensor]:
    """Of what the optimizers step that is no parameter of the model."""
    own = set(model.parameters())
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    stepped = [parameter for group in groups for parameter in group["params"]]
    return [parameter.grad for parameter in stepped if parameter.grad is not None and parameter not in own]


class StopAtCheckpoint(TrainerCallback):
    """On Ctrl-C or SIGTERM: the update is finished, a checkpoint is written, and then the signal has its effect.

    A signal to one process ends all of them at the same update. A second signal has its effect at once. A training
    within another one is finished: the outer one listens for both.

    Attributes:
        received: the signal, or None.
    """

    _one_listens: ClassVar[bool] = False

    def __init__(self):
        self.received: int | None = None
        self._found: dict[int, object] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note signals in place of what is usually done on them; then do that."""
        self.received = None
        is_main = threading.current_thread() is threading.main_thread()  # which alone may listen
        if not is_main or StopAtCheckpoint._one_listens:
            yield
            return
        heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # as under nohup
        self._found = {number: signal.signal(number, self._note) for number in heard}
        StopAtCheckpoint._one_listens = True
        try:
            yield
        finally:
            StopAtCheckpoint._one_listens = False
            self._restore()
        if self.received is not None:
            signal.raise_signal(self.received)

    def _note(self, number: int, frame) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._found.items():
            signal.signal(number, handler)
        self._found = {}

    def on_step_end(self, args, state, control, **kwargs):
        if any_process(self.received is not None, args.device):
            self.received = self.received or signal.SIGTERM  # it was another process that received one
            control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        if self.received is not None:  # only now: a run that goes on from this checkpoint is not to stop
            control.should_training_stop = True
