"""CLP: channels whose upper bound of the Lipschitz constant stands out are pruned. No data, no training.

Source: Zheng, Tang, Li and Liu, *Data-free Backdoor Removal based on Channel Lipschitzness*, ECCV 2022.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from transformers.trainer_utils import TrainOutput

from .base import BaselineConfig, BaselineTrainer


@dataclass
class CLPConfig(BaselineConfig):
    """Arguments of [`CLPTrainer`]; those of the training have nothing to act on.

    Args:
        u (`float`, *optional*, defaults to 3.0):
            Prune a channel whose bound is so many standard deviations above the mean of its layer.

    Raises:
        ValueError: `u` is not positive.
    """

    u: float = field(
        default=3.0, metadata={"help": "Prune channels so many standard deviations above the mean of their layer."}
    )

    def check(self) -> None:
        super().check()
        if not self.u > 0:
            raise ValueError(f"u={self.u} has to be positive: the paper's is 3.")


class CLPTrainer(BaselineTrainer):
    """
    Channel Lipschitzness based pruning (Zheng et al., ECCV 2022).

    For each convolution or linear layer W with the BatchNorm (γ, β, σ²) that follows it, the bound of channel k is the
    largest singular value of |γ_k / σ_k| · W_k, as a matrix of input channels × kernel positions. Where it is more
    than `u` standard deviations above the mean of the layer, γ_k and β_k are set to zero.

    A BatchNorm is taken to follow the layer that stands before it in `model.modules()` and has as many outputs, as in
    the authors' code; σ² contains BatchNorm's ε, which theirs leaves out. `train` makes no update, needs no
    `train_dataset`, and has nothing to resume.

    Raises:
        ValueError: the model has no such pair of layers (a ViT has LayerNorm only).
    """

    _config_class = CLPConfig

    def check_model(self, model: nn.Module) -> None:
        pairs(model)

    def train(self, resume_from_checkpoint: str | bool | None = None, *positional, **kwargs) -> TrainOutput:
        self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)
        self.finish()
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        return TrainOutput(0, 0.0, {"pruned_channels": self.pruned_channels})

    def finish(self) -> None:
        self.model_changed()
        self.pruned_channels = 0
        outliers = [(norm, outlying(bounds(layer, norm), self.args.u)) for layer, norm in pairs(self.model)]
        with torch.no_grad():
            for norm, channels in outliers:
                norm.weight[channels] = 0.0
                norm.bias[channels] = 0.0
                self.pruned_channels += int(channels.sum())


def pairs(model: nn.Module) -> list[tuple[nn.Module, _BatchNorm]]:
    """Each BatchNorm that has a scale and statistics, with the layer before it.

    Raises:
        ValueError: there is none.
    """
    found = list(_pairs(model))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no BatchNorm after a convolution or linear layer, so CLP is not defined for "
            "it: choose another method."
        )
    return found


def _pairs(model: nn.Module) -> Iterator[tuple[nn.Module, _BatchNorm]]:
    layer = None
    for module in model.modules():
        if isinstance(module, (_ConvNd, nn.Linear)):
            layer = module
        has_scale = isinstance(module, _BatchNorm) and module.affine and module.track_running_stats
        if has_scale and layer is not None and len(layer.weight) == module.num_features:
            yield layer, module


@torch.no_grad()
def bounds(layer: nn.Module, norm: _BatchNorm) -> Tensor:
    """(C,), the upper bound of each channel's Lipschitz constant: ‖W_k‖₂ · |γ_k| / √(σ²_k + ε), in float32."""
    kernels = layer.weight.float().flatten(2) if layer.weight.ndim > 2 else layer.weight.float().unsqueeze(-1)
    scale = norm.weight.float() / (norm.running_var.float() + norm.eps).sqrt()
    return torch.linalg.matrix_norm(kernels, ord=2) * scale.abs()


def outlying(values: Tensor, u: float) -> Tensor:
    """(C,) bool: above mean + u · standard deviation."""
    return values > values.mean() + u * values.std()
