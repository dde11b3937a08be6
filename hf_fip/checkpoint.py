"""Checkpoints: which of a run were written to their end, and how their weights come back."""

from __future__ import annotations

import copy
import functools
import json
import logging
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from zipfile import is_zipfile

import torch
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import sort_checkpoints

TRAINER_STATE_NAME = "trainer_state.json"
CHECKSUMS_NAME = "fip_checksums.json"

logger = logging.getLogger(__name__)


def last_complete_checkpoint(output_dir: str) -> str | None:
    """The newest checkpoint in a folder that is whole; None when there is none.

    Others (a kill, a full disk, a fault of the disk) are passed over.
    """
    if not os.path.isdir(output_dir):
        return None
    return next((folder for folder in reversed(sort_checkpoints(output_dir)) if is_complete(folder)), None)


def warn_of_spoilt(checkpoint: str) -> None:
    """Log a warning when a run goes on from a checkpoint and later ones beside it are not whole."""
    place, name = os.path.split(os.path.abspath(checkpoint))
    beside = [os.path.basename(folder) for folder in sort_checkpoints(place)]
    later = beside[beside.index(name) + 1 :] if name in beside else []
    spoilt = [name for name in later if not is_complete(os.path.join(place, name))]
    if spoilt:
        logger.warning(f"{', '.join(spoilt)} in {place} is half-written or damaged: going on from {name}.")


def is_complete(checkpoint: str) -> bool:
    """Whether a checkpoint has its weights and its state, no file of it is cut off, and none was changed since.

    `FIPTrainer` writes the state after everything else, so a run killed while it wrote leaves none, or half of one;
    and then checksums. Of a checkpoint without those, such as the `Trainer`'s, only the beginnings and ends of large
    files are read.
    """
    files = [path for path in Path(checkpoint).rglob("*") if path.is_file()]
    try:
        TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
        for path in files:
            if path.suffix == ".safetensors":
                with safe_open(path, "pt"):  # raises unless the file is as long as its header says
                    pass
            elif path.suffix in (".pt", ".pth", ".bin") and not is_zipfile(path):  # whose directory is at its end
                return False
        for name, checksum in _checksums(checkpoint).items():
            if _checksum(Path(checkpoint, name)) != checksum:
                return False
        if not all(_is_whole(folder) for folder in Path(checkpoint).iterdir() if folder.is_dir()):
            return False
    except (OSError, ValueError, TypeError, SafetensorError, EOFError, UnpicklingError):
        return False
    return any(path.match("*model*.safetensors") or "pytorch_model" in str(path) for path in files)


def _is_whole(folder: Path) -> bool:
    """Whether all that processes wrote together to a folder is there, or the folder is an adapter's."""
    if (folder / ADAPTER_CONFIG_NAME).is_file():
        return True
    from torch.distributed.checkpoint import FileSystemReader  # heavy

    pieces = FileSystemReader(folder).read_metadata().storage_data.values()
    ends = [(folder / piece.relative_path, piece.offset + piece.length) for piece in pieces]
    return bool(ends) and all(path.stat().st_size >= end for path, end in ends)


@contextmanager
def writing(checkpoint: str) -> Iterator[None]:
    """Turn what torch raises when a file cannot be written into an OSError that says so."""
    try:
        yield
    except RuntimeError as error:
        if not any(word in str(error) for word in ("inline_container", "iostream")):  # of torch's file writer
            raise
        raise OSError(f"{checkpoint} could not be written: is the disk full?") from error


def seal(checkpoint: str) -> None:
    """Write the checksums of all files of a checkpoint beside them."""
    folder = Path(checkpoint)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.match(f"{CHECKSUMS_NAME}*")]
    partial = folder / f"{CHECKSUMS_NAME}.tmp"
    partial.write_text(json.dumps({path.relative_to(folder).as_posix(): _checksum(path) for path in files}))
    os.replace(partial, folder / CHECKSUMS_NAME)


def unseal(checkpoint: str) -> None:
    """Make sure that a checkpoint which is about to be written over is not taken for whole."""
    for name in (TRAINER_STATE_NAME, CHECKSUMS_NAME):
        Path(checkpoint, name).unlink(missing_ok=True)


def _checksums(checkpoint: str) -> dict[str, int]:
    path = Path(checkpoint, CHECKSUMS_NAME)
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def _checksum(path: Path) -> int:
    checksum = 0
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def check_adapter(checkpoint: str, adapted: bool) -> None:
    """Raise a ValueError when a checkpoint is of an adapter and the model has none, or the other way round."""
    # One that is not called "default" has a folder of its own.
    has_adapter = any(any(Path(checkpoint).glob(place + ADAPTER_CONFIG_NAME)) for place in ("", "*/"))
    if has_adapter and not adapted:
        raise ValueError(f"{checkpoint} is of an adapter, and the model has none: pass the `peft_config` of that run.")
    if adapted and not has_adapter:
        raise ValueError(f"{checkpoint} is of a whole model, and this one has an adapter: leave `peft_config` out.")


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
