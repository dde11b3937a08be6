"""One perturbation for all images, which I-BAU and AWM take in place of a trigger that they do not know."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..fisher.likelihood import get_logits


@dataclass(frozen=True)
class PixelScale:
    """The model's inputs in units of pixels in [0, 1].

    Attributes:
        mean, std: what the image processor normalises by, one number a channel or one for all. Without a processor
            that normalises, 0 and 1: the inputs are then pixels in [0, 1].
    """

    mean: Any = 0.0
    std: Any = 1.0

    @classmethod
    def of(cls, processor) -> PixelScale:
        processor = getattr(processor, "image_processor", processor)  # of images and text, as CLIP's
        if processor is None or not getattr(processor, "do_normalize", False):
            return cls()
        return cls(processor.image_mean, processor.image_std)

    def added(self, inputs: Tensor, perturbation: Tensor) -> Tensor:
        """Inputs (B, C, H, W) of images x for x + δ, δ (1, C, H, W) in pixels."""
        return inputs + perturbation / self._spread(self.std, inputs)

    def clipped(self, inputs: Tensor) -> Tensor:
        """Inputs of images clipped to [0, 1]."""
        mean, std = self._spread(self.mean, inputs), self._spread(self.std, inputs)
        return inputs.clamp(-mean / std, (1 - mean) / std)

    @staticmethod
    def _spread(values, inputs: Tensor) -> Tensor:
        """(C, 1, 1)"""
        values = np.broadcast_to(np.asarray(values, dtype=np.float32), inputs.shape[1]).copy()
        return torch.from_numpy(values).to(inputs)[:, None, None]


def check_takes_images(model: nn.Module) -> None:
    """Raise a ValueError for a model of other inputs than images."""
    main_input = getattr(model, "main_input_name", "pixel_values")
    if main_input != "pixel_values":
        raise ValueError(
            f"{type(model).__name__} takes {main_input}, and the perturbation is one of pixel_values: use an image "
            "classifier, or another method."
        )


def universal_perturbation(
    model: nn.Module, batches: Iterable[dict], scale: PixelScale, learning_rate: float = 10.0, penalty: float = 0.0
) -> Tensor:
    """δ, (1, C, H, W) in pixels, after one step of gradient ascent a batch, from zero.

    Each step goes up CE(f(x + δ), argmax f(x)) − `penalty` · ‖δ‖². The model has to be in eval mode.

    Raises:
        ValueError: the inputs are no images (B, C, H, W), but clips for example.
    """
    delta = None
    for batch in batches:
        inputs = batch["pixel_values"]
        if inputs.ndim != 4:
            raise ValueError(
                f"The perturbation is one of images, (B, C, H, W), and pixel_values are {tuple(inputs.shape)}: use "
                "another method."
            )
        if delta is None:
            delta = torch.zeros_like(inputs[:1])
        with torch.no_grad():
            answers = get_logits(model(pixel_values=inputs)).argmax(-1)
        delta.requires_grad_()
        loss = cross_entropy(get_logits(model(pixel_values=scale.added(inputs, delta))), answers)
        (slope,) = torch.autograd.grad(loss - penalty * delta.square().sum(), delta)
        delta = delta.detach() + learning_rate * slope
    return delta
