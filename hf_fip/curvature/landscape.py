"""The loss on a line or a plane through the weights, in filter-normalised random directions.

    L(θ + a d₁ [+ b d₂]),   d_f ← d_f · ‖θ_f‖ / ‖d_f‖  for each filter f

so that a step of 1 is as long as the weights, filter by filter, and pictures of two models can be compared. A filter
is one output unit of a weight: one entry of its first axis. Biases and norm layers (weights of one dimension) are not
moved. The model is in eval mode; running statistics of BatchNorm stay as they are.

Source: Li et al., *Visualizing the Loss Landscape of Neural Nets*, NeurIPS 2018.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..fisher.likelihood import Likelihood
from ..fisher.passes import displaced
from ..fisher.scores import Batch
from .loss import MeanLoss


@dataclass(frozen=True)
class Landscape:
    """Losses around a model.

    Attributes:
        steps: coordinates along each direction, in lengths of the weights, `(points,)`.
        losses: for each kind of batches the mean loss in nats, `(points,)` or `(points, points)`.
    """

    steps: np.ndarray
    losses: dict[str, np.ndarray]

    def to_dict(self) -> dict:
        """As JSON values."""
        return {"steps": self.steps.tolist(), "losses": {kind: loss.tolist() for kind, loss in self.losses.items()}}


def loss_landscape(
    model: nn.Module,
    batches: Mapping[str, Iterable[Batch]],
    *,
    dimensions: int = 1,
    span: float = 1.0,
    points: int = 21,
    seed: int = 0,
    likelihood: Likelihood | None = None,
    reduce: Callable[[Tensor], Any] | None = None,
    progress: bool = False,
) -> Landscape:
    """The loss of each kind of batches, on a line (`dimensions=1`) or a plane (2) through the weights.

    The model is left as it was. All its weights are moved, frozen ones too: pass an adapter's model merged. The same
    seed gives models of one architecture the same directions, but for their lengths.

    Args:
        batches: for each kind, `clean` and `triggered` for example, inputs and labels; triggered inputs with the label
            that the attacker wants.
        span: the steps go from −span to span.
        points: how many a direction; an odd number has the model itself in the middle.
        likelihood, reduce: see [`Hessian`].
        progress: show a bar.

    Raises:
        ValueError: for `dimensions` other than 1 and 2, fewer than 2 points, no weight of two axes, or no sample.
    """
    if dimensions not in (1, 2) or points < 2:
        raise ValueError(f"A landscape has dimensions=1 or 2 and at least 2 points; got {dimensions} and {points}.")
    weights = [p for p in model.parameters() if p.ndim > 1 and p.is_floating_point()]
    if not weights:
        raise ValueError("The model has no weight of two dimensions or more: there is no filter to normalise.")
    losses = {kind: MeanLoss(model, given, likelihood=likelihood, reduce=reduce) for kind, given in batches.items()}
    generator = torch.Generator().manual_seed(seed)
    directions = [filter_normalised(weights, generator) for _ in range(dimensions)]
    steps = np.linspace(-span, span, points)
    values = {kind: np.empty((points,) * dimensions) for kind in losses}
    with tqdm(total=points**dimensions, desc="Loss landscape", disable=not progress, leave=False) as bar:
        for place in np.ndindex(*(points,) * dimensions):
            lengths = steps[list(place)]
            direction = [sum(a * d for a, d in zip(lengths, ds, strict=True)) for ds in zip(*directions, strict=True)]
            with displaced(weights, direction, 1.0):
                for kind, loss in losses.items():
                    values[kind][place] = loss.value()
            bar.update()
    return Landscape(steps, values)


def filter_normalised(weights: list[Tensor], generator: torch.Generator) -> list[Tensor]:
    """A random normal direction whose filters are as long as those of the weights. Drawn on CPU."""
    direction = []
    for weight in weights:
        drawn = torch.randn(weight.shape, generator=generator).to(weight)
        lengths, drawn_lengths = (t.detach().flatten(1).norm(dim=1) for t in (weight, drawn))
        direction.append(drawn * (lengths / drawn_lengths).view(-1, *(1,) * (weight.ndim - 1)))
    return direction
