"""The mean loss of a model over all samples of all batches and processes, at whatever size of batch fits in memory.

The model is in eval mode: dropout is off and BatchNorm uses its running statistics, so that the loss does not depend
on how the samples are split.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..fisher.likelihood import IGNORE_INDEX, Likelihood, TokenSequence, infer_likelihood
from ..fisher.passes import RandomState, in_eval_mode, preserved_buffers
from ..fisher.scores import Batch, split_batch


@dataclass
class Part:
    """Rows of one batch that go through the model together."""

    batch: dict[str, Any]
    labels: Any
    gradient: tuple[Tensor, ...] | None = None  # ∇L of the part with its graph, when that is kept

    @property
    def rows(self) -> int:
        return len(self.labels)

    def select(self, rows: slice) -> Part:
        """Some of the rows; what the batch holds once for all of them stays whole."""

        def cut(value):
            has_rows = isinstance(value, list) or (isinstance(value, Tensor) and value.ndim)
            return value[rows] if has_rows and len(value) == self.rows else value

        return Part({name: cut(value) for name, value in self.batch.items()}, self.labels[rows])


class MeanLoss:
    """The mean loss L(θ), and sums over batches and processes of what is made from it.

    The model is left as it was: weights, buffers, `.grad`, train mode and torch's random state do not change. When
    memory runs out the batches are halved, down to one sample.

    Args:
        model: any module. Without `likelihood`, L is the `loss` that it returns when it gets labels; for a module that
            returns none, the mean over samples of −log p of the inferred likelihood.
        batches: inputs and labels, without augmentation; moved to the model's device one by one.
        likelihood: p_θ(y|x): L is then the mean over samples of −log p_θ(y|x), in nats.
        label_name: the key of the labels in a batch.
        reduce: sums a tensor over all processes in place, each of which has batches of its own; None for one process.

    Attributes:
        samples: rows over all processes.

    Raises:
        ValueError: when there is no sample, or a batch has no labels.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        *,
        likelihood: Likelihood | None = None,
        label_name: str = "labels",
        reduce: Callable[[Tensor], Any] | None = None,
    ):
        self.model, self.label_name, self.reduce = model, label_name, reduce
        self.device = next(model.parameters()).device
        self.dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
        self._model_has_loss = likelihood is None and _takes(model, label_name)
        self.likelihood = likelihood or infer_likelihood(model)
        self._parts = [part for batch in batches if self._terms(part := self._part(batch))]
        counts = torch.tensor([sum(part.rows for part in self._parts), sum(map(self._terms, self._parts))])
        counts = counts.to(self.device)
        if reduce is not None:
            reduce(counts)
        self.samples, self._total_terms = counts.tolist()
        if not self._total_terms:
            raise ValueError("The loss needs at least one sample with a label, and the data were empty.")

    def value(self) -> float:
        """L(θ), in nats."""
        return self._mean(self._detached_loss).item()

    def _detached_loss(self, part: Part) -> Tensor:
        with torch.no_grad():
            return self._loss(part)

    def _part(self, batch: Batch) -> Part:
        if self.label_name not in batch:
            raise ValueError(f"The batch has no {self.label_name!r} (it has: {', '.join(batch)}).")
        return Part(dict(batch), batch[self.label_name])

    def _terms(self, part: Part) -> int:
        """How many terms the mean loss is over: tokens that are not masked for the model's own, samples otherwise."""
        if not (self._model_has_loss and isinstance(self.likelihood, TokenSequence)):
            return part.rows
        predicted = part.labels[:, 1:] if self.likelihood.shift else part.labels
        return int((predicted != IGNORE_INDEX).sum())

    def _loss(self, part: Part) -> Tensor:
        """The sum over the part's terms of the loss."""
        batch = {name: _to(value, self.device) for name, value in part.batch.items()}
        if self._model_has_loss:
            outputs = self.model(**batch)
            loss = outputs.get("loss") if isinstance(outputs, dict) else getattr(outputs, "loss", None)
            if loss is not None:
                return loss.to(self.dtype) * self._terms(part)
        inputs, labels = split_batch(self.model, batch, self.label_name)
        outputs = self.model(**inputs)
        logits, labels = self.likelihood.logits(outputs), self.likelihood.targets(outputs, labels)
        return -self.likelihood.log_prob(logits, labels).sum().to(self.dtype)

    # Sums over parts and processes

    def _mean(self, compute: Callable[[Part], Tensor]) -> Tensor:
        """Σ compute(part) over all parts and processes, divided by the number of terms; halves what does not fit."""
        total, place = None, 0
        while place < len(self._parts):
            part, value = self._parts[place], None
            try:
                with self._at_rest():
                    value = compute(part)
            except RuntimeError as error:
                if not _out_of_memory(error):
                    raise
                failure = str(error)
            if value is None:  # outside `except`, where the error no longer holds the memory of the failed pass
                if not self._release() and not self._halve(place):
                    raise torch.OutOfMemoryError(f"One sample does not fit in memory: {failure}")
                if self.device.type != "cpu":
                    torch.get_device_module(self.device).empty_cache()
                continue
            total = value if total is None else total.add_(value)
            place += 1
        if self.reduce is not None:
            self.reduce(total)
        return total.div_(self._total_terms)

    def _release(self) -> bool:
        """Let go of what is held only to save time; whether there was anything."""
        return False

    def _halve(self, place: int) -> bool:
        """Cut a part, and those of its size after it, in two; whether that was possible."""
        rows = self._parts[place].rows
        cuts = (slice(rows // 2), slice(rows // 2, None))
        halved = []
        for part in self._parts[place:]:
            halved += [part.select(cut) for cut in cuts] if part.rows == rows else [part]
        self._parts[place:] = [part for part in halved if self._terms(part)]
        return rows > 1

    @contextmanager
    def _at_rest(self) -> Iterator[None]:
        """Passes in eval mode on kernels with a second derivative, which move neither buffers nor random state."""
        with (
            in_eval_mode(self.model),
            preserved_buffers(self.model),
            RandomState.capture(self.device).replayed(),
            sdpa_kernel(SDPBackend.MATH),
            torch.enable_grad(),
        ):
            yield


def _takes(model: nn.Module, name: str) -> bool:
    """Whether the model's forward, or that of the model inside an adapter, takes an argument of this name."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    parameters = inspect.signature(base.forward).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _to(value: Any, device: torch.device) -> Any:
    """Tensors on the device, also those in lists and dictionaries, as labels of object detection are."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, list):
        return [_to(item, device) for item in value]
    return {name: _to(item, device) for name, item in value.items()} if isinstance(value, dict) else value


def _out_of_memory(error: RuntimeError) -> bool:
    """torch has no one class for it on CPU."""
    known = isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)
    return known or "not enough memory" in str(error)
