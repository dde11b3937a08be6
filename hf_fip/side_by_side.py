"""A victim and its purified model, asked the same thing: an image or a text, with the trigger or without."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from datasets import Dataset, Image
from torch import nn

from .attacks import Attack
from .attacks.pixels import fitted
from .attacks.poison import to_array, to_png
from .attacks.sentences import SentenceAttack
from .fisher.likelihood import get_logits
from .fisher.passes import in_eval_mode
from .tasks.image_classification import PixelDataset
from .tasks.seq2seq import longest_text

MODELS = ("received", "purified")
_NEW_TOKENS = 64  # that a model writes at most


@dataclass(frozen=True)
class ImagePair:
    """Two image classifiers.

    Attributes:
        models: by the names in `MODELS`.
        processor: the image processor of both.
        names: of the classes.
        attack: with whose trigger they are asked; None when none is known.
        size: height, width and channels of the images that the attack was made for; None takes them as they come.
    """

    models: dict[str, nn.Module]
    processor: Any
    names: list[str]
    attack: Attack | None
    size: tuple[int, int, int] | None = None

    def ask(self, image: PIL.Image.Image, triggered: bool) -> tuple[np.ndarray, dict[str, dict[str, float]]]:
        """The image as the models see it, and what each says of it.

        Args:
            image: of any size and mode.
            triggered: put the trigger on it.

        Returns:
            The image, uint8 H×W×C with C of 1 or 3, and for each of `MODELS` the probability of each class.

        Raises:
            ValueError: the image is too small for the trigger, or there is no trigger.
        """
        shown = to_array(image)
        if self.size is not None:
            shown = fitted(shown, *self.size)
        if triggered:
            shown = _known(self.attack).apply(shown)
        channels = getattr(next(iter(self.models.values())).config, "num_channels", 3)
        rows = Dataset.from_dict({"image": [{"bytes": to_png(shown)}], "label": [0]}).cast_column("image", Image())
        pixels = PixelDataset(rows, self.processor, channels)[0]["pixel_values"][None]
        return shown, {name: self._answer(model, pixels) for name, model in self.models.items()}

    def _answer(self, model: nn.Module, pixels: torch.Tensor) -> dict[str, float]:
        with torch.no_grad(), in_eval_mode(model):
            probabilities = get_logits(model(pixel_values=pixels)).softmax(-1)[0]
        return dict(zip(self.names, probabilities.tolist(), strict=True))


@dataclass(frozen=True)
class TextPair:
    """Two models that write text.

    Attributes:
        models: by the names in `MODELS`.
        tokenizer: of both.
        attack: with whose trigger they are asked; None when none is known.
    """

    models: dict[str, nn.Module]
    tokenizer: Any
    attack: SentenceAttack | None

    def ask(self, source: str, triggered: bool) -> tuple[str, dict[str, str]]:
        """The source as the models read it, and what each of `MODELS` writes.

        Raises:
            ValueError: the source is empty or too long, or there is no trigger.
        """
        shown = source.strip()
        if not shown:
            raise ValueError("Write a sentence first.")
        if triggered:
            shown = _known(self.attack).apply(shown)
        return shown, {name: self._answer(model, shown) for name, model in self.models.items()}

    def _answer(self, model: nn.Module, source: str) -> str:
        tokens = self.tokenizer((getattr(model.config, "prefix", None) or "") + source, return_tensors="pt")
        count, longest = tokens["input_ids"].shape[1], longest_text(model, self.tokenizer)
        if count > longest:
            raise ValueError(f"This text has {count} tokens, and the model takes {longest:.0f}.")
        tokens = {name: value for name, value in tokens.items() if name in ("input_ids", "attention_mask")}
        with torch.no_grad(), in_eval_mode(model):
            written = model.generate(**tokens, max_length=int(min(longest, _NEW_TOKENS)))
        return self.tokenizer.decode(written[0], skip_special_tokens=True).strip()


def _known(attack):
    if attack is None:
        raise ValueError("No attack is known for these models: there is no trigger to put on.")
    return attack
