"""A training batch of one sample: BatchNorm cannot norm a single value a channel by its own spread, as it has none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers.trainer_pt_utils import find_batch_size


@contextmanager
def lone_sample(model: nn.Module, inputs: Mapping[str, Any]) -> Iterator[None]:
    """Run a batch of one with the running statistics wherever a BatchNorm layer of `model` gets one value a channel.

    There torch would raise "Expected more than 1 value per channel when training". Statistics of that layer stay. All
    other layers (with larger maps) and larger batches are as ever. SyncBatchNorm is left out: its processes meet in
    the forward pass.
    """
    normed: list[nn.Module] = []

    def before(layer: nn.Module, given: tuple) -> None:
        if layer.training and given and given[0].numel() == layer.num_features:
            layer.training = False
            normed.append(layer)

    def after(layer: nn.Module, given: tuple, output: Any) -> None:
        if layer in normed:
            layer.training = True
            normed.remove(layer)

    modules = model.modules() if find_batch_size(inputs) == 1 else ()
    layers = [m for m in modules if isinstance(m, _BatchNorm) and not isinstance(m, nn.SyncBatchNorm)]
    hooks = [layer.register_forward_pre_hook(before) for layer in layers]
    hooks += [layer.register_forward_hook(after, always_call=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
