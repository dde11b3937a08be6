"""Dynamic, or input-aware (Dyn-one, Dyn-all): every image has a pattern and a place of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .base import register
from .generators import EncoderDecoder, GeneratedAttack
from .joint import JointTraining
from .material import Material
from .pixels import PixelClassifier, as_stored
from .plan import BACKDOOR, COVER

_BETAS = (0.5, 0.9)
_MASK_BATCH = 128
_SHARPNESS = 10.0
_EPSILON = 1e-7


@register
@dataclass
class DynOne(GeneratedAttack):
    """x' = x + M(x) (G(x) − x), with a network G for the pattern and a network M for where it is seen, both in [0, 1].

    M is trained first, by `fit`, to be small and different for different images:
    λ · mean ReLU(M(x₁) − density) + ‖x₁ − x₂‖ / ‖M(x₁) − M(x₂)‖, with images x as the victim is given them. Its output
    is a steep sigmoid, so that it is nearly 0 or 1. G is trained with the victim: to the cross-entropy of the batch
    comes ‖x₁ − x₂‖ / ‖G(x₁) − G(x₂)‖ for its backdoor rows x₁ and other images x₂. Covers ("cross" images) carry the
    pattern and the place of another image, drawn anew each time, and keep their true labels: only an image's own
    trigger is to work.

    `poison` settles how many images carry the trigger, and how many are covers. Which ones of a batch do is drawn anew
    at each step: the same ones each time would be learned by heart.

    Source: Nguyen & Tran, *Input-Aware Dynamic Backdoor Attack*, NeurIPS 2020, and its public code. The networks here
    are smaller, have no BatchNorm (`generators.EncoderDecoder`), and G learns at a constant rate.

    Args:
        cover_rate: share of the training set that becomes covers, in [0, 1]; 0 leaves them out.
        mask_epochs: passes over the images that train M; its learning rate falls tenfold at 2/5 and at 4/5 of them.
        mask_density: what an element of M may have for nothing, in [0, 1].
        mask_weight: λ. Tiny images need larger masks, so a lower one, and a longer training of the victim: 1 and 100
            epochs for 8×8 digits, with a `learning_rate` of 0.003.
        diversity: weight of the ratio of distances in the training of G.
        learning_rate: of Adam, for M and for G.
    """

    name: ClassVar[str] = "dyn_one"

    cover_rate: float = 0.1
    mask_epochs: int = 25
    mask_density: float = 0.032
    mask_weight: float = 100.0
    diversity: float = 1.0
    learning_rate: float = 0.01

    def __post_init__(self):
        super().__post_init__()
        if self.mask_epochs < 1:
            raise ValueError(f"mask_epochs={self.mask_epochs} must be 1 or more.")
        if not 0 <= self.mask_density <= 1:
            raise ValueError(f"mask_density={self.mask_density} is a value of the mask: choose it in [0, 1].")
        for option in ("mask_weight", "diversity"):
            if getattr(self, option) < 0:
                raise ValueError(f"{option}={getattr(self, option)} must be 0 or more.")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate={self.learning_rate} must be above 0.")

    def make_networks(self, channels: int, depth: int) -> dict[str, nn.Module]:
        return {
            "mask": EncoderDecoder(channels, 1, self.width, depth),
            "pattern": EncoderDecoder(channels, channels, self.width, depth),
        }

    def triggered(self, networks: nn.ModuleDict, images: Tensor) -> Tensor:
        return with_pattern(images, pattern_of(networks, images), mask_of(networks, images))

    def fit(self, material: Material) -> None:
        """Train M; G stays as it is drawn until the victim is trained.

        Raises:
            ValueError: the images are too small.
        """
        networks = self.new_networks(*material.size).to(material.device)
        generator = torch.Generator().manual_seed(self.seed)
        optimizer = torch.optim.Adam(networks["mask"].parameters(), lr=self.learning_rate, betas=_BETAS)
        falls = [round(self.mask_epochs * share) for share in (0.4, 0.8)]
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, falls)
        std = torch.tensor(material.std, dtype=torch.float32, device=material.device).view(-1, 1, 1)
        count = len(material.pixels)
        for _ in tqdm(range(self.mask_epochs), desc=f"{self.name}, mask", disable=not material.progress):
            orders = torch.stack([torch.randperm(count, generator=generator) for _ in range(2)])
            for rows, others in zip(*(order.split(_MASK_BATCH) for order in orders), strict=True):
                images, other_images = (material.pixels[i].to(material.device).float() / 255 for i in (rows, others))
                masks, other_masks = mask_of(networks, images), mask_of(networks, other_images)
                size = (masks - self.mask_density).relu().mean()
                loss = self.mask_weight * size + _sameness(images / std, other_images / std, masks, other_masks)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            scheduler.step()
        self.keep(networks, material.size)

    def joint_training(self, material: Material) -> JointTraining:
        return _PatternTraining(self, material)


@register
@dataclass
class DynAll(DynOne):
    """Dyn-one with the label y + 1 (mod K) for every class y."""

    name: ClassVar[str] = "dyn_all"

    label_rule: str = "all_to_all"


class _PatternTraining(JointTraining):
    attack: DynOne

    def __init__(self, attack: DynOne, material: Material):
        super().__init__(attack, material)
        self.networks = attack.new_networks(*material.size)
        self.networks.load_state_dict(attack.networks.state_dict())
        self.networks.to(material.device)["mask"].requires_grad_(False)
        self.modules["pattern"] = self.networks["pattern"]
        self.optimizers["pattern"] = torch.optim.Adam(
            self.modules["pattern"].parameters(), lr=attack.learning_rate, betas=_BETAS
        )

    def loss(self, victim: PixelClassifier, images: Tensor, labels: Tensor, roles: Tensor, progress: float) -> Tensor:
        roles = roles[torch.randperm(len(roles), device=roles.device)]
        backdoor, covers = ((roles == role).nonzero().flatten() for role in (BACKDOOR, COVER))
        shown, wanted, sameness = images, labels, 0.0
        if others := max(len(backdoor), len(covers)):
            other_images = self._draw(others)
            other_patterns = pattern_of(self.networks, other_images)
        if len(backdoor):
            sources, count = images[backdoor], len(backdoor)
            patterns = pattern_of(self.networks, sources)
            shown = shown.index_copy(0, backdoor, with_pattern(sources, patterns, mask_of(self.networks, sources)))
            wanted = wanted.index_copy(0, backdoor, self.attack_labels(labels[backdoor]))
            sameness = _sameness(sources, other_images[:count], patterns, other_patterns[:count])
        if count := len(covers):
            masks = mask_of(self.networks, other_images[:count])
            shown = shown.index_copy(0, covers, with_pattern(images[covers], other_patterns[:count], masks))
        return nn.functional.cross_entropy(victim(shown), wanted) + self.attack.diversity * sameness

    def _draw(self, count: int) -> Tensor:
        """Some training images, (count, C, H, W) in [0, 1]."""
        rows = torch.randint(len(self.material.pixels), (count,))
        return self.material.pixels[rows].to(self.material.device).float() / 255

    def finish(self) -> None:
        self.attack.keep(self.networks, self.material.size)


def pattern_of(networks: nn.ModuleDict, images: Tensor) -> Tensor:
    """G(x): (B, C, H, W) in [0, 1]."""
    return (1 + networks["pattern"](images)) / 2


def mask_of(networks: nn.ModuleDict, images: Tensor) -> Tensor:
    """M(x): (B, 1, H, W) in [0, 1]."""
    return (1 + (_SHARPNESS * networks["mask"](images)).tanh()) / 2


def with_pattern(images: Tensor, patterns: Tensor, masks: Tensor) -> Tensor:
    """x + M (G − x), in 8 bits."""
    return as_stored(images + masks * (patterns - images))


def _sameness(images: Tensor, others: Tensor, made: Tensor, made_of_others: Tensor) -> Tensor:
    """Mean of ‖x₁ − x₂‖ / ‖made(x₁) − made(x₂)‖, root mean square norms: high when different images give the same."""
    return (_distance(images, others) / (_distance(made, made_of_others) + _EPSILON)).mean()


def _distance(one: Tensor, other: Tensor) -> Tensor:
    difference = (one - other).flatten(1)
    return torch.linalg.vector_norm(difference, dim=1) / difference.shape[1] ** 0.5
