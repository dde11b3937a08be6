"""NFT: neural mask fine-tuning, which learns one factor a neuron on images mixed by MixUp.

Source: Karim et al., *Augmented Neural Fine-Tuning for Efficient Backdoor Purification*, ECCV 2024.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Beta
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import TrainerCallback
from transformers.trainer_utils import has_length

from .base import BaselineConfig, BaselineTrainer, head_of


@dataclass
class NFTConfig(BaselineConfig):
    """Arguments of [`NFTTrainer`], with the defaults of the authors' public code.

    SGD with momentum 0.95, learning rate 0.05 with a cosine to 0.02 (at every update, not every 200), no weight decay,
    1,000 updates of batches of 128.

    Raises:
        ValueError: a number is out of range; `max_grad_norm` is set, which would clip the weights' gradient and not
            the masks'.
    """

    learning_rate: float = field(default=0.05, metadata={"help": "The initial learning rate of the masks."})
    lr_scheduler_type: str = field(default="cosine_with_min_lr", metadata={"help": "The learning-rate schedule."})
    lr_scheduler_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Of the schedule (for cosine_with_min_lr, min_lr=0.02 unless you set them)."}
    )
    max_steps: int = field(default=1000, metadata={"help": "Updates; -1 for num_train_epochs."})
    per_device_train_batch_size: int = field(default=128, metadata={"help": "Images a device and step."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Zero: the masks' gradient is not clipped."})
    mixup_alpha: float = field(default=1.0, metadata={"help": "MixUp's share of the first image is Beta(a, a)."})
    mask_regularizer: float = field(
        default=1e-3, metadata={"help": "Weight of the sum of |1 - m|, divided by the clean images a class."}
    )
    floor_scale: float = field(default=0.8, metadata={"help": "a of the floor a exp(-b l) of the masks of layer l."})
    floor_decay: float = field(default=0.5, metadata={"help": "b of the floor a exp(-b l) of the masks of layer l."})

    def __post_init__(self):
        if self.optim == "sgd" and self.optim_args is None:
            self.optim_args = "momentum=0.95"
        if self.lr_scheduler_type == "cosine_with_min_lr" and self.lr_scheduler_kwargs is None:
            self.lr_scheduler_kwargs = {"min_lr": 0.02}
        super().__post_init__()

    def check(self) -> None:
        super().check()
        if self.max_grad_norm:
            raise ValueError(f"max_grad_norm={self.max_grad_norm} would not clip the masks' gradient: leave it at 0.")
        if not 0 < self.mixup_alpha < math.inf:
            raise ValueError(f"mixup_alpha={self.mixup_alpha} has to be positive, and finite.")
        for name in ("mask_regularizer", "floor_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} has to be zero or positive, and finite.")
        if not 0 <= self.floor_scale <= 1:
            raise ValueError(f"floor_scale={self.floor_scale} has to lie between 0 and 1, the value of a whole mask.")


class NFTTrainer(BaselineTrainer):
    """
    Learns masks m of neurons, weight = m · received weight, by L_MixUp + (η / N_c) Σ |1 − m|; N_c is the number of
    clean images a class.

    A neuron is a channel of a BatchNorm, whose weight is masked (as in the public code), or, in a model without
    BatchNorm, a row of a Linear or Conv layer other than the head (as in the paper's formula: a ViT). Biases are not
    masked, and nothing but the masks is trained; BatchNorm statistics move with the mixed images. After each update
    masks are clipped to [α exp(−β l), 1], l = 1 for the first masked layer, and multiplied into the weights: the model
    is a plain one at every moment. MixUp draws one share λ ~ Beta(a, a) a batch and adds λ · loss(y) and (1 − λ) ·
    loss(y of the other image).

    Batches go through the data epoch by epoch; the public code draws them with replacement. Masks and received weights
    are in each checkpoint. Logs `mask_distance`, the regulariser.

    Raises:
        ValueError: the model takes tokens, no layer has neurons to mask, with `compute_loss_func` or with `optimizers`
            of one's own; (from `train`) the clean images have no length, or come without labels.
    """

    _config_class = NFTConfig
    _keeps = True

    def __init__(self, *positional, **kwargs):
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("NFT mixes images and their losses: leave compute_loss_func out.")
        if kwargs.get("optimizers", (None, None))[0] is not None:
            raise ValueError("NFT makes an optimizer of its masks: set `optim` and leave `optimizers` out.")
        super().__init__(*positional, **kwargs)
        self.model_accepts_loss_kwargs = False  # its loss is a mean over the batch
        self.add_callback(_MaskSteps(self))

    def check_model(self, model: nn.Module) -> None:
        if getattr(model, "main_input_name", None) == "input_ids":
            raise ValueError(f"{type(model).__name__} takes input_ids, which cannot be mixed: choose another method.")
        masked_weights(model)

    def begin(self) -> None:
        for name, weight in masked_weights(self.model).items():
            self.kept[f"received.{name}"] = weight.detach().clone()
            self.kept[f"mask.{name}"] = weight.new_ones(len(weight))

    def create_optimizer(self, model=None):
        for name in masked_weights(self.model):
            self.kept[f"mask.{name}"] = nn.Parameter(self.kept[f"mask.{name}"])
        optimizer, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        masks = [mask for _, mask, _ in self.masks()]
        self.optimizer = optimizer([{"params": masks, "weight_decay": self.args.weight_decay}], **options)
        return self.optimizer

    def masks(self) -> list[tuple[nn.Parameter, nn.Parameter, Tensor]]:
        """Weight, its mask (a number a row) and the received weight, of each masked layer in order."""
        weights = masked_weights(self._unwrapped())
        return [(weight, self.kept[f"mask.{name}"], self.kept[f"received.{name}"]) for name, weight in weights.items()]

    # ---- One update ----

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not (model.training and torch.is_grad_enabled()):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)
        if "labels" not in inputs:
            raise ValueError(
                "NFT mixes the labels of the clean images, and the batch has none: give each image its `labels`."
            )
        labels, name = inputs.pop("labels"), getattr(self._unwrapped(), "main_input_name", "pixel_values")
        share = Beta(self.args.mixup_alpha, self.args.mixup_alpha).sample().item()
        other = torch.randperm(len(labels)).to(labels.device)
        inputs[name] = share * inputs[name] + (1 - share) * inputs[name][other]
        outputs = model(**inputs)
        logits = outputs["logits"]
        smoothing = self.args.label_smoothing_factor
        loss = share * F.cross_entropy(logits, labels, label_smoothing=smoothing)
        loss = loss + (1 - share) * F.cross_entropy(logits, labels[other], label_smoothing=smoothing)
        return (loss, outputs) if return_outputs else loss

    def _set_up(self) -> None:
        super()._set_up()
        if not has_length(self.train_dataset):
            raise ValueError("NFT divides its regulariser by the clean images a class: pass a dataset with a length.")
        classes = head_of(self._unwrapped()).out_features
        self._regularizer = self.args.mask_regularizer * classes / len(self.train_dataset)

    def _add_regularisers(self):
        penalty, distance = super()._add_regularisers(), 0.0
        for weight, mask, received in self.masks():
            if weight.grad is None:  # of a layer that the model does not use
                continue
            mask.grad = (weight.grad * received).flatten(1).sum(1) if weight.ndim > 1 else weight.grad * received
            self._add_to_grad([mask], [torch.sign(mask.detach() - 1)], self._regularizer)
            distance += self._regularizer * (1 - mask.detach()).abs().sum().item()
        self._metrics["mask_distance"].append(distance)
        return penalty + distance

    @torch.no_grad()
    def apply_masks(self) -> None:
        """Clip the masks, and multiply them into the received weights."""
        for layer, (weight, mask, received) in enumerate(self.masks(), start=1):
            mask.clamp_(self.args.floor_scale * math.exp(-self.args.floor_decay * layer), 1.0)
            weight.copy_(mask.view(-1, *[1] * (weight.ndim - 1)) * received)


class _MaskSteps(TrainerCallback):
    def __init__(self, trainer: NFTTrainer):
        self.trainer = trainer

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.apply_masks()


def masked_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights whose rows NFT masks, by the name of their layer, in the order in which modules are defined.

    Raises:
        ValueError: there are none that are trainable.
    """
    head = head_of(model)
    norms = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    layers = norms or {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and module is not head
    }
    weights = {name: module.weight for name, module in layers.items() if module.weight is not None}
    weights = {name: weight for name, weight in weights.items() if weight.requires_grad}
    if not weights:
        raise ValueError(f"{type(model).__name__} has no trainable layer with neurons that NFT could mask.")
    return weights
