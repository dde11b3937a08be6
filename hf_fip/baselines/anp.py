"""ANP: neurons that an adversary can turn against the model by scaling them a little are pruned.

Source: Wu and Wang, *Adversarial Neuron Pruning Purifies Backdoored Deep Models*, NeurIPS 2021.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .base import BaselineConfig
from .masks import MaskTrainer, channel_scales, ones_over_channels, prune


@dataclass
class ANPConfig(BaselineConfig):
    """Arguments of [`ANPTrainer`], with the paper's defaults: SGD (0.2, momentum 0.9), 2,000 updates of 128 images.

    Args:
        anp_epsilon (`float`, *optional*, defaults to 0.4):
            Largest relative change of a neuron's scale and shift.
        anp_steps (`int`, *optional*, defaults to 1):
            Sign-gradient steps to the perturbation, each of length `anp_epsilon / anp_steps`.
        anp_alpha (`float`, *optional*, defaults to 0.2):
            Share of the loss without perturbation.
        pruning_threshold (`float`, *optional*, defaults to 0.2):
            Prune neurons with a mask at most so large.

    Raises:
        ValueError: for a number out of range.
    """

    anp_epsilon: float = field(default=0.4, metadata={"help": "Largest relative change of a neuron."})
    anp_steps: int = field(default=1, metadata={"help": "Sign-gradient steps to the perturbation."})
    anp_alpha: float = field(default=0.2, metadata={"help": "Share of the loss without perturbation."})
    pruning_threshold: float = field(default=0.2, metadata={"help": "Prune neurons with a mask at most so large."})
    learning_rate: float = field(default=0.2, metadata={"help": "The initial learning rate."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "The learning-rate schedule."})
    max_steps: int = field(default=2000, metadata={"help": "Updates of the masks."})
    per_device_train_batch_size: int = field(default=128, metadata={"help": "Images of a batch."})

    def check(self) -> None:
        super().check()
        if not self.anp_epsilon > 0:
            raise ValueError(f"anp_epsilon={self.anp_epsilon} has to be positive.")
        if not self.anp_steps >= 1:
            raise ValueError(f"anp_steps={self.anp_steps} has to be at least 1.")
        for name in ("anp_alpha", "pruning_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} has to be between 0 and 1.")


class ANPTrainer(MaskTrainer):
    """
    Adversarial neuron pruning (Wu & Wang, NeurIPS 2021).

    A neuron is a channel of a BatchNorm with scale w and shift b, perturbed to ((m + δ) w, (1 + ξ) b). The masks m
    minimise `anp_alpha · L(m) + (1 − anp_alpha) · max L(m; δ, ξ)` over |δ|, |ξ| ≤ `anp_epsilon`, the maximum by
    sign-gradient steps from a uniform draw. Then w = 0 where m ≤ `pruning_threshold`; b, the statistics and every
    other weight stay as received. In a model without BatchNorm (a ViT) the neurons are the channels of its LayerNorm
    layers.

    Two departures from the authors' code: δ and ξ are kept within the bound, as the paper has it (there the step may
    lead to twice of it), and the threshold is the paper's fixed one, not read from a table of test ASR. With gradient
    accumulation, each micro-batch has its own perturbation.
    """

    _config_class = ANPConfig

    def make_masks(self, model) -> dict[str, Tensor]:
        return ones_over_channels(model)

    def masked_loss(self, inputs, num_items_in_batch=None) -> Tensor:
        natural = self.loss_with(self.masked_parameters(), inputs, num_items_in_batch)
        robust = self.loss_with(self._perturbed(*self._perturbation(inputs)), inputs, num_items_in_batch)
        return self.args.anp_alpha * natural + (1 - self.args.anp_alpha) * robust

    def _perturbation(self, inputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """δ by name of a scale and ξ by name of a shift, at the present masks."""
        epsilon, steps = self.args.anp_epsilon, self.args.anp_steps
        own = dict(self._unwrapped().named_parameters())
        shifts = [f"{name}.bias" for name, _ in channel_scales(self._unwrapped()) if f"{name}.bias" in own]
        names = [*self.masks, *shifts]
        draws = {name: torch.empty_like(own[name]).uniform_(-epsilon, epsilon) for name in names}
        for _ in range(steps):
            leaves = {name: draw.detach().requires_grad_() for name, draw in draws.items()}
            loss = self.loss_with(self._perturbed(*self._split(leaves)), inputs)
            slopes = torch.autograd.grad(loss, list(leaves.values()))
            draws = {
                name: (draw + epsilon / steps * slope.sign()).clamp(-epsilon, epsilon)
                for (name, draw), slope in zip(draws.items(), slopes, strict=True)
            }
        return self._split(draws)

    def _split(self, draws: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        scales = {name: draw for name, draw in draws.items() if name in self.masks}
        return scales, {name: draw for name, draw in draws.items() if name not in self.masks}

    def _perturbed(self, delta: dict[str, Tensor], xi: dict[str, Tensor]) -> dict[str, Tensor]:
        own = dict(self._unwrapped().named_parameters())
        scales = {name: own[name].detach() * (mask + delta[name]) for name, mask in self.masks.items()}
        return scales | {name: own[name].detach() * (1 + draw) for name, draw in xi.items()}

    def finish(self) -> None:
        self.model_changed()
        self.pruned_channels = prune(self._unwrapped(), self.masks, self.args.pruning_threshold)
