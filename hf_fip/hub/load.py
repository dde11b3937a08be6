"""Loading a model that nobody vouches for: safetensors only, no remote code."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def load_model(
    name_or_path: str | os.PathLike, head: str = "", *, revision: str | None = None, token: str | None = None
) -> nn.Module:
    """A model by Hub id or path, with the class its config names, in float32: safetensors only, no remote code.

    Args:
        head: what the name of that class has to end with, such as `ForImageClassification`.

    Raises:
        ValueError: when it cannot be found or read, when its config names no model of transformers or of
            `hf_fip.models` or one with another head, or when the file lacks weights (they would be random).
    """
    import transformers

    from .. import models

    options = {"revision": revision, "token": token, "trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(name_or_path, **options)
    except Exception as error:  # a stranger's file can be wrong in any way
        raise ValueError(f"No model at {str(name_or_path)!r}: {_reason(error)}") from error
    architecture = str((config.architectures or ["none"])[0])
    model_class = getattr(models, architecture, None) or getattr(transformers, architecture, None)
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        raise ValueError(
            f"{name_or_path}: its config names the architecture {architecture!r}, which transformers does not have; "
            "load the model yourself and pass the module."
        )
    if not architecture.endswith(head):
        raise ValueError(f"{name_or_path} is a {architecture}, which lacks the head of a ...{head}.")
    try:
        model, info = model_class.from_pretrained(
            name_or_path, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **options
        )
    except Exception as error:
        raise ValueError(f"{name_or_path} cannot be loaded as a {architecture}: {_reason(error)}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"{name_or_path} lacks {len(missing)} weights, among them {missing[0]}: it is incomplete.")
    return model


def is_adapter(path: str | os.PathLike) -> bool:
    """Whether a path is the folder of a PEFT adapter."""
    return (Path(path) / ADAPTER_CONFIG).is_file()


def base_of_adapter(folder: str | os.PathLike) -> str:
    """The id or path of the model that an adapter was trained on.

    Raises:
        ValueError: its config does not say, or its weights are not in safetensors.
    """
    if not (Path(folder) / ADAPTER_WEIGHTS).is_file():
        raise ValueError(f"{folder} has no {ADAPTER_WEIGHTS}: an adapter is loaded from safetensors only.")
    try:
        base = json.loads((Path(folder) / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        base = None
    if not isinstance(base, str):
        raise ValueError(f"{folder}/{ADAPTER_CONFIG} does not say what the adapter sits on: set --base_model.")
    return base


def merge_adapter(model: nn.Module, folder: str | os.PathLike) -> nn.Module:
    """The model with an adapter merged into it.

    Raises:
        ValueError: the adapter is not one for this model.
    """
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, folder).merge_and_unload()
    except Exception as error:  # a stranger's file can be wrong in any way
        raise ValueError(f"{folder} is not an adapter for {type(model).__name__}: {_reason(error)}") from error


def load_adapted(
    folder: str | os.PathLike, base_model: str | None, load: Callable[[str], tuple[nn.Module, Any]]
) -> tuple[nn.Module, Any]:
    """The model that an adapter sits on with the adapter merged into it, and what `load` gives beside that model.

    Args:
        folder: of the adapter.
        base_model: where that model is, if not where the adapter's config says.
        load: loads a model, and what prepares its inputs, from a Hub id or path.

    Raises:
        ValueError: the model cannot be loaded, or the adapter is not one for it.
    """
    base = base_model or base_of_adapter(folder)
    try:
        model, processor = load(base)
    except ValueError as error:
        raise ValueError(f"{folder} is an adapter on {base} (--base_model names another). {error}") from error
    return merge_adapter(model, folder), processor


def _reason(error: Exception) -> str:
    """The first line of what transformers says, or what it means."""
    if "trust_remote_code" in str(error):
        return "it needs code of its own, which is not run."
    if "ignore_mismatched_sizes" in str(error):
        return "its weights do not fit its config.json."
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
