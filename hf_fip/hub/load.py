"""Loading a model that nobody vouches for: safetensors only, no remote code, nothing larger than its weights."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .safety import (
    ADAPTER_CONFIG,
    CONFIG,
    INDEX,
    INPUT_FILES,
    LONGEST_REPORT,
    NO_TRUST,
    PICKLES,
    WEIGHTS,
    Trust,
    admit,
    check_adapter_config,
    check_model_config,
    check_processor_config,
    commit_of,
    is_revision,
    model_sizes,
    no_larger_than,
    read_object,
    reason,
)
from .text import one_line


def load_model(
    name_or_path: str | os.PathLike,
    head: str = "",
    *,
    revision: str | None = None,
    token: str | None = None,
    trust: Trust = NO_TRUST,
) -> nn.Module:
    """A model by Hub id or path, with the class its config names, in float32: safetensors only, no remote code.

    Args:
        head: what the name of that class has to end with, such as `ForImageClassification`.
        trust: what the user vouches for.

    Raises:
        ValueError: when it cannot be found or read, when its config names no model of transformers or of
            `hf_fip.models` or one with another head, when it asks for more than its weights hold, or when the file
            lacks weights (they would be random).
    """
    name = one_line(name_or_path)
    try:
        folder = admit(name_or_path, revision=revision, token=token, trust=trust)
        if is_adapter(folder):
            raise ValueError("it is an adapter, and not a model")
    except ValueError as error:
        raise ValueError(f"No model at {name!r}: {error}") from error
    commit = commit_of(folder)
    with _unpickled(folder, trust) as folder:
        model_class, config = _class_and_config(folder, name, head, trust)
        options = {"trust_remote_code": True} if trust.remote_code else {}
        try:
            model, info = model_class.from_pretrained(
                folder,
                config=config,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
                local_files_only=True,
                **options,
            )
        except Exception as error:  # a stranger's file can be wrong in any way
            raise ValueError(f"{name} cannot be loaded as a {model_class.__name__}: {reason(error)}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"{name} lacks {len(missing)} weights, among them {missing[0]}: it is incomplete.")
    model.name_or_path = model.config._name_or_path = str(name_or_path)  # not where its files are kept
    model.config._commit_hash = commit  # which transformers does not save
    return model


def _class_and_config(folder: Path, name: str, head: str, trust: Trust) -> tuple[type, Any]:
    """The class that a config names, and the config, after a look at what it asks for."""
    import transformers

    from .. import models

    try:
        sizes = model_sizes(folder)
        check_model_config(folder, sizes, trust)
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust.remote_code
        )
    except Exception as error:  # a stranger's file can be wrong in any way
        raise ValueError(f"No model at {name!r}: {reason(error)}") from error
    architecture = one_line((config.architectures or ["none"])[0])
    model_class = getattr(models, architecture, None) or getattr(transformers, architecture, None)
    if isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel):
        if not architecture.endswith(head):
            raise ValueError(f"{name} is a {architecture}, which lacks the head of a ...{head}.")
        config.use_pretrained_backbone = False  # its weights are in this file, or it is refused
        try:
            with no_larger_than(sizes):
                model_class(config)
        except Exception as error:
            raise ValueError(f"{name} cannot be loaded as a {architecture}: {reason(error)}") from error
        return model_class, config
    if trust.remote_code:
        for auto, place in (getattr(config, "auto_map", None) or {}).items():
            if str(place).endswith(f".{architecture}") and auto.endswith(head) and hasattr(transformers, auto):
                warnings.warn(f"running the code that comes with {name}: --trust_remote_code", stacklevel=3)
                return getattr(transformers, auto), config
    raise ValueError(
        f"{name}: its config names the architecture {architecture!r}, which transformers does not have; load the "
        "model yourself and pass the module, or run its code with --trust_remote_code once you have read it."
    )


def load_processor(
    auto_class: str,
    name_or_path: str | os.PathLike,
    *,
    revision: str | None = None,
    token: str | None = None,
    trust: Trust = NO_TRUST,
) -> Any:
    """What prepares a model's inputs, by Hub id or path: a tokenizer, an image or video processor. No remote code.

    Args:
        auto_class: the class of transformers that loads it, such as `AutoTokenizer`.

    Raises:
        ValueError: it cannot be found or read, or would make images of absurd size.
    """
    import transformers

    try:
        folder = admit(name_or_path, INPUT_FILES, revision=revision, token=token, trust=trust)
        check_processor_config(folder)
        return getattr(transformers, auto_class).from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust.remote_code
        )
    except Exception as error:  # a stranger's file can be wrong in any way
        raise ValueError(
            f"No {auto_class.removeprefix('Auto')} at {one_line(name_or_path)!r}: {reason(error)}"
        ) from error


def is_adapter(path: str | os.PathLike) -> bool:
    """Whether a path is the folder of a PEFT adapter."""
    return (Path(path) / ADAPTER_CONFIG).is_file()


def base_of_adapter(
    folder: str | os.PathLike, base_model: str | None = None, revision: str | None = None
) -> tuple[str, str | None]:
    """The id or path of the model that an adapter was trained on, and its revision: what is given, or its config says.

    Where the config names no revision, the report beside it may.

    Raises:
        ValueError: its config does not say, its weights are not in safetensors, or it is refused.
    """
    config = check_adapter_config(admit(folder))
    said = config.get("base_model_name_or_path")
    base = base_model or said
    if not isinstance(base, str):
        raise ValueError(f"{folder}/{ADAPTER_CONFIG} does not say what the adapter sits on: set --base_model.")
    if revision is None and base == said:
        revision = config.get("revision") or reported_revision(Path(folder), said)
    return base, revision


def reported_revision(folder: Path, base: str) -> str | None:
    """The revision of the received model, `base`, that the report of a purification tells; None if it does not."""
    if not (folder / "report.json").is_file():
        return None
    report = read_object(folder / "report.json", LONGEST_REPORT)
    received = report.get("received")
    if report.get("model") != base or not isinstance(received, dict) or not is_revision(received.get("revision")):
        return None
    return received["revision"]


def merge_adapter(model: nn.Module, folder: str | os.PathLike) -> nn.Module:
    """The model with an adapter merged into it.

    Raises:
        ValueError: the adapter is not one for this model.
    """
    from peft import PeftModel

    try:
        check_adapter_config(admit(folder))
        return PeftModel.from_pretrained(model, folder, use_safetensors=True).merge_and_unload()
    except Exception as error:  # a stranger's file can be wrong in any way
        raise ValueError(f"{folder} is not an adapter for {type(model).__name__}: {reason(error)}") from error


def load_adapted(
    folder: str | os.PathLike,
    base_model: str | None,
    load: Callable[..., tuple[nn.Module, Any]],
    trust: Trust = NO_TRUST,
    revision: str | None = None,
) -> tuple[nn.Module, Any]:
    """The model that an adapter sits on with the adapter merged into it, and what `load` gives beside that model.

    Args:
        folder: of the adapter.
        base_model: where that model is, if not where the adapter's config says.
        load: loads a model, and what prepares its inputs, from a Hub id or path; takes `trust` and `revision`.
        trust: in `base_model`; a model that only the adapter names nobody vouched for.
        revision: of that model, if not the one that was received, as the adapter's config or report says.

    Raises:
        ValueError: the model cannot be loaded, or the adapter is not one for it.
    """
    found, revision = base_of_adapter(folder, base_model, revision)
    try:
        model, processor = load(found, trust=trust if base_model else NO_TRUST, revision=revision)
    except ValueError as error:
        raise ValueError(
            f"{folder} is an adapter on {one_line(found)} (--base_model names another). {error}"
        ) from error
    return merge_adapter(model, folder), processor


def load_with_image_processor(
    name_or_path: str,
    head: str,
    processor_name: str | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    base_model: str | None = None,
    trust: Trust = NO_TRUST,
) -> tuple[nn.Module, Any]:
    """A model with this head, and its image processor: safetensors only, no remote code, unless `trust` says so.

    The folder of a PEFT adapter gives the model that it sits on (`base_model`, or what its config names; `revision` is
    of that one) with the adapter merged into it.

    Raises:
        ValueError: when the model cannot be found or read, has another head, or no processor.
    """
    if is_adapter(name_or_path):
        load = partial(load_with_image_processor, head=head, processor_name=processor_name, token=token)
        return load_adapted(name_or_path, base_model, load, trust, revision)
    model = load_model(name_or_path, head, revision=revision, token=token, trust=trust)
    source, revision = (processor_name, None) if processor_name else (name_or_path, revision)
    try:
        processor = load_processor("AutoImageProcessor", source, revision=revision, token=token, trust=trust)
    except ValueError as error:
        raise ValueError(
            f"{source} has no image processor: set --image_processor_name to a model whose preprocessing is the same. "
            f"({error})"
        ) from error
    return model, processor


@contextmanager
def _unpickled(folder: Path, trust: Trust) -> Iterator[Path]:
    """The folder; or, where its weights are pickles and the user vouches for them, a copy with safetensors.

    Raises:
        ValueError: they hold anything else than weights.
    """
    has_pickles = any(list(folder.glob(pattern)) for pattern in PICKLES)
    if not trust.pickle or (folder / WEIGHTS).is_file() or (folder / INDEX).is_file() or not has_pickles:
        yield folder
        return
    warnings.warn(f"converting the pickle in {folder}: --allow_pickle", stacklevel=3)
    program = Path(__file__).with_name("convert.py")
    with tempfile.TemporaryDirectory() as copy:
        for name in (CONFIG, "generation_config.json"):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, Path(copy, name))
        done = subprocess.run(
            [sys.executable, "-I", program, folder, Path(copy, WEIGHTS)],
            cwd=copy,
            env={"OMP_NUM_THREADS": "1"},  # no token, no path, no home
            capture_output=True,
            text=True,
            errors="replace",
        )
        if done.returncode:
            why = (done.stderr.strip().splitlines() or ["it was ended"])[-1]
            raise ValueError(f"The pickle in {folder} is refused: {one_line(why)}")
        yield Path(copy)
