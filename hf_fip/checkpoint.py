"""Checkpoints: which of a run were written to their end, and how their weights come back."""

from __future__ import annotations

import copy
import functools
import os
from pathlib import Path
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import sort_checkpoints

TRAINER_STATE_NAME = "trainer_state.json"


def last_complete_checkpoint(output_dir: str) -> str | None:
    """The newest checkpoint in a folder that was written to its end; None when there is none.

    A half-written one (a kill, a full disk) is passed over.
    """
    if not os.path.isdir(output_dir):
        return None
    return next((folder for folder in reversed(sort_checkpoints(output_dir)) if is_complete(folder)), None)


def is_complete(checkpoint: str) -> bool:
    """Whether a checkpoint has its weights and its state, and no file of it is cut off.

    `FIPTrainer` writes the state after everything else, so a run killed while it wrote leaves none, or half of one.
    Only the beginnings and ends of large files are read.
    """
    files = [path for path in Path(checkpoint).rglob("*") if path.is_file()]
    try:
        TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
        for path in files:
            if path.suffix == ".safetensors":
                with safe_open(path, "pt"):  # raises unless the file is as long as its header says
                    pass
            elif path.suffix in (".pt", ".pth") and not is_zipfile(path):  # a zip file's directory is at its end
                return False
    except (OSError, ValueError, TypeError, SafetensorError):
        return False
    return any(path.match("*model*.safetensors") or path.match("pytorch_model*.bin") for path in files)


def load_weights(model: PreTrainedModel, checkpoint: str) -> None:
    """Load what `save_pretrained` wrote to a checkpoint into the model.

    `save_pretrained` stores many architectures (ViT among them) under other names than their modules have, and only
    `from_pretrained` translates them back. The Trainer's own `load_state_dict` finds no such weight, warns, and trains
    on from those the model happens to have: https://github.com/huggingface/transformers/pull/44366.

    Raises:
        ValueError: when the checkpoint lacks weights of the model, or holds others.
    """
    # The widest type of the weights: what the config says may be stale, and would round them.
    dtype = functools.reduce(torch.promote_types, {tensor.dtype for tensor in model.parameters()})
    config, options = copy.deepcopy(model.config), {"use_safetensors": True, "ignore_mismatched_sizes": True}
    saved, info = type(model).from_pretrained(
        checkpoint, config=config, dtype=dtype, output_loading_info=True, local_files_only=True, **options
    )
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *(name for name, *_ in info["mismatched_keys"])]
    if wrong:
        raise ValueError(
            f"{checkpoint} is of another model: they differ in {len(wrong)} weights, among them {min(wrong)}."
        )
    model.load_state_dict(saved.state_dict())
