"""What a training costs: seconds, peak memory, trainable parameters."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState


class Cost(TrainerCallback, ExportableState):
    """Measures a training as one of its callbacks; a run that was interrupted counts the parts that it kept.

    Args:
        excluded: gives the seconds spent so far on what is not training (measuring for a picture).
    """

    def __init__(self, excluded: Callable[[], float] = lambda: 0.0):
        self._excluded = excluded
        self._seconds = self._memory = 0  # of the parts before this one
        self._started: float | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        earlier = state.stateful_callbacks.setdefault(type(self).__name__, self.state())["attributes"]
        self._seconds, self._memory = earlier["seconds"], earlier["peak_memory_bytes"]
        self._device = args.device
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._started = time.perf_counter() - self._excluded()

    def on_train_end(self, args, state, control, optimizer=None, **kwargs):
        measured = self.state()["attributes"]
        self._started = None
        self.report = {
            "seconds": measured["seconds"],
            "seconds_per_step": measured["seconds"] / max(1, state.global_step),
            "trainable_parameters": trained_numbers(optimizer),
            "peak_memory_bytes": measured["peak_memory_bytes"],  # of a GPU; without one, of a whole process
            "processes": args.world_size,
        }

    def state(self) -> dict:
        """What a checkpoint keeps."""
        seconds, memory = self._seconds, self._memory
        if self._started is not None:
            seconds += time.perf_counter() - self._excluded() - self._started
            memory = max(memory, _peak_memory(self._device))
        return {"args": {}, "attributes": {"seconds": seconds, "peak_memory_bytes": memory}}


def trained_numbers(optimizer: torch.optim.Optimizer | None) -> int:
    """How many numbers an optimizer trains, which need not be parameters of a model; 0 without one."""
    groups = optimizer.param_groups if optimizer is not None else []
    return sum(tensor.numel() for group in groups for tensor in group["params"] if tensor.requires_grad)


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_process_memory()


def peak_process_memory() -> int:
    """The most memory this process has held, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux; there getrusage also counts what the parent process held before exec
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
