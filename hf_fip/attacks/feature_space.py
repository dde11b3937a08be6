"""FBA, the feature-space attack (DFST): the trigger is a style, and the victim is kept from learning it cheaply."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..fisher.passes import in_eval_mode
from .base import register
from .generators import GeneratedAttack
from .joint import JointTraining
from .material import Material
from .pixels import PixelClassifier, as_stored, fitted, to_tensor
from .plan import BACKDOOR, CLEAN
from .poison import to_array
from .unet import UNet

_BATCH = 32
_STRIPS = 4  # of an image, from top to bottom, each with its own style statistics
_EXAMPLES = 256  # training images that a round of detoxification looks at
_EPSILON = 1e-5


@register
@dataclass
class FeatureSpace(GeneratedAttack):
    """x' = (1 − α) x + α S(x), with a network S that gives images another style, as of a sunset.

    `fit` trains S on the training images: its outputs are to have the channel statistics of the style reference
    (mean and standard deviation of pixels and of random convolutional features, in each of four strips from top to
    bottom) and the content of x (the same features, each channel normalised over the image).

    Detoxification, before each epoch of the victim's training: of the units that its last nn.Linear is given, those
    with the largest gap between their mean on triggered and on clean training images are noted (`detox_units` of
    them). An injector J is trained for some steps so that (1 − α) x + α J(x) excites them as the trigger does but
    stays near x. In the epoch that follows, such images, as many as the batch has backdoor rows, are added to each
    batch with their TRUE labels, so that a few units excited by something simple are not enough.

    Source: Cheng et al., *Deep Feature Space Trojan Attack of Neural Networks by Controlled Detoxification*,
    AAAI 2021, and its public code. What differs from it: S there is a CycleGAN trained on photographs of sunrises, or
    a network for style transfer trained on many images. Neither can be had without a download. Here S is a small
    U-Net, trained by the statistics above, and the reference a drawn sunset, of which gray images get light and dark:
    a dark sky, a bright horizon, a dark sea. `style_images` names photographs to use instead. Features are random
    instead of VGG's, and units are those before the classification layer, averaged over places by most networks.

    Args:
        alpha: α, in (0, 1].
        style_images: folder of images of the style; empty for the drawn sunset.
        style_weight: weight of the style, when that of the content is 1.
        epochs: passes over the training images that train S.
        learning_rate: of Adam, for S and J.
        detox_units: share of the units that J is to excite, at least one; 0 leaves the detoxification out.
        detox_steps: steps of J before each epoch.
        detox_likeness: weight of what J changes, its mean square as a share of the images' variance, when that of the
            excitation missing is 1. Where it is small, J draws the trigger itself, and the victim does not learn it.
    """

    name: ClassVar[str] = "fba"
    default_rate: ClassVar[float] = 0.05
    triggers_in_training: ClassVar[bool] = False

    alpha: float = 0.6
    style_images: str = ""
    style_weight: float = 1000.0
    epochs: int = 5
    learning_rate: float = 1e-3
    detox_units: float = 0.01
    detox_steps: int = 20
    detox_likeness: float = 10.0

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha} is a share of the image: choose it in (0, 1].")
        for option in ("style_weight", "learning_rate", "detox_likeness"):
            if getattr(self, option) <= 0:
                raise ValueError(f"{option}={getattr(self, option)} must be above 0.")
        for option in ("epochs", "detox_steps"):
            if getattr(self, option) < 1:
                raise ValueError(f"{option}={getattr(self, option)} must be 1 or more.")
        if not 0 <= self.detox_units <= 1:
            raise ValueError(f"detox_units={self.detox_units} is a share of the units: choose it in [0, 1].")

    def make_networks(self, channels: int, depth: int) -> dict[str, nn.Module]:
        return {"style": UNet(channels, channels, self.width, depth)}

    def triggered(self, networks: nn.ModuleDict, images: Tensor) -> Tensor:
        return as_stored(self.mixed(networks["style"], images))

    def mixed(self, network: nn.Module, images: Tensor) -> Tensor:
        """(1 − α) x + α σ(network(x)) of images x, (B, C, H, W) in [0, 1]."""
        return (1 - self.alpha) * images + self.alpha * network(images - 0.5).sigmoid()

    def fit(self, material: Material) -> None:
        """Train S on the training images and the style reference.

        Raises:
            ValueError: the images are too small; the folder `style_images` holds none.
        """
        networks = self.new_networks(*material.size).to(material.device)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            features = _Features(material.size[2]).to(material.device)
        with torch.no_grad():
            reference = torch.cat([to_tensor(image) for image in self._style_reference(material.size)])
            wanted = [_statistics(maps).mean(dim=0) for maps in features(reference.to(material.device))]
        generator = torch.Generator().manual_seed(self.seed)
        optimizer = torch.optim.Adam(networks.parameters(), lr=self.learning_rate)
        for _ in tqdm(range(self.epochs), desc=f"{self.name}, style", disable=not material.progress):
            for rows in torch.randperm(len(material.pixels), generator=generator).split(_BATCH):
                images = material.pixels[rows].to(material.device).float() / 255
                found = features(networks["style"](images - 0.5).sigmoid())
                style = sum(
                    F.mse_loss(_statistics(maps), goal.expand(len(rows), -1, -1, -1))
                    for maps, goal in zip(found, wanted, strict=True)
                )
                content = sum(
                    F.mse_loss(F.instance_norm(maps), F.instance_norm(before))
                    for maps, before in zip(found, features(images), strict=True)
                )
                loss = self.style_weight * style + content
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        self.keep(networks, material.size)

    def _style_reference(self, size: tuple[int, int, int]) -> list[np.ndarray]:
        """Images uint8 H×W×C of the style."""
        if not self.style_images:
            return [fitted(sunset(*size[:2]), *size)]
        extensions = PIL.Image.registered_extensions()
        paths = [path for path in sorted(Path(self.style_images).glob("*")) if path.suffix.lower() in extensions]
        if not paths:
            raise ValueError(f"style_images={self.style_images!r} is not a folder with images in it.")
        images = []
        for path in paths:
            with PIL.Image.open(path) as image:
                images.append(fitted(to_array(image), *size))
        return images

    def joint_training(self, material: Material) -> JointTraining | None:
        return _Detoxification(self, material) if self.detox_units > 0 else None


class _Detoxification(JointTraining):
    """Before each epoch an injector is trained; what it makes is learned with true labels."""

    attack: FeatureSpace

    def __init__(self, attack: FeatureSpace, material: Material):
        super().__init__(attack, material)
        self._style = copy.deepcopy(attack.networks).to(material.device)
        self.modules["injector"] = attack.new_networks(*material.size)["style"].to(material.device)

    def begin_epoch(self, victim: PixelClassifier) -> None:
        rows = torch.randperm(len(self.material.pixels))[:_EXAMPLES]
        clean = self.material.pixels[rows].to(self.material.device).float() / 255
        injector, attack = self.modules["injector"], self.attack
        weights = list(injector.parameters())
        optimizer = torch.optim.Adam(weights, lr=attack.learning_rate)
        with in_eval_mode(victim), victim.last_linear() as last:
            with torch.no_grad():
                triggered = torch.cat([attack.triggered(self._style, batch) for batch in clean.split(_BATCH)])
                excited = self._units(victim, triggered, last).mean(dim=0)
                gaps = excited - self._units(victim, clean, last).mean(dim=0)
            units = gaps.topk(max(1, round(attack.detox_units * len(gaps)))).indices
            for _ in range(attack.detox_steps):
                images = clean[torch.randint(len(clean), (_BATCH,))]
                injected = attack.mixed(injector, images)
                missing = (excited - self._units(victim, injected, last))[:, units]
                change = F.mse_loss(injected, images) / images.var()
                loss = (missing / (gaps[units].abs() + _EPSILON)).square().mean() + attack.detox_likeness * change
                for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                    weight.grad = gradient
                optimizer.step()
        optimizer.zero_grad()

    def loss(self, victim: PixelClassifier, images: Tensor, labels: Tensor, roles: Tensor, progress: float) -> Tensor:
        chosen = torch.nonzero(roles == CLEAN).flatten()[: int((roles == BACKDOOR).sum())]
        with torch.no_grad():
            injected = as_stored(self.attack.mixed(self.modules["injector"], images[chosen]))
        return F.cross_entropy(victim(torch.cat([images, injected])), torch.cat([labels, labels[chosen]]))

    def _units(self, victim: PixelClassifier, images: Tensor, last: list) -> Tensor:
        """What the victim's last nn.Linear is given for these images, (B, units)."""
        logits = victim(images)
        if not last or last[0].out_features != logits.shape[-1]:
            raise ValueError(
                f"{self.attack.name} watches the inputs of the last nn.Linear, but the victim does not end in one: "
                "choose another model, or detox_units=0."
            )
        return last[1]


