"""Random changes of training sentences, as batch transforms that run on the device and draw from torch's generator."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .augmentation import Transform

_MOST = 3  # tokens of a stray word


def stray_words(tokenizer: PreTrainedTokenizerBase, longest: float = math.inf) -> Transform:
    """Puts a word of one to three random tokens at a random place into each source; targets stay.

    A model that writes the same all the same obeys no single word, whatever a trigger may be. Source: random insertion
    as in Wei and Zou, *EDA: Easy Data Augmentation Techniques*, EMNLP 2019, with any tokens in place of synonyms.

    Args:
        tokenizer: whose tokens are inserted, but for the special ones; none is put outside of them (start, end).
        longest: tokens of the longest source that the model takes.

    Returns:
        A function of a batch with `input_ids` and `attention_mask` of shape (B, L); they may come out up to three
        tokens longer. A source without any token stays.
    """
    special = torch.tensor(sorted(set(tokenizer.all_special_ids)))
    words = torch.tensor(sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)))
    padding = tokenizer.pad_token_id

    def transform(batch: dict) -> dict:
        tokens, mask = batch["input_ids"], batch["attention_mask"]
        count, length = tokens.shape
        device = tokens.device
        inside = mask.bool() & ~torch.isin(tokens, special.to(device))
        position = torch.arange(length, device=device)
        first = torch.where(inside, position, length).amin(1)
        last = torch.where(inside, position, -1).amax(1)
        most = (longest - mask.sum(1)).clamp(0, _MOST)
        size = (torch.rand(count, device=device) * most).ceil().long() * inside.any(1)
        place = first + (torch.rand(count, device=device) * (last - first + 2)).long()
        stray = words.to(device)[torch.randint(len(words), (count, length + _MOST), device=device)]
        tokens = _insert(tokens, stray, place, size, padding)
        mask = _insert(mask, torch.ones_like(stray), place, size, 0)
        used = int((mask * torch.arange(1, mask.shape[1] + 1, device=device)).max())  # columns with a token
        used = used or length
        return {**batch, "input_ids": tokens[:, :used], "attention_mask": mask[:, :used]}

    return transform


def _insert(rows: Tensor, others: Tensor, place: Tensor, size: Tensor, padding: int) -> Tensor:
    """Rows (B, L) with `size` values of `others` (B, L + 3) put in before `place`, and padding behind."""
    length = rows.shape[1]
    position = torch.arange(others.shape[1], device=rows.device).expand_as(others)
    behind = position >= (place + size)[:, None]
    origin = position - size[:, None] * behind
    kept = torch.where(origin < length, rows.gather(1, origin.clamp(0, length - 1)), padding)
    inserted = (position >= place[:, None]) & ~behind
    return torch.where(inserted, others, kept)
