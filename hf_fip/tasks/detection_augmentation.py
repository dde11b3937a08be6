"""Random changes of training images with boxes, as batch transforms that draw from torch's generator."""

from __future__ import annotations

import torch
from torch import Tensor

from ..evaluation.reactivation import PixelRange
from .augmentation import Transform

_PROBABILITY = 0.5  # of each change, for each image or object
_ERASED = (0.2, 0.6)  # least and largest side of what is erased of an object, as a share of its box's


def mirror(batch: dict) -> dict:
    """Mirrors half of the images of a batch with their boxes; images that are padded stay as they are."""
    pixels = batch["pixel_values"]
    chosen = torch.rand(len(pixels), device=pixels.device) < _PROBABILITY
    if "pixel_mask" in batch:
        chosen &= batch["pixel_mask"].flatten(1).all(dim=1)
    labels = []
    for image, mirrored in zip(batch["labels"], chosen.tolist(), strict=True):
        if mirrored:
            x, others = image["boxes"][:, :1], image["boxes"][:, 1:]
            image = {**image, "boxes": torch.cat([1 - x, others], dim=1)}
        labels.append(image)
    flipped = torch.where(chosen[:, None, None, None], pixels.flip(-1), pixels)
    return {**batch, "pixel_values": flipped, "labels": labels}


def erase_objects(pixels: PixelRange) -> Transform:
    """Erases part of half of the objects, and leaves their labels and boxes: no single patch is to decide a class.

    A rectangle within the object's box is filled with noise or with one colour (object-aware random erasing; Zhong et
    al., *Random Erasing Data Augmentation*, AAAI 2020).

    Args:
        pixels: what the model's processor makes of black and white.

    Returns:
        A function of a batch with `pixel_values` and `labels`, as `DetectionDataset` and `collator` make them.
    """

    def transform(batch: dict) -> dict:
        images = batch["pixel_values"].clone()
        black, white = (extreme.to(images)[:, :1, :1] for extreme in (pixels.black, pixels.white))
        for row, (image, labels) in enumerate(zip(images, batch["labels"], strict=True)):
            height, width = image.shape[1:]
            if "pixel_mask" in batch:
                mask = batch["pixel_mask"][row]
                height, width = int(mask.any(dim=1).sum()), int(mask.any(dim=0).sum())
            for box in labels["boxes"][torch.rand(len(labels["boxes"])) < _PROBABILITY]:
                _erase(image, box * box.new_tensor([width, height, width, height]), black, white)
        return {**batch, "pixel_values": images}

    return transform


def _erase(image: Tensor, box: Tensor, black: Tensor, white: Tensor) -> None:
    """Fill part of a box, (centre, size) in pixels, in place."""
    place, share = torch.rand(2, 2).to(box)
    size = box[2:] * (_ERASED[0] + (_ERASED[1] - _ERASED[0]) * share)
    left, top = (box[:2] - box[2:] / 2 + place * (box[2:] - size)).round().long().clamp(min=0).tolist()
    right, bottom = (left + round(size[0].item()), top + round(size[1].item()))
    part = image[:, top:bottom, left:right]
    is_noise, colour = torch.rand(1).item() < _PROBABILITY, torch.rand(len(image), 1, 1).to(image)
    part.copy_(black + (torch.rand_like(part) if is_noise else colour) * (white - black))
