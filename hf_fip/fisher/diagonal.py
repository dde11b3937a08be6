"""diag F̄: the mean over samples of the squared score, at the weights as received.

    F̄_ii = (1/N) Σ_n (∂ log p_θ̄(y_n|x_n) / ∂θ_i)²

It weighs the pull to the received weights (η_r / 2) Σ_i F̄_ii (θ_i − θ̄_i)², which retains clean knowledge. The mean of
squares, not the square of the mean. Source: Karim et al., CCS 2024.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .likelihood import Likelihood, infer_likelihood
from .passes import in_eval_mode
from .scores import Batch, per_sample_scores, score_labels, split_batch, trainable_parameters
from .trace import LABELS


def fisher_diagonal(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    likelihood: Likelihood | None = None,
    labels: str = "sampled",
    generator: torch.Generator | None = None,
    chunk_size: int = 8,
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
        chunk_size: samples whose scores are held at once; memory is chunk_size × the trainable parameters.
        label_name: the key of the labels in a batch.
        reduce: sums a tensor over all processes in place; None for one process.

    Returns:
        For each trainable parameter's name, a float32 tensor of its shape, ≥ 0.

    Raises:
        ValueError: for unknown `labels`, a model without trainable parameters, or no sample at all.
    """
    if labels not in LABELS:
        raise ValueError(f"fisher_labels={labels!r} is not one of {', '.join(LABELS)}.")
    likelihood = likelihood or infer_likelihood(model)
    parameters = trainable_parameters(model)
    diagonal = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    count = torch.zeros((), device=next(iter(parameters.values())).device)
    with in_eval_mode(model):
        for batch in batches:
            inputs, clean = split_batch(model, batch, label_name)
            targets = score_labels(model, likelihood, inputs, clean, labels, generator)
            for scores in per_sample_scores(model, likelihood, inputs, targets, chunk_size=chunk_size):
                for total, score in zip(diagonal.values(), scores, strict=True):
                    total += score.detach().float().square().sum(0)
            count += targets.shape[0]
    if reduce is not None:
        for tensor in (count, *diagonal.values()):
            reduce(tensor)
    if not count:
        raise ValueError("diag F̄ needs at least one sample, and the data were empty.")
    return {name: total / count for name, total in diagonal.items()}
