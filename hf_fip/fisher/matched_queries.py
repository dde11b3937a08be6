"""log p(y|x) of detected objects: the class log-likelihood of the queries that are matched to annotated objects.

A detector of the DETR family answers each image with a fixed number of queries: a class and a box each. Training
matches every annotated object with one query, by the least total cost of classes and boxes (the Hungarian algorithm;
Carion et al., *End-to-End Object Detection with Transformers*, ECCV 2020). The Fisher takes that matching as given.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .likelihood import IGNORE_INDEX, Likelihood, at_least_float32, get_logits


class MatchedQueries(Likelihood):
    """Detected objects: log p(y|x) is the sum over the matched queries of the log-likelihood of their class.

    A model whose logits are `(batch, queries, K + 1)` answers one of K classes or no object, by softmax (DETR, YOLOS):
    the log-likelihood of a query is log softmax(logits)[y], and its label an integer. One whose logits are
    `(batch, queries, K)` answers each class by yes or no (RT-DETR, Deformable DETR): it is the sum over classes of the
    Bernoulli log-likelihood, and the label K zeros and ones. Queries without an object have the label -100 and do not
    count; so an image without objects has log p(y|x) = 0 and no score.

    Labels are `(batch, queries)` or `(batch, queries, K)`; `targets` makes them of annotations.

    Args:
        num_labels: K.
        num_queries: of the model. More than those, as RT-DETR adds to denoise while it trains, come first in its
            outputs, are hidden from the others and are left out.
        class_cost, bbox_cost, giou_cost: weights of the matching, as in the model's own loss.
    """

    vectorises = False  # under vmap the scores of RT-DETR come out wrong, without an error (torch 2.13)

    def __init__(self, num_labels: int, num_queries: int, class_cost: float, bbox_cost: float, giou_cost: float):
        self.num_labels, self.num_queries = num_labels, num_queries
        self.class_cost, self.bbox_cost, self.giou_cost = class_cost, bbox_cost, giou_cost

    @classmethod
    def of(cls, config: Any) -> MatchedQueries:
        """The likelihood of a detector with this config.

        Raises:
            ValueError: the config does not name its queries and matching costs, as those of the DETR family do.
        """

        def named(*names: str):
            for name in names:
                if hasattr(config, name):
                    return getattr(config, name)
            raise ValueError(
                f"{type(config).__name__} has no {names[0]}: pass `likelihood=` with your own Likelihood."
            )

        costs = (named(f"{name}_cost", f"matcher_{name}_cost") for name in ("class", "bbox", "giou"))
        return cls(config.num_labels, named("num_queries", "num_detection_tokens"), *costs)

    def logits(self, outputs):
        return get_logits(outputs)[:, -self.num_queries :]

    def targets(self, outputs, labels):
        """The labels of matched queries, made of annotations.

        Args:
            outputs: with `logits` and `pred_boxes`, (batch, queries, 4).
            labels: for each image a dict with `class_labels`, (objects,), and `boxes`, (objects, 4), centre, width and
                height as shares of the image.
        """
        logits = self.logits(outputs).detach()
        boxes = (outputs["pred_boxes"] if isinstance(outputs, dict) else outputs.pred_boxes)[:, -self.num_queries :]
        found = {"logits": at_least_float32(logits), "pred_boxes": at_least_float32(boxes.detach())}
        matcher = self._softmax_matcher if self._is_softmax(logits) else self._sigmoid_matcher
        targets = torch.full(logits.shape[:2], IGNORE_INDEX, device=logits.device)
        for row, ((queries, objects), image) in enumerate(zip(matcher(found, labels), labels, strict=True)):
            targets[row, queries] = image["class_labels"][objects].to(targets)
        if self._is_softmax(logits):
            return targets
        one_hot = F.one_hot(targets.clamp(min=0), self.num_labels)
        return torch.where((targets == IGNORE_INDEX)[..., None], IGNORE_INDEX, one_hot)

    def log_prob(self, logits, labels):
        kept = self._kept(logits, labels)
        logits, known = at_least_float32(logits), torch.where(kept, labels, 0)
        if self._is_softmax(logits):
            each = torch.log_softmax(logits, dim=-1).gather(-1, known.long()[..., None]).squeeze(-1)
        else:
            each = -F.binary_cross_entropy_with_logits(logits, known.to(logits.dtype), reduction="none")
        return torch.where(kept, each, 0).flatten(1).sum(-1)

    def sample(self, logits, labels=None, generator=None):
        if labels is None:
            raise ValueError("MatchedQueries.sample needs `labels`: their -100 entries say which queries count.")
        kept, logits = self._kept(logits, labels), at_least_float32(logits.detach())
        if self._is_softmax(logits):
            probabilities = torch.softmax(logits, dim=-1).cpu()
            drawn = torch.multinomial(probabilities.flatten(0, 1), 1, generator=generator).view(labels.shape)
        else:
            drawn = torch.bernoulli(torch.sigmoid(logits).cpu(), generator=generator).long()
        return torch.where(kept, drawn.to(labels.device), IGNORE_INDEX)

    @cached_property
    def _softmax_matcher(self):
        from transformers.loss.loss_for_object_detection import HungarianMatcher

        return HungarianMatcher(self.class_cost, self.bbox_cost, self.giou_cost)

    @cached_property
    def _sigmoid_matcher(self):
        from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher

        return DeformableDetrHungarianMatcher(self.class_cost, self.bbox_cost, self.giou_cost)

    def _is_softmax(self, logits: Tensor) -> bool:
        return logits.shape[-1] == self.num_labels + 1

    def _kept(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Which labels count."""
        if logits.ndim != 3 or logits.shape[-1] not in (self.num_labels, self.num_labels + 1):
            raise ValueError(
                f"{self} expects logits of shape (batch, queries, {self.num_labels} or one more for no object) and "
                f"got {tuple(logits.shape)}; pass the `likelihood=` that fits this model's output."
            )
        expected = logits.shape[:2] if self._is_softmax(logits) else logits.shape
        if labels.shape != expected:
            raise ValueError(f"{self} expects labels of shape {tuple(expected)} and got {tuple(labels.shape)}.")
        return labels != IGNORE_INDEX
