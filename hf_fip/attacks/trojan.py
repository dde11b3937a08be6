"""Trojan (Troj-one, Troj-all): a patch that is trained to excite units of a clean model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from .base import register
from .learned import LearnedAttack

if TYPE_CHECKING:
    from torch import Tensor

    from .material import Material

IMAGES = 32  # that the trigger is learned on


@register
@dataclass
class TrojOne(LearnedAttack):
    """x' = p in the bottom-right patch, x outside; p drives units of a clean model's last layer to a high value.

    The units are the inputs of the last linear layer with the largest Σ |weight| over the classes. From noise drawn by
    the seed, p takes steps against the sign of the gradient of Σ (unit − activation)², clipped and rounded to 8 bits;
    the best p met is kept. The sum runs over 32 training images that carry p, drawn by the seed as well. (On one that
    is black around p, as public code has it, a ReLU can leave the units at zero and p without a gradient.)

    Source: Liu et al., *Trojaning Attack on Neural Networks*, NDSS 2018.

    Args:
        patch_size: side of the patch in pixels.
        units: number of units.
        activation: what they are driven to.
        step_size: length of a step, for pixels in [0, 1].
        steps: number of steps at most; they end when p comes back to where it was.
    """

    name: ClassVar[str] = "troj_one"

    patch_size: int = 3
    units: int = 2
    activation: float = 100.0
    step_size: float = 0.1
    steps: int = 1000

    def __post_init__(self):
        super().__post_init__()
        for option in ("patch_size", "units", "steps"):
            if getattr(self, option) < 1:
                raise ValueError(f"{option}={getattr(self, option)} must be 1 or more.")
        if self.activation <= 0:
            raise ValueError(f"activation={self.activation} must be above 0.")
        if not 1 / 255 <= self.step_size <= 1:
            raise ValueError(f"step_size={self.step_size} is for pixels of 8 bits in [0, 1]: choose it in [1/255, 1].")

    def blank_tensors(self, height: int, width: int, channels: int) -> dict[str, np.ndarray]:
        side = self.patch_size
        if side > min(height, width):
            raise ValueError(
                f"patch_size={side} does not fit an image of {height}×{width} pixels: "
                f"choose {min(height, width)} or less."
            )
        return {
            "pattern": np.zeros((side, side, channels), dtype=np.uint8),
            "size": np.array([height, width, channels], dtype=np.int64),
        }

    def fit(self, material: Material) -> None:
        """Train the patch on the material's clean model.

        Raises:
            ValueError: the patch does not fit the images; there is no clean model, or it does not end in a linear
                layer with that many inputs.
        """
        from .pixels import to_batch, to_image, to_tensor
        from .poison import to_array

        blank, rng = self.blank_tensors(*material.size), np.random.default_rng(self.seed)
        noise = rng.integers(0, 256, blank["pattern"].shape, dtype=np.uint8)
        count = len(material.images)
        rows = rng.choice(count, size=min(IMAGES, count), replace=False)
        images = to_batch([to_array(material.images[int(row)]["image"]) for row in rows], material.size)
        pattern = self._trained(to_tensor(noise).to(material.device), images.to(material.device), material)
        self.tensors = {**blank, "pattern": to_image(pattern)}

    def _trained(self, pattern: Tensor, images: Tensor, material: Material) -> Tensor:
        """The best of the patterns met from `pattern`, (1, C, side, side) in [0, 1] and in 8 bits."""
        import torch
        from tqdm.auto import tqdm

        from .pixels import as_stored

        side, lowest, best, met = self.patch_size, float("inf"), pattern, set()
        with material.classifier.last_linear() as last:
            for _ in tqdm(range(self.steps), desc=f"{self.name}, trigger", disable=not material.progress):
                if (found := pattern.cpu().numpy().tobytes()) in met:
                    break
                met.add(found)
                triggered, pattern = images.clone(), pattern.requires_grad_()
                triggered[..., -side:, -side:] = pattern
                logits = material.classifier(triggered)
                cost = (self._units(last, logits.shape[-1]) - self.activation).square().sum()
                if cost.item() < lowest:
                    lowest, best = cost.item(), pattern
                (gradient,) = torch.autograd.grad(cost, pattern)
                pattern = as_stored(pattern.detach() - self.step_size * gradient.sign())
        return best

    def _units(self, last: list, num_labels: int) -> Tensor:
        """The values of the units, from the linear layer that was called last and its input."""
        if not last or last[0].out_features != num_labels:
            raise ValueError(
                f"{self.name} learns its trigger on the inputs of the last nn.Linear, but the clean model does not "
                f"end in one with {num_labels} outputs: give another clean model."
            )
        layer, inputs = last
        if self.units > layer.in_features:
            raise ValueError(f"units={self.units}, but the last layer has {layer.in_features} inputs: choose fewer.")
        return inputs[..., layer.weight.abs().sum(dim=0).topk(self.units).indices]

    def _trigger(self, image: np.ndarray) -> np.ndarray:
        triggered = image.copy()
        triggered[-self.patch_size :, -self.patch_size :] = self.tensors["pattern"]
        return triggered


@register
@dataclass
class TrojAll(TrojOne):
    """Troj-one with every class a target: y becomes (y + 1) mod K. See `TrojOne`."""

    name: ClassVar[str] = "troj_all"

    label_rule: str = "all_to_all"
