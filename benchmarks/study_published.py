"""Victims that others published: a folder with model.safetensors, card.json and, if backdoored, trigger.npz.

Their authors trained on all of CIFAR-10's training split, so the clean images are a part of its test split, and the
rest of that is what is measured on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import ViTImageProcessor
from transformers.modeling_outputs import ImageClassifierOutput

from hf_fip.attacks import Attack

CLASSES = 10


class _Classifier(nn.Module):
    """A classifier of 32×32 RGB images with what a trainer asks of one from transformers."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(num_labels=CLASSES, num_channels=3)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        logits = self.logits(pixel_values)
        return ImageClassifierOutput(None if labels is None else F.cross_entropy(logits, labels), logits)


class SmallVGG(_Classifier):
    """The network of I-BAU's victims: three pairs of convolutions with ELU, each pair with pooling and dropout."""

    def __init__(self, head: str):
        super().__init__()
        layers, channels = [], 3
        for width, rate in ((32, 0.3), (64, 0.4), (128, 0.4)):
            for _ in range(2):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ELU()]
                channels = width
            layers += [nn.MaxPool2d(2), nn.Dropout(rate)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(16 * channels, CLASSES)

    def logits(self, pixels: Tensor) -> Tensor:
        return self.classifier(self.features(pixels).flatten(1))


class _Block(nn.Module):
    """A basic block; where it subsamples, its shortcut takes every other pixel and adds channels of zeros."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.stride = 1 if channels == width else 2
        self.conv1 = nn.Conv2d(channels, width, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.added = (width - channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = F.pad(x[..., :: self.stride, :: self.stride], (0, 0, 0, 0, self.added, self.added))
        return F.relu(out + shortcut)


class ResNet20(_Classifier):
    """The ResNet-20 of He et al. (2016) for CIFAR, with option A's shortcuts; its head has the name of the file."""

    def __init__(self, head: str):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        for stage, (channels, width) in enumerate(((16, 16), (16, 32), (32, 64)), start=1):
            blocks = [_Block(channels, width), _Block(width, width), _Block(width, width)]
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.head = head
        setattr(self, head, nn.Linear(64, CLASSES))

    def logits(self, pixels: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(pixels)))
        return getattr(self, self.head)(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


@dataclass
class GivenTrigger(Attack):
    """A mask and a pattern that somebody published: x (1 − mask) + pattern · mask, or x + pattern · mask."""

    name: ClassVar[str] = "given"
    folder: str = ""

    def make_tensors(self, rng):
        with np.load(Path(self.folder) / "trigger.npz", allow_pickle=False) as file:
            return {"mask": file["mask"], "pattern": file["pattern"], "adds": np.array(str(file["mode"]) == "add")}

    def _trigger(self, image):
        mask, pattern = self.tensors["mask"], self.tensors["pattern"]
        kept = image / 255.0 * (1 if self.tensors["adds"] else 1 - mask)
        return (255 * np.clip(kept + pattern * mask, 0, 1)).round().astype(np.uint8)


def load_published(folder: Path) -> tuple[nn.Module, ViTImageProcessor, Attack | None]:
    """The model, its preprocessing and its trigger.

    Raises:
        ValueError: the folder holds no model of the two kinds that are known.
    """
    card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    weights = load_file(folder / "model.safetensors")
    kind = SmallVGG if "classifier.weight" in weights else ResNet20
    model = kind(head="linear" if "linear.weight" in weights else "fc")
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{folder} holds neither a small VGG nor a ResNet-20: {error}") from error
    mean, std = (card["preprocess"][key] for key in ("mean", "std"))
    size = {"height": 32, "width": 32}
    processor = ViTImageProcessor(size=size, image_mean=mean or [0.0] * 3, image_std=std or [1.0] * 3)
    attack = None if card["target"] is None else GivenTrigger(target_label=card["target"], folder=str(folder))
    return model, processor, attack
