"""Sharpness-aware minimisation, with an ascent step adapted to the size of each weight.

Source: Kwon et al., *ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep Neural
Networks*, ICML 2021.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from .fisher.passes import displaced, preserved_buffers
from .trainer import FIPMixin


class SharpnessAware:
    """
    Mixed into a [`FIPTrainer`], it steps along the gradient that the loss has at w + ε.

    ε = ρ w² g / ‖|w| g‖ with g the gradient at w and ρ = `args.rho`; with ρ = 0, or without it, nothing is changed.
    FIP's regularisers, if any, are those at w.

    Both gradients are of the whole update, over all micro-batches and processes: an update is computed twice, and its
    batches are held meanwhile. BatchNorm statistics move in the first pass only. Dropout draws new masks in the
    second.

    Logs `perturbed_loss`, the loss at w + ε, beside `loss`, the one at w.

    Raises:
        FloatingPointError: (from `train`) when the loss at w + ε is NaN or infinite.
    """

    @property
    def _rho(self) -> float:
        return getattr(self.args, "rho", 0.0)

    def _begin_update(self) -> None:
        super()._begin_update()
        self._micro_batches = []
        self._is_perturbed = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self._rho and model.training and torch.is_grad_enabled() and not self._is_perturbed:
            self._micro_batches.append((model, dict(inputs), num_items_in_batch))
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _add_regularisers(self):
        if self._rho:
            self._descend_from_above()
        return super()._add_regularisers()

    def _descend_from_above(self) -> None:
        """Replace the gradient at w by the one at w + ε."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        ascent = ascent_direction(parameters)
        self.model.zero_grad()
        self._is_perturbed, observing, self._observing = True, self._observing, False
        with displaced(parameters, ascent, self._rho), preserved_buffers(self.model):
            loss = sum(self._backward_again(*batch, last=False) for batch in self._micro_batches[:-1])
            loss = float(loss + self._backward_again(*self._micro_batches[-1], last=True))
        if not math.isfinite(loss) and self._loss_scale() == 1.0:
            raise FloatingPointError(
                f"The loss at the perturbed weights is {loss} at step {self.state.global_step}: lower rho."
            )
        self._observing = observing
        self._metrics["perturbed_loss"].append(loss)

    def _backward_again(self, model, inputs, num_items_in_batch, *, last: bool) -> Tensor:
        with nullcontext() if last else self.accelerator.no_sync(model):
            return super(FIPMixin, self).training_step(model, inputs, num_items_in_batch)


@torch.no_grad()
def ascent_direction(parameters: list[Tensor]) -> list[Tensor]:
    """w² g / ‖|w| g‖ for each parameter w with the gradient g = `w.grad`; the norm is over all parameters."""
    norm = get_total_norm([parameter * parameter.grad for parameter in parameters])
    return [parameter.square() * parameter.grad / (norm + 1e-12) for parameter in parameters]
