"""Scores s = ∇_θ log p_θ(y|x): of every sample by itself, and summed over a batch."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from .likelihood import Likelihood
from .passes import preserved_buffers
from .sharded import any_sharded, averaging_processes

Batch = Mapping[str, Any]
SCORES_AT_ONCE = 2**25  # numbers, 128 MiB: the scores of one sample, when they are more


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters the Fisher is taken over, by name: those that require a gradient, a tied one once.

    Raises:
        ValueError: when there are none.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("The model has no trainable parameter: unfreeze some (`requires_grad_(True)`).")
    return parameters


def split_batch(model: nn.Module, batch: Batch, label_name: str = "labels") -> tuple[dict[str, Any], Any]:
    """What the model's forward needs for its logits, and the clean labels: a tensor, or a list of annotated objects.

    Labels are left out of the inputs, as no loss is wanted. An encoder-decoder model makes the decoder's inputs from
    them: it gets those, or, when only its forward can make them, the clean labels after all.

    Raises:
        ValueError: when the batch has no labels.
    """
    inputs = dict(batch)
    labels = inputs.pop(label_name, None)
    if labels is None:
        raise ValueError(
            f"The batch has no {label_name!r} (it has: {', '.join(batch)}): say where its labels are by `label_name`, "
            "of a trainer by `label_names`."
        )
    if not {"decoder_input_ids", "decoder_inputs_embeds"} & inputs.keys():
        shift_right = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        if shift_right is not None:
            inputs["decoder_input_ids"] = shift_right(labels)
        elif (
            isinstance(labels, Tensor)
            and labels.ndim == 2
            and getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        ):
            inputs[label_name] = labels
    return inputs, labels


def summed_score(
    log_prob: Tensor, parameters: list[Tensor], *, retain_graph: bool = False, create_graph: bool = False
) -> list[Tensor]:
    """∇_θ of a sum of log-likelihoods: one tensor a parameter, zero where the output does not depend on it.

    Of sharded parameters it is the sum over all processes.
    """
    if any_sharded(parameters):
        return add_score(log_prob, parameters, [None] * len(parameters), retain_graph=retain_graph)
    gradients = torch.autograd.grad(
        log_prob, parameters, retain_graph=retain_graph or create_graph, create_graph=create_graph, allow_unused=True
    )
    score, taken = [], set()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            gradient = torch.zeros_like(parameter)
        elif gradient.data_ptr() in taken or 0 in gradient.stride():
            # Autograd gives both terms of a + b one tensor, and every entry of w.sum() one number: they get their own
            # memory here, so that a caller may add to a score in place.
            gradient = gradient.clone(memory_format=torch.contiguous_format)
        taken.add(gradient.data_ptr())
        score.append(gradient)
    return score


def add_score(
    log_prob: Tensor, parameters: list[Tensor], totals: list[Tensor | None], *, retain_graph: bool = False
) -> list[Tensor]:
    """`summed_score` added to `totals` in place, a layer at a time: no second copy of all the parameters is made."""
    found = [parameter.grad for parameter in parameters]
    try:
        for parameter, total in zip(parameters, totals, strict=True):
            parameter.grad = total
        (log_prob * averaging_processes(parameters)).backward(retain_graph=retain_graph)
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    finally:
        for parameter, gradient in zip(parameters, found, strict=True):
            parameter.grad = gradient


def score_labels(
    model: nn.Module,
    likelihood: Likelihood,
    inputs: Batch,
    clean: Any,
    kind: str,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The labels of the scores: drawn from the model, y ~ p_θ(·|x) (`sampled`), or the clean ones (`empirical`).

    What needs the model's outputs takes them from a forward pass that has no graph and moves no buffer.
    """
    if kind == "empirical" and isinstance(clean, Tensor):
        return clean
    with torch.no_grad(), preserved_buffers(model):
        return labels_from_outputs(likelihood, model(**inputs), clean, kind, generator)


