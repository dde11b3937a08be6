"""Work shared among the processes of a launcher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

if TYPE_CHECKING:
    from .fisher.scores import Batch


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


def sum_over_processes(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes in place; with one process it stays as it is."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor
