"""Scores s = ∇_θ log p_θ(y|x): of every sample by itself, and summed over a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from .likelihood import Likelihood, get_logits

Batch = Mapping[str, Any]


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters the Fisher is taken over, by name: those that require a gradient, a tied one once.

    Raises:
        ValueError: when there are none.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("The model has no trainable parameter: unfreeze some (`requires_grad_(True)`).")
    return parameters


def split_batch(model: nn.Module, batch: Batch, label_name: str = "labels") -> tuple[dict[str, Any], Tensor]:
    """What the model's forward needs for its logits, and the clean labels.

    Labels are left out of the inputs, as no loss is wanted; an encoder-decoder model gets the decoder's inputs it
    would have made from them.

    Raises:
        ValueError: when the batch has no labels.
    """
    inputs = dict(batch)
    labels = inputs.pop(label_name, None)
    if labels is None:
        raise ValueError(f"The batch has no {label_name!r} (it has: {', '.join(batch)}).")
    shift_right = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift_right is None and hasattr(model, "get_base_model"):
        shift_right = getattr(model.get_base_model(), "prepare_decoder_input_ids_from_labels", None)
    if shift_right is not None and not {"decoder_input_ids", "decoder_inputs_embeds"} & inputs.keys():
        inputs["decoder_input_ids"] = shift_right(labels)
    return inputs, labels


def summed_score(
    log_prob: Tensor, parameters: list[Tensor], *, retain_graph: bool = False, create_graph: bool = False
) -> list[Tensor]:
    """∇_θ of a sum of log-likelihoods: one tensor a parameter, zero where the output does not depend on it."""
    gradients = torch.autograd.grad(
        log_prob, parameters, retain_graph=retain_graph or create_graph, create_graph=create_graph, allow_unused=True
    )
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]


def per_sample_scores(
    model: nn.Module,
    likelihood: Likelihood,
    inputs: Batch,
    labels: Tensor,
    *,
    chunk_size: int = 8,
    differentiable: bool = False,
) -> Iterator[list[Tensor]]:
    """The score of each sample by itself, a chunk of samples at a time.

    Uses `torch.func` (vmap of grad); a model that vmap cannot trace falls back to one backward pass a sample, which
    gives the same numbers. The model has to be in eval mode: BatchNorm would mix samples.

    Args:
        inputs: keyword arguments of the model's forward; tensors have the samples on their first axis.
        labels: labels of the scores, `(batch, …)`.
        chunk_size: samples held at once; memory is chunk_size × the trainable parameters.
        differentiable: keep the graph, so that a function of the scores can be differentiated again.

    Yields:
        For each chunk, one tensor `(samples, *parameter.shape)` a trainable parameter.
    """
    parameters = trainable_parameters(model)
    rows = labels.shape[0]
    batched = {k: v for k, v in inputs.items() if isinstance(v, Tensor) and v.ndim and v.shape[0] == rows}
    shared = {k: v for k, v in inputs.items() if k not in batched}

    def log_prob(values: dict[str, Tensor], sample: dict[str, Tensor], label: Tensor) -> Tensor:
        one_row = {name: tensor.unsqueeze(0) for name, tensor in sample.items()}
        outputs = functional_call(model, values, (), {**one_row, **shared})
        return likelihood.log_prob(get_logits(outputs), label.unsqueeze(0)).squeeze(0)

    values = dict(parameters) if differentiable else {name: p.detach() for name, p in parameters.items()}
    vectorised = vmap(grad(log_prob), in_dims=(None, 0, 0))
    use_vmap = True
    for start in range(0, rows, chunk_size):
        part = slice(start, start + chunk_size)
        sample, label = {name: tensor[part] for name, tensor in batched.items()}, labels[part]
        if use_vmap:
            try:
                scores = vectorised(values, sample, label)
            except (RuntimeError, NotImplementedError) as error:
                if not _vmap_is_to_blame(error):
                    raise
                use_vmap = False
            else:
                yield list(scores.values())
                continue
        for row in range(label.shape[0]):
            outputs = model(**{name: tensor[row : row + 1] for name, tensor in sample.items()}, **shared)
            value = likelihood.log_prob(get_logits(outputs), label[row : row + 1]).sum()
            score = summed_score(value, list(parameters.values()), create_graph=differentiable)
            yield [s.unsqueeze(0) for s in score]


def _vmap_is_to_blame(error: Exception) -> bool:
    """Whether the model is one that vmap cannot trace, rather than one that fails by itself."""
    text = str(error)
    return any(word in text for word in ("vmap", "functorch", "functionalize", "BatchedTensor", "torch.func"))
