"""AWM: soft masks of single weights, learned against a universal perturbation.

Source: Chai and Chen, *One-shot Neural Backdoor Erasing via Adversarial Weight Masking*, NeurIPS 2022.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..fisher.passes import in_eval_mode
from .base import BaselineConfig
from .masks import MaskTrainer, WithParameters
from .passes import CleanData, Rounds, seed_of
from .universal import PixelScale, check_takes_images, universal_perturbation

_DELTA = "perturbation"  # in `kept`


@dataclass
class AWMConfig(BaselineConfig):
    """Arguments of [`AWMTrainer`], with the defaults of the authors' code: 20 rounds of 5 epochs of Adam (0.01).

    Args:
        awm_alpha (`float`, *optional*, defaults to 0.9):
            Share of the loss of the clean images; the rest is that of the perturbed ones.
        awm_gamma (`float`, *optional*, defaults to 1e-8):
            Weight of the sum of the masks.
        trigger_size (`float`, *optional*, defaults to 0.3255):
            Largest mean |δ| over its values, in pixels of [0, 1]: the paper's ‖δ‖₁ ≤ 1000 for 3×32×32 images.
        epochs_of_round (`int`, *optional*, defaults to 5):
            Epochs of the masks between two perturbations, and passes that make each of those.
        perturbation_learning_rate (`float`, *optional*, defaults to 10.0):
            Step of the ascent that makes δ.

    Raises:
        ValueError: for a number out of range.
    """

    awm_alpha: float = field(default=0.9, metadata={"help": "Share of the loss of the clean images."})
    awm_gamma: float = field(default=1e-8, metadata={"help": "Weight of the sum of the masks."})
    trigger_size: float = field(default=0.3255, metadata={"help": "Largest mean absolute perturbation, in pixels."})
    epochs_of_round: int = field(default=5, metadata={"help": "Epochs between two perturbations, and passes to one."})
    perturbation_learning_rate: float = field(default=10.0, metadata={"help": "Step of the ascent to it."})
    optim: str = field(default="adamw_torch", metadata={"help": "The optimizer to use (without decay: Adam)."})
    learning_rate: float = field(default=0.01, metadata={"help": "The initial learning rate."})
    lr_scheduler_type: str = field(default="linear", metadata={"help": "The learning-rate schedule."})
    num_train_epochs: float = field(default=100.0, metadata={"help": "Epochs of the masks."})
    per_device_train_batch_size: int = field(default=128, metadata={"help": "Images of a batch."})

    def check(self) -> None:
        super().check()
        if not 0 <= self.awm_alpha <= 1:
            raise ValueError(f"awm_alpha={self.awm_alpha} has to be between 0 and 1.")
        for name in ("awm_gamma", "perturbation_learning_rate"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} has to be zero or positive.")
        if not self.trigger_size > 0:
            raise ValueError(f"trigger_size={self.trigger_size} has to be positive.")
        if not self.epochs_of_round >= 1:
            raise ValueError(f"epochs_of_round={self.epochs_of_round} has to be at least 1.")


class AWMTrainer(MaskTrainer):
    """
    Adversarial weight masking (Chai & Chen, NeurIPS 2022).

    The masks m of single weights minimise `awm_alpha` · L(x) + (1 − `awm_alpha`) · L(x + δ) + `awm_gamma` · Σ m, where
    x + δ is clipped to [0, 1] and δ is a universal perturbation against the masked model, made anew every
    `epochs_of_round` epochs by gradient ascent from zero and scaled to `trigger_size`. At the end each weight is
    multiplied by its mask. The model is in eval mode throughout.

    Masked are the weights of every convolution and linear layer but the last, the classifier; in a ResNet these are
    the convolutions, as in the authors' code, in a ViT those of attention, MLP and patch embedding. δ is in pixels of
    [0, 1] by the mean and std of `processing_class`; without one, `pixel_values` are taken to be pixels.

    Two departures from the authors' code: epochs draw each image once, and the learning rate falls linearly, not to
    9/10 after each round. Its step that shrinks the model before (off by default there) is left out.

    Raises:
        ValueError: as [`MaskTrainer`]; the model takes no images or has no layer before its classifier; (from `train`)
            data without a length.
    """

    _config_class = AWMConfig

    def __init__(self, model=None, args: AWMConfig | None = None, *positional, **kwargs):
        super().__init__(model, args, *positional, **kwargs)
        self.model_accepts_loss_kwargs = False  # its loss is a mean over the batch, plus that of the masks
        self._scale = PixelScale.of(self.processing_class)
        self.add_callback(Rounds(self, self.args.epochs_of_round))

    def check_model(self, model: nn.Module) -> None:
        check_takes_images(model)
        super().check_model(model)

    def make_masks(self, model: nn.Module) -> dict[str, Tensor]:
        layers = [(name, module) for name, module in model.named_modules() if isinstance(module, (_ConvNd, nn.Linear))]
        if len(layers) < 2:
            raise ValueError(f"{type(model).__name__} has no convolution or linear layer before its classifier.")
        return {f"{name}.weight": torch.ones_like(layer.weight.detach()) for name, layer in layers[:-1]}

    @cached_property
    def _data(self) -> CleanData:
        return CleanData(self, self._train_transform)

    def begin_round(self, seed: int) -> None:
        """Make δ for the present masks."""
        model = self._unwrapped()
        masked = WithParameters(model, {name: weight.detach() for name, weight in self.masked_parameters().items()})
        passes = (self._data.batches(seed_of(seed, number)) for number in range(self.args.epochs_of_round))
        with in_eval_mode(masked):
            delta = universal_perturbation(
                masked, chain.from_iterable(passes), self._scale, self.args.perturbation_learning_rate
            )
        self.kept[_DELTA] = delta * (self.args.trigger_size / delta.abs().mean()).clamp(max=1.0)

    def masked_loss(self, inputs, num_items_in_batch=None) -> Tensor:
        pixels, masked = inputs["pixel_values"], self.masked_parameters()
        perturbed = {**inputs, "pixel_values": self._scale.clipped(self._scale.added(pixels, self.kept[_DELTA]))}
        with in_eval_mode(self._unwrapped()):
            natural = self.loss_with(masked, inputs, num_items_in_batch)
            robust = self.loss_with(masked, perturbed, num_items_in_batch)
        size = sum(mask.abs().sum() for mask in self.masks.values())
        return self.args.awm_alpha * natural + (1 - self.args.awm_alpha) * robust + self.args.awm_gamma * size

    @torch.no_grad()
    def finish(self) -> None:
        self.model_changed()
        own = dict(self._unwrapped().named_parameters())
        for name, mask in self.masks.items():
            own[name].mul_(mask)
