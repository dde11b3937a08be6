"""What lets a second pass through a model leave no mark: weights, buffers, random state and train mode come back.

Each is a context manager that restores on every way out, an exception and Ctrl-C included.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from .sharded import is_sharded


@contextmanager
def displaced(parameters: Sequence[Tensor], direction: Sequence[Tensor], step: float) -> Iterator[None]:
    """Run with the parameters at θ + step · direction.

    The parameters point to new storage meanwhile and back to their own afterwards: θ itself is never written, so it
    returns bit for bit. Sharded parameters are written, and then again from a copy, as FSDP holds on to their storage.
    Takes one extra copy of the parameters.
    """
    received = [(p, p.data.clone() if is_sharded(p) else p.data) for p in parameters]
    try:
        for parameter, towards in zip(parameters, direction, strict=True):
            if is_sharded(parameter):
                parameter.data.add_(towards, alpha=step)
            else:
                parameter.data = torch.add(parameter.data, towards, alpha=step)
        torch.clear_autocast_cache()  # inside one `torch.autocast` block it would go on serving casts of θ
        yield
    finally:
        for parameter, data in received:
            if is_sharded(parameter):
                parameter.data.copy_(data)
            else:
                parameter.data = data
        torch.clear_autocast_cache()


@contextmanager
def preserved_buffers(model: nn.Module) -> Iterator[None]:
    """Run without moving any buffer: BatchNorm statistics, counters, whatever a forward pass would update.

    As in `displaced`, the buffers point to copies meanwhile and the originals are never written. A module may also put
    a new tensor in a buffer's place (`self.mean = 0.9 * self.mean + …`): the first one comes back.
    """
    places = [(module, name, buffer) for module in model.modules() for name, buffer in module._buffers.items()]
    received = [(buffer, buffer.data) for _, _, buffer in places if buffer is not None]
    try:
        for buffer, data in received:
            buffer.data = data.clone()
        yield
    finally:
        for buffer, data in received:
            buffer.data = data
        for module, name, buffer in places:
            module._buffers[name] = buffer


@dataclass(frozen=True)
class RandomState:
    """The state of torch's generators on CPU and on the model's device, of NumPy's and of Python's.

    The first two decide every dropout mask; models of speech mask spans of their input by NumPy's (SpecAugment).
    """

    cpu: Tensor
    device: torch.device
    accelerator: Tensor | None
    numpy: tuple
    python: tuple

    @classmethod
    def capture(cls, device: torch.device | str = "cpu") -> RandomState:
        device = torch.device(device)
        on_device = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
        return cls(torch.get_rng_state(), device, on_device, np.random.get_state(), random.getstate())

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None:
            torch.get_device_module(self.device).set_rng_state(self.accelerator, self.device)
        np.random.set_state(self.numpy)
        random.setstate(self.python)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Run from this state, then go back to the state found on entry."""
        found = RandomState.capture(self.device)
        self.restore()
        try:
            yield
        finally:
            found.restore()


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Run with the whole model in eval mode; every module then gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
