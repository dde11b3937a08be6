"""log p(y|x) of each sample, and labels drawn from the model: what every Fisher term is made of.

One *sample* is one row of the batch. A likelihood turns a model's logits into one log-likelihood per sample and draws
labels from the same distribution. Three kinds of output are covered here, detected objects in `matched_queries`; each
says what it sums over.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE_INDEX = -100
_TEXT_HEADS = ("ForConditionalGeneration", "MTModel", "EncoderDecoderModel", "ForCausalLM", "LMHeadModel")
_TOKEN_HEADS = ("ForTokenClassification", "ForMaskedLM")  # an answer for each token that is read


class Likelihood(ABC):
    """The distribution p_θ(y|x) that a model's logits stand for.

    Attributes:
        vectorises: whether scores may be taken by vmap.
    """

    vectorises = True

    @abstractmethod
    def log_prob(self, logits: Tensor, labels: Tensor) -> Tensor:
        """log p(y|x) of each sample, in nats: a tensor of shape `(batch,)`, in float32 at least."""

    @abstractmethod
    def sample(self, logits: Tensor, labels: Tensor | None, generator: torch.Generator | None = None) -> Tensor:
        """Labels y ~ p_θ(·|x), in the shape of `labels`, which only say what is masked. `generator` lives on CPU."""

    def logits(self, outputs: Any) -> Tensor:
        """What `log_prob` and `sample` take, among a model's outputs."""
        return get_logits(outputs)

    def targets(self, outputs: Any, labels: Any) -> Tensor:
        """The clean labels of a batch as `log_prob` takes them: most are so; annotated objects are matched first."""
        return labels

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class Categorical(Likelihood):
    """One class of K: log p(y|x) = log softmax(logits)[y]. Logits are `(batch, K)`, labels `(batch,)` of integers.

    A sample without a label (-100), which the model's own loss leaves out, has log p(y|x) = 0; `sample` draws it one.
    """

    def log_prob(self, logits, labels):
        self._check(logits, labels)
        kept = labels != IGNORE_INDEX
        known = torch.where(kept, labels, 0).long()
        each = torch.log_softmax(at_least_float32(logits), dim=-1).gather(-1, known[:, None]).squeeze(-1)
        return torch.where(kept, each, 0)

    def sample(self, logits, labels=None, generator=None):
        self._check(logits, labels)
        return _draw_classes(logits, generator)

    def _check(self, logits, labels):
        _require_shapes(self, logits, 2, labels, logits.shape[:1])


class MultiLabel(Likelihood):
    """K independent yes/no labels: log p(y|x) is the sum over labels of the Bernoulli log-likelihood.

    Logits and labels are `(batch, K)`; labels are 0 or 1.
    """

    def log_prob(self, logits, labels):
        self._check(logits, labels)
        logits = at_least_float32(logits)
        return -F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none").sum(-1)

    def sample(self, logits, labels=None, generator=None):
        self._check(logits, labels)
        probabilities = torch.sigmoid(at_least_float32(logits.detach())).cpu()
        return torch.bernoulli(probabilities, generator=generator).to(logits.device)

    def _check(self, logits, labels):
        _require_shapes(self, logits, 2, labels, logits.shape)


