"""Image data sets that are known by a short name: where they lie on the Hub, and what suits their images."""

from __future__ import annotations

from dataclasses import dataclass

import PIL.Image
from datasets import Dataset

DIGITS = "digits"


@dataclass(frozen=True)
class NamedImages:
    """A data set of images that the literature on backdoors measures on.

    Attributes:
        hub_id: where it lies; None for what needs no download.
        mean, std: of the pixels of the training set in [0, 1], one number a channel; models trained here from nothing
            see images normalised by them.
        image_column, label_column, test_split: their names on the Hub; guessed when left out.
        mirrored: whether an image still shows its class when left and right are exchanged.
        side: images are made squares of so many pixels when loaded, where they come in many sizes and the literature
            does so before it puts a trigger on them.
    """

    hub_id: str | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_column: str | None = None
    label_column: str | None = None
    test_split: str | None = None
    mirrored: bool = True
    side: int | None = None


NAMED_IMAGES = {
    DIGITS: NamedImages(None, mean=(0.5,), std=(0.5,), mirrored=False),
    "cifar10": NamedImages(
        "uoft-cs/cifar10",
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        image_column="img",
        label_column="label",
        test_split="test",
    ),
    "gtsrb": NamedImages(
        "tanganke/gtsrb",
        mean=(0.3403, 0.3121, 0.3214),
        std=(0.2724, 0.2608, 0.2669),
        image_column="image",
        label_column="label",
        test_split="test",
        mirrored=False,
        side=32,
    ),
    "tiny-imagenet": NamedImages(
        "zh-plus/tiny-imagenet",
        mean=(0.4802, 0.4481, 0.3975),
        std=(0.2770, 0.2691, 0.2821),
        image_column="image",
        label_column="label",
        test_split="valid",
    ),
    "imagenet": NamedImages(
        "ILSVRC/imagenet-1k",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        image_column="image",
        label_column="label",
        test_split="validation",  # the labels of its test split are not public
    ),
}


def named_images(name: str) -> NamedImages | None:
    """The data set with this short name or Hub id; None for another."""
    by_id = {known.hub_id: known for known in NAMED_IMAGES.values() if known.hub_id}
    return NAMED_IMAGES.get(name) or by_id.get(name)


def squares(dataset: Dataset, side: int) -> Dataset:
    """The data set with its column `image` as RGB images of `side`×`side` pixels."""

    def resized(batch: dict) -> dict:
        images = (image.convert("RGB") for image in batch["image"])
        return {"image": [image.resize((side, side), PIL.Image.Resampling.BILINEAR) for image in images]}

    return dataset.map(resized, batched=True, batch_size=100, desc=f"Resizing to {side}×{side}")
