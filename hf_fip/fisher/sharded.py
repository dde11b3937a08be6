"""Parameters that are sharded over processes (FSDP2, tensors of type `DTensor`).

Each process gathers a layer's weights for its passes, and `backward` averages their gradients over the processes into
the shards. `torch.autograd.grad` knows nothing of that and gives None for every shard, so what the Fisher needs of
sharded parameters is collected in `.grad` (see `scores.add_score`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is sharded over processes."""
    module = sys.modules.get("torch.distributed.tensor")  # heavy, and there whenever a tensor of it is
    return module is not None and isinstance(tensor, module.DTensor)


def any_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether one of the tensors is sharded over processes."""
    return any(map(is_sharded, tensors))


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor, or a sum over shards, as every process's own; any other as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def averaging_processes(parameters: Sequence[Tensor]) -> int:
    """Over how many processes `backward` averages the gradients of these parameters; 1 when they are not sharded.

    Raises:
        ValueError: when only some of them are sharded.
    """
    sharded = [parameter for parameter in parameters if is_sharded(parameter)]
    if not sharded:
        return 1
    if len(sharded) < len(parameters):
        raise ValueError(
            f"{len(parameters) - len(sharded)} of {len(parameters)} trainable parameters are not sharded, whose "
            "gradients FSDP leaves to each process: shard or freeze them (no ignored modules)."
        )
    return sharded[0].device_mesh.size()


def reshard(model: nn.Module) -> None:
    """Give back the weights that a forward pass without a backward pass has left gathered."""
    for module in model.modules():
        if hasattr(module, "set_reshard_after_backward"):  # of an FSDPModule
            module.reshard()


@contextmanager
def squared_gradients(model: nn.Module) -> Iterator[None]:
    """Run so that a backward pass squares each process's own gradients before they are averaged."""
    hooked, handles = set(), []

    def hook(module: nn.Module, _) -> None:  # its weights have just been gathered
        for parameter in module.parameters():
            if parameter.requires_grad and not is_sharded(parameter) and id(parameter) not in hooked:
                hooked.add(id(parameter))
                handles.append(parameter.register_hook(Tensor.square))

    for module in model.modules():
        if hasattr(module, "set_reshard_after_backward"):
            handles.append(module.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