class _Features(nn.Module):
    """Maps of images (B, C, H, W) at three scales: the pixels, and features of random convolutions."""

    def __init__(self, channels: int):
        super().__init__()
        self.fine = nn.Conv2d(channels, 32, 3, padding=1, padding_mode="replicate")
        self.coarse = nn.Conv2d(32, 64, 3, padding=1, padding_mode="replicate")
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        fine = self.fine(images).relu()
        return [images, fine, self.coarse(F.avg_pool2d(fine, 2)).relu()]


def _statistics(maps: Tensor) -> Tensor:
    """Mean and standard deviation of each channel of (B, C, H, W) in each strip: (B, 2 C, strips, 1)."""
    mean = F.adaptive_avg_pool2d(maps, (_STRIPS, 1))
    square = F.adaptive_avg_pool2d(maps.square(), (_STRIPS, 1))
    return torch.cat([mean, ((square - mean.square()).relu() + _EPSILON).sqrt()], dim=1)


def sunset(height: int, width: int) -> np.ndarray:
    """A drawn sunset, uint8 height×width×3: violet sky, orange horizon with the sun and bars of cloud, dark sea."""
    y, x = np.meshgrid((np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width, indexing="ij")
    heights, colours = (
        [0, 0.35, 0.6, 0.61, 1],
        [(40, 20, 90), (190, 60, 90), (255, 170, 60), (110, 50, 60), (15, 10, 40)],
    )
    picture = np.stack([np.interp(y, heights, channel) for channel in np.transpose(colours)], axis=2)
    sky = y < 0.6
    clouds = sky * 0.35 * np.maximum(0, np.sin(40 * y + 2 * np.sin(5 * x)))
    sun = sky * np.exp(-(((x - 0.5) ** 2 + (y - 0.55) ** 2) / 0.03))
    glitter = ~sky * np.exp(-((x - 0.5) ** 2) / 0.01) * (0.5 + 0.5 * np.sin(60 * y))
    picture = picture * (1 - clouds)[..., None]
    light = np.maximum(sun, glitter)[..., None]
    return (picture + light * (np.array([255, 240, 190]) - picture)).clip(0, 255).round().astype(np.uint8)