class TokenSequence(Likelihood):
    """A sequence of tokens: log p(y|x) is the sum over the target tokens that are not masked (-100).

    Logits are `(batch, length, vocabulary)`, labels `(batch, length)`. Sampled tokens are drawn at every unmasked
    position given the reference's earlier tokens (teacher forcing), as the gradient is taken with those.

    Args:
        shift: whether position t's logits predict token t + 1 (decoder-only models). Encoder-decoder models do not.
    """

    def __init__(self, shift: bool = False):
        self.shift = shift

    def __repr__(self) -> str:
        return f"TokenSequence(shift={self.shift})"

    def log_prob(self, logits, labels):
        self._check(logits, labels)
        if self.shift:
            logits, labels = logits[:, :-1], labels[:, 1:]
        kept = labels != IGNORE_INDEX
        tokens = torch.where(kept, labels, 0).long()
        per_token = torch.log_softmax(at_least_float32(logits), dim=-1).gather(-1, tokens[..., None]).squeeze(-1)
        return torch.where(kept, per_token, 0).sum(-1)

    def sample(self, logits, labels=None, generator=None):
        if labels is None:
            raise ValueError("TokenSequence.sample needs `labels`: their -100 entries say which tokens are masked.")
        self._check(logits, labels)
        drawn = _draw_classes(logits, generator)
        if self.shift:  # the token that position t predicts stands at t + 1
            drawn = torch.cat([labels[:, :1], drawn[:, :-1]], dim=1)
        return torch.where(labels == IGNORE_INDEX, IGNORE_INDEX, drawn)

    def _check(self, logits, labels):
        _require_shapes(self, logits, 3, labels, logits.shape[:2])


def infer_likelihood(model: nn.Module) -> Likelihood:
    """The likelihood that fits a transformers model, from its config.

    Returns:
        `MatchedQueries` for object detectors, `TokenSequence` for models that generate text or answer for each token,
        `MultiLabel` for `problem_type="multi_label_classification"`, `Categorical` otherwise (also for a plain
        `nn.Module` without a config).

    Raises:
        ValueError: for a regression head (also one output without a `problem_type`, as transformers reads it), which
            has no class to draw.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = getattr(base, "config", None)
    if type(base).__name__.endswith("ForObjectDetection"):
        from .matched_queries import MatchedQueries

        return MatchedQueries.of(config)
    problem_type = getattr(config, "problem_type", None)
    if problem_type == "multi_label_classification":
        return MultiLabel()
    if type(base).__name__.endswith(_TEXT_HEADS):
        return TokenSequence(shift=not getattr(config, "is_encoder_decoder", False))
    if type(base).__name__.endswith(_TOKEN_HEADS):
        return TokenSequence()
    if problem_type == "regression" or (problem_type is None and getattr(config, "num_labels", None) == 1):
        raise ValueError("A regression head has no class likelihood; pass `likelihood=` with your own Likelihood.")
    return Categorical()


def get_logits(outputs: Any) -> Tensor:
    """The logits among a model's outputs: the field `logits`, or the output itself when it is a tensor.

    Raises:
        ValueError: when there are none, for example for a model without a head.
    """
    if isinstance(outputs, Tensor):
        return outputs
    logits = outputs.get("logits") if isinstance(outputs, dict) else getattr(outputs, "logits", None)
    if logits is None:
        fields = ", ".join(outputs) if isinstance(outputs, dict) else type(outputs).__name__
        raise ValueError(
            f"The model returned no `logits` (it returned: {fields}); load it with a task head, or let it return a "
            "dict that has them."
        )
    return logits


def _draw_classes(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """One class per row of the last axis, drawn on CPU so that a seed gives the same labels on every device."""
    probabilities = torch.softmax(at_least_float32(logits.detach()), dim=-1).cpu()
    flat = torch.multinomial(probabilities.flatten(0, -2), 1, generator=generator)
    return flat.view(logits.shape[:-1]).to(logits.device)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half-precision tensors in float32, others as they are: sums of many small numbers need the digits."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _require_shapes(
    likelihood: Likelihood, logits: Tensor, dims: int, labels: Tensor | None, expected: torch.Size
) -> None:
    """Raise rather than broadcast: `gather` takes fewer labels than logits, and gives another number, in silence."""
    way_out = "pass the `likelihood=` that fits this model's output."
    if logits.ndim != dims:
        raise ValueError(f"{likelihood} expects logits of {dims} dimensions and got {tuple(logits.shape)}; {way_out}")
    if labels is not None and labels.shape != expected:
        raise ValueError(
            f"{likelihood} expects labels of shape {tuple(expected)} for logits of shape {tuple(logits.shape)} "
            f"and got {tuple(labels.shape)}; {way_out}"
        )
