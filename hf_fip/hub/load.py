"""Loading a model that nobody vouches for: safetensors only, no remote code."""

from __future__ import annotations

import os

from torch import nn


def load_model(name_or_path: str | os.PathLike) -> nn.Module:
    """A model by Hub id or path, with the class its config names: safetensors only, no remote code.

    Raises:
        ValueError: when it cannot be found or read, when its config names no transformers model, or when the file
            lacks weights (they would be random).
    """
    import transformers

    options = {"trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(name_or_path, **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"No model at {str(name_or_path)!r}: {_first_line(error)}") from error
    architecture = (config.architectures or ["none"])[0]
    model_class = getattr(transformers, architecture, None)
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        raise ValueError(
            f"{name_or_path}: its config names the architecture {architecture!r}, which transformers does not have; "
            "load the model yourself and pass the module."
        )
    try:
        model, info = model_class.from_pretrained(
            name_or_path, use_safetensors=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name_or_path} cannot be loaded as a {architecture}: {_first_line(error)}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"{name_or_path} lacks {len(missing)} weights, among them {missing[0]}: it is incomplete.")
    return model


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
