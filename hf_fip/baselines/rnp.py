"""RNP: a copy that unlearned the clean data, recovered by masks of its filters, shows which to prune.

Source: Li et al., *Reconstructive Neuron Pruning for Backdoor Defense*, ICML 2023.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import MultiStepLR

from ..fisher.likelihood import get_logits
from ..fisher.passes import RandomState, preserved_buffers
from ..lone_sample import lone_sample
from .base import BaselineConfig
from .masks import MaskTrainer, ones_over_channels, prune
from .passes import CleanData, seed_of

_UNLEARNED = "unlearned."  # in `kept`
_LARGEST_GRADIENT = 20.0
_MILESTONES = (10, 20)  # epochs at which the learning rate of unlearning falls to a tenth


@dataclass
class RNPConfig(BaselineConfig):
    """Arguments of [`RNPTrainer`], with the defaults of the authors' code: 20 epochs of SGD (0.2), 128 images.

    Args:
        unlearning_learning_rate (`float`, *optional*, defaults to 0.01):
            Of SGD with momentum 0.9 and weight decay 0.0005, which unlearns.
        unlearning_epochs (`int`, *optional*, defaults to 21):
            Unlearn for at most so many epochs.
        unlearning_accuracy (`float`, *optional*, defaults to 0.2):
            Stop unlearning at an accuracy on the clean data (during the epoch) of at most this.
        recovering_alpha (`float`, *optional*, defaults to 0.2):
            Weight of the loss of recovering.
        pruning_threshold (`float`, *optional*, defaults to 0.2):
            Prune filters with a mask at most so large.

    Raises:
        ValueError: for a number out of range.
    """

    unlearning_learning_rate: float = field(default=0.01, metadata={"help": "Learning rate of unlearning."})
    unlearning_epochs: int = field(default=21, metadata={"help": "Unlearn for at most so many epochs."})
    unlearning_accuracy: float = field(default=0.2, metadata={"help": "Unlearn down to this accuracy (0 to 1)."})
    recovering_alpha: float = field(default=0.2, metadata={"help": "Weight of the loss of recovering."})
    pruning_threshold: float = field(default=0.2, metadata={"help": "Prune filters with a mask at most so large."})
    learning_rate: float = field(default=0.2, metadata={"help": "The initial learning rate of the masks."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "The learning-rate schedule."})
    num_train_epochs: float = field(default=20.0, metadata={"help": "Epochs of recovering."})
    per_device_train_batch_size: int = field(default=128, metadata={"help": "Images of a batch."})

    def check(self) -> None:
        super().check()
        for name in ("unlearning_learning_rate", "recovering_alpha"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} has to be positive.")
        if not self.unlearning_epochs >= 1:
            raise ValueError(f"unlearning_epochs={self.unlearning_epochs} has to be at least 1.")
        for name in ("unlearning_accuracy", "pruning_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} has to be between 0 and 1.")


class RNPTrainer(MaskTrainer):
    """
    Reconstructive neuron pruning (Li et al., ICML 2023).

    1. *Unlearn*: all weights of a copy climb the loss of the clean data, until its accuracy on them is low.
    2. *Recover*: masks m of the filters (the scales of BatchNorm) of that copy minimise `recovering_alpha` · loss.
    3. *Prune* the received model: the scale is zero where m ≤ `pruning_threshold`. All else stays as received.

    In a model without BatchNorm (a ViT) the filters are the channels of its LayerNorm layers.

    Two departures from the authors' code: it moves the threshold per attack, by tables of test ASR, and here it is
    fixed (at ANP's 0.2); and the gradient of unlearning is clipped to norm 20 after the backward pass, not before it,
    where that does nothing. A run killed while it unlearns begins anew.

    Raises:
        ValueError: as [`MaskTrainer`]; (from `train`) data without a length.
    """

    _config_class = RNPConfig

    def make_masks(self, model) -> dict[str, Tensor]:
        return ones_over_channels(model)

    def begin(self) -> None:
        super().begin()
        found = RandomState.capture(self.args.device)
        torch.manual_seed(self.args.seed)
        unlearned = self.unlearn()
        found.restore()
        self.kept |= {_UNLEARNED + name: weight.detach() for name, weight in unlearned.items()}

    def unlearn(self) -> dict[str, Tensor]:
        """The weights of the unlearned copy; `unlearned_accuracy` is what it had in its last epoch."""
        args, model = self.args, self.model.train()
        weights = {name: weight.detach().clone().requires_grad_() for name, weight in model.named_parameters()}
        optimizer = torch.optim.SGD(
            weights.values(), lr=args.unlearning_learning_rate, momentum=0.9, weight_decay=5e-4
        )
        scheduler = MultiStepLR(optimizer, milestones=_MILESTONES)
        data, label_name = CleanData(self, self._train_transform), (self.label_names or ["labels"])[0]
        with preserved_buffers(model):  # BatchNorm runs on the statistics of each batch
            for epoch in range(args.unlearning_epochs):
                right = seen = 0
                for batch in data.batches(seed_of(args.seed, epoch)):
                    inputs, labels = dict(batch), batch[label_name]
                    del inputs[label_name]
                    with lone_sample(model, inputs):
                        logits = get_logits(functional_call(model, weights, (), inputs))
                    right += (logits.argmax(-1) == labels).sum().item()
                    seen += len(labels)
                    optimizer.zero_grad()
                    (-cross_entropy(logits, labels)).backward()
                    clip_grad_norm_(weights.values(), _LARGEST_GRADIENT)
                    optimizer.step()
                scheduler.step()
                self.unlearned_accuracy = right / seen
                if self.unlearned_accuracy <= args.unlearning_accuracy:
                    break
        return weights

    def masked_loss(self, inputs, num_items_in_batch=None) -> Tensor:
        unlearned = {
            name.removeprefix(_UNLEARNED): weight for name, weight in self.kept.items() if name.startswith(_UNLEARNED)
        }
        masked = {name: unlearned[name] * mask for name, mask in self.masks.items()}
        return self.args.recovering_alpha * self.loss_with({**unlearned, **masked}, inputs, num_items_in_batch)

    def finish(self) -> None:
        self.model_changed()
        self.pruned_channels = prune(self._unwrapped(), self.masks, self.args.pruning_threshold)
