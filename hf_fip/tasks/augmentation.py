"""Random changes of training images, as batch transforms that run on the device and draw from torch's generator."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..evaluation.reactivation import PixelRange

Transform = Callable[[dict], dict]

_PROBABILITY = 0.5  # of each of the disturbances, for each image
_MIXED = 0.3  # largest share of what is blended in
_CONTRAST, _BRIGHTNESS, _NOISE = 0.3, 0.2, 0.05  # of pixels in [0, 1]: largest factor and shift, standard deviation
_KNOTS = 4  # a side of the grid that a warp is drawn on
_ERASED = (1 / 8, 3 / 8)  # least and largest side of an erased square, as a share of the height


def shift_and_flip(share: float, flip: bool) -> Transform:
    """The usual augmentation: a random crop after padding by reflection, and a mirror image.

    Args:
        share: largest shift, as a share of the image's height.
        flip: whether to mirror half of the images (not for digits or text).

    Returns:
        A function of a batch with `pixel_values` of shape (B, C, H, W).
    """

    def transform(batch: dict) -> dict:
        pixels = batch["pixel_values"]
        count, _, height, width = pixels.shape
        padding = max(1, round(share * height))
        padded = F.pad(pixels, (padding,) * 4, mode="reflect")
        top, left = torch.randint(0, 2 * padding + 1, (2, count), device=pixels.device)
        rows = torch.arange(height, device=pixels.device) + top[:, None]
        columns = torch.arange(width, device=pixels.device) + left[:, None]
        if flip:
            mirrored = torch.rand(count, device=pixels.device) < 0.5
            columns = torch.where(mirrored[:, None], columns.flip(1), columns)
        index = torch.arange(count, device=pixels.device)[:, None, None]
        cropped = padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]]
        return {**batch, "pixel_values": cropped.permute(0, 3, 1, 2).contiguous()}

    return transform


def disturb(pixels: PixelRange, warp: bool = True) -> Transform:
    """Changes that say nothing of an image's class, whatever a trigger may be: the defender's strongest ally.

    Each image gets each of these with probability 1/2, and keeps its label: another image of the batch or noise is
    blended in, up to 30 % (Inoue, *Data Augmentation by Pairing Samples*, 2018); a smooth warp of up to a sixteenth
    of the height, or two pixels (Simard et al., ICDAR 2003); other contrast and brightness, and Gaussian noise; a
    square of up to 3/8 of the height is filled with noise or one colour (Zhong et al., *Random Erasing*, AAAI 2020).

    A model that answers rightly all the same relies on no single patch, pattern or warp.

    Args:
        pixels: what the model's processor makes of black and white.
        warp: whether to warp (not where places matter, as those of boxes do).

    Returns:
        A function of a batch with `pixel_values` of shape (B, C, H, W), each a preprocessed image.
    """

    def transform(batch: dict) -> dict:
        values = batch["pixel_values"]
        black, white = (extreme.to(values)[:, :1, :1] for extreme in (pixels.black, pixels.white))
        images = (values - black) / (white - black)
        for change in (_mix, _warp, _jitter, _erase) if warp else (_mix, _jitter, _erase):
            images = change(images)
        return {**batch, "pixel_values": images.clamp(0, 1) * (white - black) + black}

    return transform


def both(first: Transform | None, second: Transform | None) -> Transform | None:
    """One after the other, of those that there are."""
    if first is None or second is None:
        return first or second
    return lambda batch: second(first(batch))


def _uniform(images: Tensor, *shape: int) -> Tensor:
    return torch.rand(len(images), *shape, device=images.device, dtype=images.dtype)


def _chosen(images: Tensor, *shape: int) -> Tensor:
    return (_uniform(images, *shape) < _PROBABILITY).to(images.dtype)


def _mix(images: Tensor) -> Tensor:
    share = _MIXED * _uniform(images, 1, 1, 1) * _chosen(images, 1, 1, 1)
    others = images[torch.randperm(len(images), device=images.device)]
    blended = torch.where(_chosen(images, 1, 1, 1) > 0, others, torch.rand_like(images))
    return (1 - share) * images + share * blended


def _warp(images: Tensor) -> Tensor:
    count, _, height, width = images.shape
    strength = max(2, height / 16) * _uniform(images, 1, 1, 1) * _chosen(images, 1, 1, 1)
    knots = strength * (2 * _uniform(images, 2, _KNOTS, _KNOTS) - 1)  # in pixels
    field = F.interpolate(knots, (height, width), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    scale = torch.tensor([2 / width, 2 / height], device=images.device, dtype=images.dtype)
    identity = torch.eye(2, 3, device=images.device, dtype=images.dtype).expand(count, 2, 3)
    grid = F.affine_grid(identity, (count, 1, height, width), align_corners=True)
    return F.grid_sample(images, grid + field * scale, padding_mode="reflection", align_corners=True)


def _jitter(images: Tensor) -> Tensor:
    chosen = _chosen(images, 1, 1, 1)
    contrast = 1 + chosen * _CONTRAST * (2 * _uniform(images, 1, 1, 1) - 1)
    brightness = chosen * _BRIGHTNESS / 2 * (2 * _uniform(images, 1, 1, 1) - 1)
    return (images - 0.5) * contrast + 0.5 + brightness + chosen * _NOISE * torch.randn_like(images)


def _erase(images: Tensor) -> Tensor:
    count, channels, height, width = images.shape
    least, largest = _ERASED
    side = (height * (least + (largest - least) * _uniform(images, 1, 1))).round().clamp(min=1)
    top, left = ((length - side + 1) * _uniform(images, 1, 1) for length in (height, width))
    rows = torch.arange(height, device=images.device)[None, :, None]
    columns = torch.arange(width, device=images.device)[None, None, :]
    inside = (rows >= top.floor()) & (rows < top.floor() + side)
    inside = inside & (columns >= left.floor()) & (columns < left.floor() + side)
    inside = (inside & (_chosen(images, 1, 1) > 0))[:, None]
    colour = (2 * _uniform(images, channels, 1, 1)).round() / 2  # 0, 1/2 or 1
    filling = torch.where(_chosen(images, 1, 1, 1) > 0, colour, torch.rand_like(images))
    return torch.where(inside, filling, images)
