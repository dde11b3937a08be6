"""Tr F, the trace of the Fisher information matrix, and its gradient.

    Tr F(θ) = E_x E_y ‖s‖²,   s = ∇_θ log p_θ(y|x)  of ONE sample

Estimators, on B samples in all (over micro-batches and processes alike, so the split does not matter):

    exact         (1/B) Σ_i ‖s_i‖²         in eval mode: BatchNorm mixes samples, dropout would make it inexact
    sampled_sum   (1/B) ‖Σ_i s_i‖²       y_i ~ p_θ: scores have mean zero, so cross terms vanish (Bartlett)
    signed_sum    (1/B) ‖Σ_i r_i s_i‖²   r_i = ±1 at random: cross terms vanish for any labels (Hutchinson)

Gradient of the `*_sum` estimators, with G = Σ_i r_i s_i = ∇ℓ and H = ∇²ℓ:  ∇T = (2/B) H G, where

    finite_difference   H G ≈ (∇ℓ(θ + ε G/‖G‖) − ∇ℓ(θ)) · ‖G‖/ε     first-order passes only
    double_backward     H G = ∇_θ ⟨∇ℓ(θ), G/‖G‖⟩ · ‖G‖, G fixed     exact; needs kernels with a second derivative

The labels are held fixed in the gradient. Under y ~ p_θ, ∇ Tr F = E[∇‖s‖²] + E[‖s‖² s], and the second term, by which
the distribution of the labels moves with θ, is left out (in a linear softmax model that leaves a mean of zero). With
empirical labels nothing is left out.

Finite differences also see the kinks that a step of ε crosses (ReLU, max pooling); second derivatives, taken between
kinks, do not. On a fresh ReLU ResNet the two gradients have a cosine of 0 to 0.4 at ε = 1e-3 and meet as ε → 0 (in
float64, at ε = 1e-5); on smooth networks they meet in float32 at ε = 1e-3.

Source: Karim et al., *Fisher Information guided Purification against Backdoor Attacks*, CCS 2024 (objective, Tr F);
Dangel et al. 2020 and Martens 2020 for the sampled-label identity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .likelihood import Likelihood, at_least_float32, infer_likelihood
from .passes import RandomState, displaced, in_eval_mode, preserved_buffers
from .scores import (
    Batch,
    add_score,
    labels_from_outputs,
    per_sample_scores,
    score_labels,
    split_batch,
    summed_score,
    trainable_parameters,
)
from .sharded import any_sharded, whole

ESTIMATORS = ("sampled_sum", "signed_sum", "exact")
GRADIENTS = ("finite_difference", "double_backward")
LABELS = ("sampled", "empirical")
BUCKET = 2**22  # numbers that are sent together

_ADVICE_SECOND_DERIVATIVE = (
    "an operation of this model has no second derivative. Load it with attn_implementation='eager', "
    "or use trace_gradient='finite_difference' with a *_sum estimator."
)


def check_choice(estimator: str, gradient: str | None, labels: str) -> None:
    """Raise ValueError for names that do not exist and pairs that do not go together."""
    for value, allowed, what in (
        (estimator, ESTIMATORS, "trace_estimator"),
        (gradient, (*GRADIENTS, None), "trace_gradient"),
        (labels, LABELS, "fisher_labels"),
    ):
        if value not in allowed:
            raise ValueError(f"{what}={value!r} is not one of {', '.join(str(name) for name in allowed if name)}.")
    if estimator == "exact" and gradient == "finite_difference":
        raise ValueError(
            "trace_estimator='exact' has no finite-difference gradient: "
            "use trace_gradient='double_backward', or a *_sum estimator."
        )
    if estimator == "sampled_sum" and labels == "empirical":
        raise ValueError(
            "trace_estimator='sampled_sum' is unbiased for fisher_labels='sampled' only: "
            "use trace_estimator='signed_sum' with empirical labels."
        )


@dataclass
class _MicroBatch:
    """All that a second pass needs to see the same function: inputs, labels, signs, random state and loss scale."""

    inputs: dict[str, Any]
    labels: Tensor
    signs: Tensor | None = None
    random_state: RandomState | None = None
    scale: float = 1.0

    def scaled_log_prob(self, likelihood: Likelihood, logits: Tensor) -> Tensor:
        """ℓ = Σ_i r_i log p(y_i|x_i), times the loss scale."""
        values = likelihood.log_prob(logits, self.labels)
        return (values if self.signs is None else values * self.signs).sum() * self.scale


class TraceEstimator:
    """Estimates Tr F and its gradient over one update, micro-batch by micro-batch.

    Call `observe` for every micro-batch, then `estimate` once; it then starts over. The model is left as it was:
    weights, buffers (BatchNorm statistics), train mode and `.grad` do not change. `observe` draws from torch's random
    state as a forward pass does; `estimate` leaves that as it found it. With BatchNorm in train mode, the `*_sum`
    scores are those of each micro-batch as a whole, as the task's gradient is.

    Args:
        model: any module whose output has `.logits` (or is the logits). Frozen parameters are left out of F, tied
            ones counted once.
        likelihood: p_θ(y|x); by default inferred from the model's config.
        estimator: `sampled_sum`, `signed_sum` or `exact`.
        gradient: `finite_difference` or `double_backward`; None when only the value is wanted.
        labels: `sampled` (the true Fisher) or `empirical` (the clean label).
        epsilon: length of the finite-difference step in parameter space. Under bf16 autocast rounding hides a step of
            0.001 in part; 0.01 is then closer to float32.
        chunk_size: samples whose scores `exact` holds at once; by default, what fits in `SCORES_AT_ONCE` numbers.
        label_name: the key of the clean labels in a batch.
        reduce: sums a tensor over all processes in place; None for one process.

    Raises:
        ValueError: names that do not exist, pairs that do not go together, no trainable parameter, finite differences
            of half-precision weights (the step would be rounded away), or anything but finite differences of sharded
            ones.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood | None = None,
        *,
        estimator: str = "sampled_sum",
        gradient: str | None = "finite_difference",
        labels: str = "sampled",
        epsilon: float = 0.001,
        chunk_size: int | None = None,
        label_name: str = "labels",
        reduce: Callable[[Tensor], Any] | None = None,
    ):
        check_choice(estimator, gradient, labels)
        if not epsilon > 0:
            raise ValueError(f"trace_epsilon={epsilon} has to be positive.")
        self.model = model
        self.likelihood = likelihood or infer_likelihood(model)
        self.estimator, self.gradient, self.labels = estimator, gradient, labels
        self.epsilon, self.chunk_size, self.label_name = epsilon, chunk_size, label_name
        self.reduce = reduce
        self.parameters = list(trainable_parameters(model).values())
        self._is_sharded = any_sharded(self.parameters)
        if self._is_sharded and (estimator == "exact" or gradient == "double_backward"):
            raise ValueError(
                f"trace_estimator={estimator!r} with trace_gradient={gradient!r} cannot be had of sharded parameters "
                "(FSDP), whose gradients have no graph: use a *_sum estimator with finite differences, or DDP."
            )
        if gradient == "finite_difference" and any(
            p.dtype in (torch.float16, torch.bfloat16) for p in self.parameters
        ):
            raise ValueError(
                "trace_gradient='finite_difference' needs float32 weights (a step of "
                f"{epsilon} is rounded away in half precision): load the model in float32 and set bf16=True or "
                "fp16=True, or use trace_gradient='double_backward'."
            )
        self.reset()

    def reset(self) -> None:
        """Forget what was observed."""
        self._seen: list[_MicroBatch] = []
        self._sum: list[Tensor] | None = None  # G = Σ_i r_i s_i over this process

    @property
    def pending(self) -> bool:
        """Whether a micro-batch was observed and not yet turned into an estimate."""
        return bool(self._seen)

    def observe(
        self,
        batch: Batch,
        generator: torch.Generator | None = None,
        *,
        outputs: Any = None,
        random_state: RandomState | None = None,
        scale: float = 1.0,
    ) -> None:
        """Take in one micro-batch: draw its labels and signs and add its score to G.

        Args:
            batch: the model's inputs and labels.
            generator: CPU generator of the drawn labels and signs; torch's global one when left out.
            outputs: the model's outputs on `batch`, with their graph, when a forward pass was already made (the
                task's own, say): its graph is kept for the caller. Otherwise a forward pass is made here.
            random_state: torch's random state before that forward pass.
            scale: multiplies ℓ in the backward pass and divides the score (a loss scale for float16).
        """
        inputs, clean = split_batch(self.model, batch, self.label_name)
        if self.estimator == "exact":  # scored by itself in `estimate`, in eval mode: the labels come from there too
            with in_eval_mode(self.model):
                labels = score_labels(self.model, self.likelihood, inputs, clean, self.labels, generator)
            self._seen.append(_MicroBatch(inputs, labels))
        elif outputs is None:
            random_state = RandomState.capture(self.parameters[0].device)
            with preserved_buffers(self.model), torch.enable_grad():
                self._add_score(inputs, clean, self.model(**inputs), generator, random_state, scale, keep_graph=False)
        elif random_state is None:
            raise ValueError("`outputs` need the `random_state` from before their forward pass.")
        else:
            self._add_score(inputs, clean, outputs, generator, random_state, scale, keep_graph=True)

    def _add_score(self, inputs, clean, outputs, generator, random_state, scale, keep_graph) -> None:
        """Draw one micro-batch's labels and signs; then G += Σ_i r_i s_i."""
        logits = self.likelihood.logits(outputs)
        labels = labels_from_outputs(self.likelihood, outputs, clean, self.labels, generator)
        signs = None
        if self.estimator == "signed_sum":
            coins = torch.randint(0, 2, (labels.shape[0],), generator=generator)
            signs = (2 * coins - 1).to(logits.device, torch.float32)
        seen = _MicroBatch(inputs, labels, signs, random_state, scale)
        score = summed_score(seen.scaled_log_prob(self.likelihood, logits), self.parameters, retain_graph=keep_graph)
        self._seen.append(seen)
        self._sum = _accumulate(self._sum, _scale_(score, 1.0 / scale))

    def estimate(self) -> tuple[Tensor, list[Tensor] | None]:
        """Tr F over everything observed since the last call, and its gradient.

        Returns:
            A scalar tensor, and one tensor a trainable parameter (None when `gradient` is None). Each is the same on
            every process.
        """
        if not self._seen:
            raise ValueError("Nothing was observed: call `observe` first.")
        rows = float(sum(seen.labels.shape[0] for seen in self._seen))
        counts = torch.tensor([rows, 1.0], device=self.parameters[0].device)
        self._reduce(counts)
        rows, processes = counts[0], counts[1].item()
        try:
            if self.estimator == "exact":
                value, gradient = self._exact()
                return value / rows, gradient and _scale_(gradient, 1.0 / rows.item())
            total = self._sum
            self._reduce_all(total)
            squared_norm = _squared_norm(total)
            value = squared_norm / rows
            if self.gradient is None:
                return value, None
            if not squared_norm > 0:  # a flat point, or NaN: nothing to differentiate
                return value, [torch.zeros_like(p) for p in self.parameters]
            return value, self._hessian_times_sum(total, squared_norm.sqrt().item(), 2.0 / rows.item(), processes)
        finally:
            self.reset()

    def _hessian_times_sum(self, total: list[Tensor], norm: float, factor: float, processes: float) -> list[Tensor]:
        """factor · H G, summed over processes; `norm` is ‖G‖. The memory of `total` is used again."""
        if self.gradient == "double_backward":
            result = [torch.zeros_like(p) for p in self.parameters]
            for seen in self._seen:
                with self._second_pass(seen) as scaled_log_prob, _second_derivative_advice():
                    score = summed_score(scaled_log_prob, self.parameters, create_graph=True)
                    inner = sum((s * (g / norm)).sum() for s, g in zip(score, total, strict=True))
                    if inner.requires_grad:  # or ℓ is linear in θ, and H is zero
                        _accumulate(result, _scale_(summed_score(inner, self.parameters), 1.0 / seen.scale))
            factor *= norm
        else:
            scale = self._seen[0].scale
            with displaced(self.parameters, total, self.epsilon / norm):
                result = _scale_(total, -scale / (1.0 if self._is_sharded else processes))  # each takes off its share
                for seen in self._seen:
                    with self._second_pass(seen) as scaled_log_prob:
                        result = add_score(scaled_log_prob * (scale / seen.scale), self.parameters, result)
            factor *= norm / self.epsilon / scale
        self._reduce_all(result)
        return _scale_(result, factor)

    @contextmanager
    def _second_pass(self, seen: _MicroBatch) -> Iterator[Tensor]:
        """ℓ of a micro-batch at the present weights, for backward passes inside: same labels, signs and dropout mask.

        No buffer moves, in the backward passes either (activation checkpointing runs forward again there).
        """
        with seen.random_state.replayed(), preserved_buffers(self.model), torch.enable_grad():
            yield seen.scaled_log_prob(self.likelihood, self.likelihood.logits(self.model(**seen.inputs)))

    def _exact(self) -> tuple[Tensor, list[Tensor] | None]:
        """Σ_i ‖s_i‖² and its gradient, summed over processes."""
        value = torch.zeros((), device=self.parameters[0].device)
        gradient = None if self.gradient is None else [torch.zeros_like(p) for p in self.parameters]
        for seen in self._seen:
            with in_eval_mode(self.model), torch.enable_grad():
                chunks = per_sample_scores(
                    self.model,
                    self.likelihood,
                    seen.inputs,
                    seen.labels,
                    chunk_size=self.chunk_size,
                    differentiable=gradient is not None,
                )
                for scores in chunks:
                    squared = _squared_norm(scores)
                    value = value + squared.detach()
                    if gradient is not None:
                        with _second_derivative_advice():
                            _accumulate(gradient, summed_score(squared, self.parameters))
        self._reduce(value)
        self._reduce_all(gradient or [])
        return value, gradient

    def _reduce_all(self, tensors: list[Tensor]) -> None:
        """Sum tensors of parameters over all processes, many at once; those of shards `backward` has summed."""
        if self.reduce is None or self._is_sharded:
            return
        for bucket in _buckets(tensors):
            together = torch.cat([tensor.flatten() for tensor in bucket])
            self.reduce(together)
            for tensor, part in zip(bucket, together.split([t.numel() for t in bucket]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def _reduce(self, tensor: Tensor) -> None:
        if self.reduce is not None:
            self.reduce(tensor)


def fisher_trace(
    model: nn.Module,
    batch: Batch,
    *,
    likelihood: Likelihood | None = None,
    estimator: str = "exact",
    labels: str = "sampled",
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
    label_name: str = "labels",
) -> float:
    """Tr F(θ) on one batch: a single number, in nats² per unit of the parameters squared.

    The model is used in the mode it is in and left as it was. See `TraceEstimator` for the arguments and errors.
    """
    estimator_ = TraceEstimator(
        model,
        likelihood,
        estimator=estimator,
        gradient=None,
        labels=labels,
        chunk_size=chunk_size,
        label_name=label_name,
    )
    estimator_.observe(batch, generator)
    value, _ = estimator_.estimate()
    return value.item()


@contextmanager
def _second_derivative_advice() -> Iterator[None]:
    """Turn autograd's error about a missing second derivative into one that names the way out."""
    try:
        yield
    except RuntimeError as error:
        if "not implemented" in str(error) and "derivative" in str(error):
            raise ValueError(f"{_ADVICE_SECOND_DERIVATIVE} (autograd: {error})") from error
        raise


def _squared_norm(tensors: list[Tensor]) -> Tensor:
    """Σ ‖tensor‖². By `sum`, which adds pairwise: `vector_norm` on CPU is off by 3e-3 at 25 million numbers."""
    return whole(torch.stack([at_least_float32(tensor).square().sum() for tensor in tensors]).sum())


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of tensors of one type, each of few more than `BUCKET` numbers."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or sum(t.numel() for t in bucket) >= BUCKET):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def _accumulate(total: list[Tensor] | None, more: list[Tensor]) -> list[Tensor]:
    """total + more, in place; `more` when there is no total yet."""
    if total is None:
        return more
    torch._foreach_add_(total, more)
    return total


def _scale_(tensors: list[Tensor], factor: float) -> list[Tensor]:
    if factor != 1.0:
        torch._foreach_mul_(tensors, factor)
    return tensors
