"""Work shared among the processes of a launcher."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

if TYPE_CHECKING:
    from .fisher.scores import Batch


def are_on_cpu() -> bool:
    """Whether a launcher started several processes where there is no accelerator.

    Accelerate has to be told (`use_cpu`, `PartialState(cpu=True)`), or each of them works by itself.
    """
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.accelerator.is_available()


def share(batches: Sequence[Batch]) -> list[Batch]:
    """Those of the batches that this process measures; `sum_over_processes` then is the `reduce` to pass.

    Raises:
        ValueError: for fewer batches than processes.
    """
    state = PartialState()
    if len(batches) < state.num_processes:
        raise ValueError(
            f"There are {len(batches)} batches for {state.num_processes} processes: make them smaller, so that each "
            "process has one."
        )
    return list(batches[state.process_index :: state.num_processes])


def any_process(condition: bool, device: torch.device) -> bool:
    """Whether a condition holds on any process; `device` is where the processes' tensors are."""
    if not _are_several():
        return condition
    return bool(sum_over_processes(torch.tensor(float(condition), device=device)) > 0)


def sum_over_processes(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes in place; with one process it stays as it is."""
    if _are_several():
        dist.all_reduce(tensor)
    return tensor


def _are_several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
