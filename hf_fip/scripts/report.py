"""What goes into report.json beside the measurements: cost, arguments, versions."""

from __future__ import annotations

import dataclasses
import platform
import resource
import sys
import time
from importlib.metadata import version
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

REPORT_NAME = "report.json"
_PLACES = (
    "output_dir",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "victims_dir",
    "disable_tqdm",
    "logging_dir",
)


def non_default(*groups) -> dict[str, Any]:
    """The arguments that differ from their defaults, of several dataclasses; places on disk are left out."""
    chosen = {}
    for group in groups:
        values = group.to_dict() if isinstance(group, TrainingArguments) else dataclasses.asdict(group)
        plain = type(group)(output_dir="x").to_dict() if isinstance(group, TrainingArguments) else None
        for field in dataclasses.fields(group):
            default = field.default if plain is None else plain.get(field.name)
            if field.name not in _PLACES and field.name in values and values[field.name] != default:
                chosen[field.name] = values[field.name]
    return chosen


def versions() -> dict[str, str]:
    """The versions that a figure depends on."""
    from .. import __version__

    libraries = ("torch", "transformers", "accelerate", "peft", "datasets")
    return {"hf_fip": __version__, **{name: version(name) for name in libraries}, "python": platform.python_version()}


class Cost:
    """Measures a training: `with Cost(model, device) as cost: …`, then `cost.report(steps)`."""

    def __init__(self, model: nn.Module, device: torch.device):
        self.model, self.device = model, device

    def __enter__(self) -> Cost:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._start = time.perf_counter()
        return self

    def __exit__(self, *error) -> None:
        self.seconds = time.perf_counter() - self._start

    def report(self, steps: int) -> dict[str, float]:
        """Seconds, seconds per step, trainable parameters, and peak memory in bytes: of the GPU, or of the process."""
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {
            "seconds": self.seconds,
            "seconds_per_step": self.seconds / max(1, steps),
            "trainable_parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            "peak_memory_bytes": peak,
        }
