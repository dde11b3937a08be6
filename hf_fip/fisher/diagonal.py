"""diag F̄: the mean over samples of the squared score, at the weights as received.

    F̄_ii = (1/N) Σ_n (∂ log p_θ̄(y_n|x_n) / ∂θ_i)²

It weighs the pull to the received weights (η_r / 2) Σ_i F̄_ii (θ_i − θ̄_i)², which retains clean knowledge. The mean of
squares, not the square of the mean. Source: Karim et al., CCS 2024.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .likelihood import Likelihood, infer_likelihood
from .passes import in_eval_mode, preserved_buffers
from .scores import (
    Batch,
    add_score,
    labels_from_outputs,
    per_sample_scores,
    score_labels,
    split_batch,
    trainable_parameters,
)
from .sharded import averaging_processes, squared_gradients
from .trace import LABELS


def fisher_diagonal(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    likelihood: Likelihood | None = None,
    labels: str = "sampled",
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
    label_name: str = "labels",
    reduce: Callable[[Tensor], Any] | None = None,
) -> dict[str, Tensor]:
    """diag F̄ over all samples of `batches`, in eval mode (dropout off, BatchNorm on its running statistics).

    Args:
        model: any module with a `.logits` output. Left as it was.
        batches: batches of inputs and labels, on the model's device, without augmentation.
        likelihood: p_θ(y|x); by default inferred from the model's config.
        labels: `sampled` (y ~ p_θ̄) or `empirical` (the clean label).
        generator: CPU generator of the sampled labels; torch's global one when left out.
        chunk_size: samples whose scores are held at once, chunk_size × the trainable parameters; by default, what
            fits in `SCORES_AT_ONCE` numbers.
        label_name: the key of the labels in a batch.
        reduce: sums a tensor over all processes in place; None for one process.

    Returns:
        For each trainable parameter's name, a float32 tensor of its shape, ≥ 0; of sharded parameters (FSDP) sharded
        as they are, and in their type.

    Raises:
        ValueError: for unknown `labels`, a single batch, a model without trainable parameters, no sample at all, or,
            with sharded parameters, none on one of the processes.
    """
    if isinstance(batches, Mapping):
        raise ValueError("diag F̄ takes several batches, and this is one: pass [batch].")
    if labels not in LABELS:
        raise ValueError(f"fisher_labels={labels!r} is not one of {', '.join(LABELS)}.")
    likelihood = likelihood or infer_likelihood(model)
    parameters = trainable_parameters(model)
    processes = averaging_processes(list(parameters.values()))
    if processes > 1:
        samples = _one_by_one(model, batches, label_name)
        squares, count = _squares_of_shards(model, samples, likelihood, labels, generator, reduce, processes)
    else:
        squares = [torch.zeros_like(p, dtype=torch.float32) for p in parameters.values()]
        count = torch.zeros((), device=squares[0].device)
        with in_eval_mode(model):
            for batch in batches:
                inputs, clean = split_batch(model, batch, label_name)
                targets = score_labels(model, likelihood, inputs, clean, labels, generator)
                for scores in per_sample_scores(model, likelihood, inputs, targets, chunk_size=chunk_size):
                    for total, score in zip(squares, scores, strict=True):
                        total += score.detach().float().square().sum(0)
                count += targets.shape[0]
        for tensor in (count, *squares) if reduce is not None else ():
            reduce(tensor)
    if not count:
        raise ValueError("diag F̄ needs at least one sample, and the data were empty.")
    return {name: total / count for name, total in zip(parameters, squares, strict=True)}


def _one_by_one(model: nn.Module, batches: Iterable[Batch], label_name: str) -> Iterator[tuple[dict[str, Any], Any]]:
    """The inputs and clean labels of each sample, as a batch of one."""
    for batch in batches:
        inputs, clean = split_batch(model, batch, label_name)
        for row in range(len(clean)):
            part = slice(row, row + 1)
            one = {k: v[part] if isinstance(v, Tensor) and len(v) == len(clean) else v for k, v in inputs.items()}
            yield one, clean[part]


def _squares_of_shards(
    model, samples, likelihood, labels, generator, reduce, processes
) -> tuple[list[Tensor], Tensor]:
    """Σ s² of sharded parameters, and the number of samples: one on each process at a time.

    All processes take part in every pass: one that has no sample left repeats its last one with a weight of zero.
    """
    parameters = list(trainable_parameters(model).values())
    squares, count, sample = [None] * len(parameters), 0.0, None
    with in_eval_mode(model), preserved_buffers(model), squared_gradients(model), torch.enable_grad():
        while True:
            following = next(samples, None)
            there = torch.tensor(float(following is not None), device=parameters[0].device)
            reduce(there)
            if sample is None and there < processes:
                raise ValueError(f"diag F̄ needs at least one sample on each of the {processes} processes.")
            if not there:
                return [total / processes for total in squares], count
            count = count + there
            sample = following or sample
            inputs, clean = sample
            outputs = model(**inputs)
            targets = labels_from_outputs(likelihood, outputs, clean, labels, generator)
            log_prob = likelihood.log_prob(likelihood.logits(outputs), targets).sum()
            squares = add_score(log_prob * float(following is not None), parameters, squares)
