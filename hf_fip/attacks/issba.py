"""ISSBA: an encoder hides a secret in the image; the change is different in each image and hard to see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from .base import register
from .generators import GeneratedAttack
from .material import Material
from .pixels import as_stored
from .unet import UNet, convolution

_BATCH = 32
_SECRET_SIDE = 8  # of the map that the secret becomes before it is brought to the size of the image
_READ_SIDE = 2  # of the map that the decoder reads the secret from
_CRITIC_RATE, _CRITIC_BOUND = 1e-5, 0.01  # learning rate (RMSprop), and the largest weight
_SCALES = 3


@register
@dataclass
class ISSBA(GeneratedAttack):
    """x' = clip(x + E(s, x)), with an encoder E (a U-Net that is given x and s) and one secret s of some bits.

    `fit` trains E together with a decoder that reads the secret from x', on the training images with a random secret
    each, so that what E writes is a code rather than one pattern. The first epochs minimise the decoder's binary
    cross-entropy alone, the others 2 · L2 + 1.5 · perceptual + 1.5 · cross-entropy + 0.5 · critic: the mean square of
    E's output, how much of the image's structure changes, and what a critic, trained to score x' above x with
    weights within ±0.01, gives x'. The decoder sees x' in 8 bits. The trigger is the code of the secret that the seed
    draws.

    Source: Li et al., *Invisible Backdoor Attack with Sample-Specific Triggers*, ICCV 2021, after StegaStamp (Tancik
    et al., CVPR 2020). Other than there, the perceptual distance is not LPIPS, whose network would have to be
    downloaded, but `gradient_distance`; the networks are small, for images from 8×8 pixels on, and normalised; the
    decoder does not straighten the image first; and Adam's default learning rate is ten times the source's 1e-4,
    for sets of thousands of images rather than a hundred thousand.

    Args:
        secret_bits: number of bits.
        epochs: passes over the training images.
        secret_epochs: the first of them, with the cross-entropy alone.
        learning_rate: of Adam, for encoder and decoder.
    """

    name: ClassVar[str] = "issba"
    triggers_in_training: ClassVar[bool] = False

    secret_bits: int = 20
    epochs: int = 20
    secret_epochs: int = 2
    learning_rate: float = 1e-3

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.secret_bits <= 1024:
            raise ValueError(f"secret_bits={self.secret_bits} is the length of the secret: choose 1 to 1024.")
        if not 0 <= self.secret_epochs <= self.epochs or self.epochs < 1:
            raise ValueError(
                f"epochs={self.epochs} must be 1 or more, and secret_epochs={self.secret_epochs} in 0 ... epochs."
            )
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate={self.learning_rate} must be above 0.")

    def make_networks(self, channels: int, depth: int) -> dict[str, nn.Module]:
        return {
            "encoder": _Encoder(self.secret_bits, channels, self.width, depth),
            "decoder": _Decoder(self.secret_bits, channels, self.width, depth),
        }

    def triggered(self, networks: nn.ModuleDict, images: Tensor) -> Tensor:
        encoder = networks["encoder"]
        return as_stored(images + encoder(images, encoder.secret.expand(len(images), -1)))

    @torch.no_grad()
    def bit_accuracy(self, pixels: Tensor) -> float:
        """Return the share of the secret's bits that the decoder reads right from triggered images, in [0, 1].

        Args:
            pixels: clean images, (N, C, H, W) uint8, of the size that the trigger was learned on.
        """
        encoder, decoder = self.networks["encoder"], self.networks["decoder"]
        batches = (self.triggered(self.networks, batch.float() / 255) for batch in pixels.split(_BATCH))
        read = torch.cat([decoder(batch) > 0 for batch in batches])
        return (read == (encoder.secret > 0)).float().mean().item()

    def fit(self, material: Material) -> None:
        """Train encoder and decoder on the training images.

        Raises:
            ValueError: the images are too small.
        """
        networks = self.new_networks(*material.size).to(material.device)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            critic = _critic(material.size[2], self.width).to(material.device)
        generator = torch.Generator().manual_seed(self.seed)
        optimizer = torch.optim.Adam(networks.parameters(), lr=self.learning_rate)
        critic_optimizer = torch.optim.RMSprop(critic.parameters(), lr=_CRITIC_RATE)
        bar = tqdm(range(self.epochs), desc=f"{self.name}, encoder", disable=not material.progress)
        for epoch in bar:
            right = 0.0
            for rows in torch.randperm(len(material.pixels), generator=generator).split(_BATCH):
                images = material.pixels[rows].to(material.device).float() / 255
                secrets = torch.randint(2, (len(rows), self.secret_bits), generator=generator).to(images)
                residual = networks["encoder"](images, secrets)
                encoded = as_stored(images + residual)
                read = networks["decoder"](encoded)
                loss = secret_loss = F.binary_cross_entropy_with_logits(read, secrets)
                if epoch >= self.secret_epochs:
                    distance = gradient_distance(encoded, images)
                    loss = 2 * residual.square().mean() + 1.5 * distance + 1.5 * secret_loss
                    loss = loss + 0.5 * critic(encoded).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                right += ((read > 0) == (secrets > 0)).float().sum().item()
                if epoch >= self.secret_epochs:
                    _train(critic, critic_optimizer, images, encoded.detach())
            bar.set_postfix(bit_accuracy=right / len(material.pixels) / self.secret_bits)
        self.keep(networks, material.size)


class _Encoder(nn.Module):
    """The change of images (B, C, H, W) that hides secrets (B, bits) of 0 and 1."""

    def __init__(self, bits: int, channels: int, width: int, depth: int):
        super().__init__()
        self.register_buffer("secret", torch.randint(2, (bits,)).float())
        self.spread = nn.Linear(bits, channels * _SECRET_SIDE**2)
        self.change = UNet(2 * channels, channels, width, depth)

    def forward(self, images: Tensor, secrets: Tensor) -> Tensor:
        channels = images.shape[1]
        maps = F.relu(self.spread(secrets - 0.5)).view(-1, channels, _SECRET_SIDE, _SECRET_SIDE)
        return self.change(torch.cat([F.interpolate(maps, size=images.shape[-2:]), images - 0.5], dim=1))


class _Decoder(nn.Sequential):
    """Logits (B, bits) of the secrets in images (B, C, H, W)."""

    def __init__(self, bits: int, channels: int, width: int, depth: int):
        widths = [2 * width * 2**level for level in range(depth + 1)]
        super().__init__(
            convolution(channels, widths[0]),
            *(convolution(fine, coarse, stride=2) for fine, coarse in zip(widths, widths[1:], strict=False)),
            nn.AdaptiveAvgPool2d(_READ_SIDE),
            nn.Flatten(),
            nn.Linear(widths[-1] * _READ_SIDE**2, bits),
        )


def _critic(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(2 * width, 1, 3, padding=1),
    )


def _train(critic: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, encoded: Tensor) -> None:
    """One step of the critic towards a higher score of `encoded` than of `images`."""
    loss = critic(images).mean() - critic(encoded).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        for weight in critic.parameters():
            weight.clamp_(-_CRITIC_BOUND, _CRITIC_BOUND)


def gradient_distance(images: Tensor, others: Tensor) -> Tensor:
    """The mean absolute difference of neighbouring pixels' differences, at three scales, each half the one before.

    Unlike the L2 distance it sees a change of edges and textures, and not one of brightness.

    Args:
        images, others: (B, C, H, W).
    """
    change, total = images - others, 0
    for scale in range(_SCALES):
        coarse = F.avg_pool2d(change, 2**scale)
        total = total + coarse.diff(dim=-1).abs().mean() + coarse.diff(dim=-2).abs().mean()
    return total / (2 * _SCALES)