def labels_from_outputs(
    likelihood: Likelihood, outputs: Any, clean: Any, kind: str, generator: torch.Generator | None = None
) -> Tensor:
    """`score_labels` where there are outputs already. The clean labels say what is masked."""
    targets = likelihood.targets(outputs, clean)
    return targets if kind == "empirical" else likelihood.sample(likelihood.logits(outputs), targets, generator)


def per_sample_scores(
    model: nn.Module,
    likelihood: Likelihood,
    inputs: Batch,
    labels: Tensor,
    *,
    chunk_size: int | None = None,
    differentiable: bool = False,
) -> Iterator[list[Tensor]]:
    """The score of each sample by itself, a chunk of samples at a time.

    Uses `torch.func` (vmap of grad), or one backward pass a sample, which gives the same numbers: where vmap cannot
    trace the model or the likelihood forbids it, and for differentiable scores, as autograd through vmap takes the
    statistics of LayerNorm for constants (torch 2.13) and gets its second derivative wrong. The model has to be in
    eval mode, as BatchNorm would mix samples; no buffer moves.

    Args:
        inputs: keyword arguments of the model's forward; tensors have the samples on their first axis.
        labels: labels of the scores, `(batch, …)`.
        chunk_size: samples held at once, chunk_size × the trainable parameters; by default, what fits in
            `SCORES_AT_ONCE` numbers.
        differentiable: keep the graph, so that a function of the scores can be differentiated again.

    Yields:
        For each chunk, one tensor `(samples, *parameter.shape)` a trainable parameter.

    Raises:
        ValueError: for a `chunk_size` below 1.
    """
    parameters = trainable_parameters(model)
    rows = labels.shape[0]
    if chunk_size is not None and not chunk_size >= 1:
        raise ValueError(f"fisher_chunk_size={chunk_size} has to be at least 1.")
    if chunk_size is None:
        chunk_size = max(1, SCORES_AT_ONCE // sum(p.numel() for p in parameters.values()))
    batched = {k: v for k, v in inputs.items() if isinstance(v, Tensor) and v.ndim and v.shape[0] == rows}
    shared = {k: v for k, v in inputs.items() if k not in batched}

    def log_prob(values: dict[str, Tensor], sample: dict[str, Tensor], label: Tensor) -> Tensor:
        one_row = {name: tensor.unsqueeze(0) for name, tensor in sample.items()}
        outputs = functional_call(model, values, (), {**one_row, **shared})
        return likelihood.log_prob(likelihood.logits(outputs), label.unsqueeze(0)).squeeze(0)

    values = {name: p.detach() for name, p in parameters.items()}
    vectorised = vmap(grad(log_prob), in_dims=(None, 0, 0))
    use_vmap = likelihood.vectorises and not differentiable
    for start in range(0, rows, chunk_size):
        part = slice(start, start + chunk_size)
        sample, label = {name: tensor[part] for name, tensor in batched.items()}, labels[part]
        if use_vmap:
            try:
                with preserved_buffers(model), warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "There is a performance drop")  # sdpa has no batching rule
                    scores = vectorised(values, sample, label)
            except (RuntimeError, NotImplementedError) as error:
                if not _vmap_is_to_blame(error):
                    raise
                use_vmap = False
            else:
                yield list(scores.values())
                continue
        for row in range(label.shape[0]):
            # The MATH kernel alone has a second derivative; under vmap and autocast it has not even a first.
            kernel = sdpa_kernel(SDPBackend.MATH) if differentiable else nullcontext()
            with preserved_buffers(model), kernel, torch.enable_grad():
                outputs = model(**{name: tensor[row : row + 1] for name, tensor in sample.items()}, **shared)
                value = likelihood.log_prob(likelihood.logits(outputs), label[row : row + 1]).sum()
                score = summed_score(value, list(parameters.values()), create_graph=differentiable)
            yield [s.unsqueeze(0) for s in score]


def _vmap_is_to_blame(error: Exception) -> bool:
    """Whether the model is one that vmap cannot trace, rather than one that fails by itself."""
    words = ("vmap", "functorch", "functionalize", "BatchedTensor", "torch.func", "atching rule", "data pointer")
    words += ("expected scalar type",)  # grad of a convolution under autocast
    return any(word in str(error) for word in words)
