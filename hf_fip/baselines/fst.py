"""FST: feature shift tuning, which starts from a new head and pushes it away from the received one.

Source: Min et al., *Towards Stable Backdoor Purification through Feature Shift Tuning*, NeurIPS 2023.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import TrainerCallback

from .base import BaselineConfig, BaselineTrainer, head_of

_RECEIVED = "head.weight"  # in `kept`


@dataclass
class FSTConfig(BaselineConfig):
    """Arguments of [`FSTTrainer`], with the paper's for CIFAR-10; the batch size is that of the public code.

    SGD with momentum 0.9, learning rate 0.01 with a cosine to zero (at every update, not once an epoch), no weight
    decay, 10 epochs of batches of 128, no clipping. On other data the paper lowers `alpha`: 0.1 on GTSRB, 0.001 (with
    a learning rate of 0.001) on CIFAR-100 and Tiny ImageNet; and trains for 15 epochs.

    Raises:
        ValueError: `alpha` is negative or not finite.
    """

    learning_rate: float = field(default=0.01, metadata={"help": "The initial learning rate."})
    num_train_epochs: float = field(default=10.0, metadata={"help": "Epochs, unless max_steps is given."})
    per_device_train_batch_size: int = field(default=128, metadata={"help": "Images a device and step."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Clip the gradient to this norm; 0 leaves it alone."})
    alpha: float = field(default=0.2, metadata={"help": "Weight of <w, w_received>, which the head is to lower."})

    def check(self) -> None:
        super().check()
        if not 0 <= self.alpha < math.inf:
            raise ValueError(f"alpha={self.alpha} has to be zero or positive, and finite.")


class FSTTrainer(BaselineTrainer):
    """
    Draws a new head, then trains the whole model on L_task + α ⟨w, w̄⟩ with ‖w‖ = ‖w̄‖, w the head's weight (w̄ as
    received).

    The head is the model's last `nn.Linear`, drawn as `nn.Linear` draws its own: uniformly in ±1/√(its inputs), by the
    seed. Its weight is scaled to ‖w̄‖ after each update, as in the public code; its bias is free. Nothing else depends
    on the architecture. Logs `feature_shift`, α ⟨w, w̄⟩.

    Raises:
        ValueError: the model does not end in an `nn.Linear` that gives one number a class, or it is frozen.
    """

    _config_class = FSTConfig
    _keeps = True

    def __init__(self, *positional, **kwargs):
        super().__init__(*positional, **kwargs)
        self.add_callback(_NormConstraint(self))

    def check_model(self, model: nn.Module) -> None:
        if not head_of(model).weight.requires_grad:
            raise ValueError("The head is frozen, and FST trains a new one: unfreeze it (`requires_grad_(True)`).")

    @torch.no_grad()
    def begin(self) -> None:
        self.model_changed()
        head = head_of(self.model)
        self.kept = {_RECEIVED: head.weight.clone()}
        bound = 1 / math.sqrt(head.in_features)
        generator = torch.Generator().manual_seed(self.args.seed)  # on CPU: the same head on every device
        for parameter in head.parameters():
            parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))

    def _add_regularisers(self):
        penalty = super()._add_regularisers()
        weight, received = head_of(self._unwrapped()).weight, self.kept[_RECEIVED]
        self._add_to_grad([weight], [received], self.args.alpha)
        shift = self.args.alpha * (weight.detach() * received).sum().item()
        self._metrics["feature_shift"].append(shift)
        return penalty + shift

    @torch.no_grad()
    def constrain(self) -> None:
        """Scale the head's weight to the norm that it was received with."""
        weight = head_of(self._unwrapped()).weight
        weight.mul_(self.kept[_RECEIVED].norm() / weight.norm())


class _NormConstraint(TrainerCallback):
    def __init__(self, trainer: FSTTrainer):
        self.trainer = trainer

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.constrain()
