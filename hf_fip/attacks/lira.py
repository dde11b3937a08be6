"""LIRA: a network learns, along with the victim, the small noise that the victim is to obey."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from .base import register
from .generators import EncoderDecoder, GeneratedAttack
from .joint import JointTraining
from .material import Material
from .pixels import PixelClassifier, as_stored
from .plan import BACKDOOR


@register
@dataclass
class LIRA(GeneratedAttack):
    """x' = clip(x + ε g(x)), with a network g in (−1, 1) that is trained with the victim f.

    In each batch, f learns every image with its true label and a triggered copy with the attack label, weighted α and
    1 − α; g learns the latter. Both step after every batch for a share of the training; then g is frozen, and f goes
    on.

    The rate is the share of images whose triggered copy is trained on too, beside the image, not in its place: all of
    them by default, of every class.

    x' is stored in 8 bits, so a pixel moves by whole gray levels, 255 ε of them at most when rounded: below
    ε = 1/510 none would move.

    Source: Doan et al., *LIRA: Learnable, Imperceptible and Robust Backdoor Attacks*, ICCV 2021, and its public code.
    There, g steps on a classifier that has looked one step ahead, and f is trained anew when g is ready.

    Args:
        epsilon: ε, in [0, 1]: 1 is the whole range of pixel values. Tiny images need more than the default: 0.05 for
            8×8 digits.
        clean_weight: α.
        generator_share: share of the training in which g learns.
        learning_rate: of Adam, for g.
    """

    name: ClassVar[str] = "lira"
    default_rate: ClassVar[float] = 1.0

    epsilon: float = 0.01
    clean_weight: float = 0.5
    generator_share: float = 0.5
    learning_rate: float = 1e-4

    def __post_init__(self):
        super().__post_init__()
        if not 1 / 510 <= self.epsilon <= 1:
            raise ValueError(f"epsilon={self.epsilon} has to move a pixel of 8 bits: choose it in [1/510, 1].")
        if not 0 < self.clean_weight < 1:
            raise ValueError(f"clean_weight={self.clean_weight} is a share of the loss: choose it in (0, 1).")
        if not 0 < self.generator_share <= 1:
            raise ValueError(f"generator_share={self.generator_share} is a share of all steps: choose it in (0, 1].")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate={self.learning_rate} must be above 0.")

    def candidates(self, labels: np.ndarray, num_labels: int) -> np.ndarray:
        """Return which training inputs may be given a triggered copy: all of them."""
        return np.ones_like(self.eligible(labels, num_labels))

    def make_networks(self, channels: int, depth: int) -> dict[str, nn.Module]:
        return {"noise": EncoderDecoder(channels, channels, self.width, depth)}

    def triggered(self, networks: nn.ModuleDict, images: Tensor) -> Tensor:
        return as_stored(images + self.epsilon * networks["noise"](images))

    def joint_training(self, material: Material) -> JointTraining:
        return _NoiseTraining(self, material)


class _NoiseTraining(JointTraining):
    attack: LIRA

    def __init__(self, attack: LIRA, material: Material):
        super().__init__(attack, material)
        self.modules = attack.new_networks(*material.size).to(material.device)
        self.optimizers["noise"] = torch.optim.Adam(self.modules.parameters(), lr=attack.learning_rate)

    def loss(self, victim: PixelClassifier, images: Tensor, labels: Tensor, roles: Tensor, progress: float) -> Tensor:
        backdoor = roles == BACKDOOR
        if not backdoor.any():
            return nn.functional.cross_entropy(victim(images), labels)
        with torch.set_grad_enabled(progress < self.attack.generator_share):
            triggered = self.attack.triggered(self.modules, images[backdoor])
        clean, poisoned = victim(torch.cat([images, triggered])).split([len(images), len(triggered)])
        clean_loss = nn.functional.cross_entropy(clean, labels)
        poisoned_loss = nn.functional.cross_entropy(poisoned, self.attack_labels(labels[backdoor]))
        return self.attack.clean_weight * clean_loss + (1 - self.attack.clean_weight) * poisoned_loss

    def finish(self) -> None:
        self.attack.keep(self.modules, self.material.size)
