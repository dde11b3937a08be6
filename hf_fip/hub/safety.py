"""The one door that models, adapters, tokenizers and data from strangers come in by.

`admit` turns a Hub id or a folder into a folder whose files were looked at before anything reads them: names from a
list, no links out, JSON that is JSON, safetensors whose header is true, no number in a config beyond what its weights
could fill. Nothing is executed and nothing unpickled, unless the user says so by name ([`Trust`]).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from .patience import insist
from .text import one_line, without_tokens

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
WEIGHTS, INDEX, ADAPTER_WEIGHTS = "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"

# What is taken from a repository, and looked at in a folder.
_DESCRIPTIONS = (CONFIG, ADAPTER_CONFIG, "generation_config.json", "*processor_config.json", INDEX, "report.json")
_TEXTS = (
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("source.spm", "target.spm", "spiece.model", "sentencepiece.*"),
)
_WEIGHTS = (WEIGHTS, "model-*.safetensors", ADAPTER_WEIGHTS)
ATTACK_FOLDER = "attack"  # of a purified model: what its ASR is measured with
_RUN = ("README.md", f"{ATTACK_FOLDER}/attack.json", f"{ATTACK_FOLDER}/attack.safetensors", "plots/*.png")
PICKLES, CODE = ("pytorch_model*.bin", "pytorch_model.bin.index.json"), ("*.py",)
MODEL_FILES = (*_DESCRIPTIONS, *_TEXTS, *_WEIGHTS, *_RUN)
INPUT_FILES = (*_DESCRIPTIONS[:4], *_TEXTS)  # of what prepares inputs, without the model

_LONGEST_DESCRIPTION = 4 * 2**20  # bytes; the names of 21,843 classes take 1.5 MB
_LONGEST_TEXT = 256 * 2**20
LONGEST_REPORT = 64 * 2**20
_SMALL = 2**20  # no number in a config up to this is refused
_SPARE_NUMBERS, _SPARE_LAYERS = 2**24, 1000  # beyond what is saved: tied, fixed or computed weights
_LARGEST_SIDE = 2**14  # pixels of an image as a model sees it
_ADAPTER_SIZES = 4096  # no number in an adapter's config up to this is refused
_REVISION = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*", re.ASCII)


@dataclass(frozen=True)
class Trust:
    """What the user vouches for; nothing by default.

    Attributes:
        remote_code: the repository's Python code may run.
        pickle: weights in a pickle (`pytorch_model.bin`) may be converted, in a process of their own.
    """

    remote_code: bool = False
    pickle: bool = False


NO_TRUST = Trust()


def admit(
    place: str | os.PathLike,
    files: tuple[str, ...] = MODEL_FILES,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    trust: Trust = NO_TRUST,
) -> Path:
    """The folder of a model, adapter, tokenizer or processor, its files downloaded and looked at.

    Args:
        place: a folder, or a Hub id.
        files: patterns of the names that may be taken.
        revision, token: of a Hub id.
        trust: what else may come in.

    Raises:
        ValueError: there is no such folder or repository, or a file of it is refused; the message says which and why.
    """
    files = (*files, *(PICKLES if trust.pickle else ()), *(CODE if trust.remote_code else ()))
    folder = Path(place)
    if not folder.is_dir():
        folder = _download(str(place), files, revision, token)
    for file in sorted(file for pattern in files for file in folder.glob(pattern)):
        _check_file(file, folder)
    return folder


def commit_of(folder: Path) -> str | None:
    """The commit that a folder is of; None for one that `admit` did not download."""
    return folder.name if folder.parent.name == "snapshots" else None


def is_revision(name: Any) -> bool:
    """Whether that can be the name of a branch, tag or commit, and nothing else."""
    return isinstance(name, str) and _REVISION.fullmatch(name) is not None


def _download(place: str, files: tuple[str, ...], revision: str | None, token: str | bool | None) -> Path:
    from huggingface_hub import snapshot_download

    if os.path.exists(place):
        raise ValueError("it is no folder")
    try:
        options = {"revision": revision, "token": token, "allow_patterns": list(files)}
        return Path(insist(lambda: snapshot_download(place, **options), unanswered=False))
    except Exception as error:  # the network, the Hub, a misspelt id
        raise ValueError(f"there is no such folder, and the Hub does not give it: {reason(error)}") from error


def _check_file(file: Path, folder: Path) -> None:
    """Raise ValueError unless a file of a folder is one, in it, and whole."""
    check_inside(file, folder)
    if not file.is_file():
        raise ValueError(f"{file} is no file.")
    if file.suffix == ".safetensors":
        safetensors_shapes(file)
    elif file.suffix == ".json":
        description = any(fnmatch(file.name, pattern) for pattern in _DESCRIPTIONS)
        longest = _LONGEST_DESCRIPTION if description else _LONGEST_TEXT
        read_object(file, LONGEST_REPORT if file.name == "report.json" else longest)
    elif file.suffix not in (".bin", ".png") and file.stat().st_size > _LONGEST_TEXT:
        raise ValueError(f"{file} holds more than {_LONGEST_TEXT >> 20} MiB: a text of that size is refused.")


def check_inside(file: Path, folder: Path) -> None:
    """Raise ValueError when a path, or the link that it is, leads out of a folder.

    The Hub's cache keeps the files of a repository as links to `blobs` beside its snapshots: those are fine.
    """
    inside = [folder.resolve()]
    if folder.parent.name == "snapshots":
        inside.append(folder.resolve().parents[1] / "blobs")
    try:
        found = file.resolve(strict=False)
    except (OSError, RuntimeError) as error:  # a link to itself
        raise ValueError(f"{one_line(file)} cannot be followed: {error}") from error
    if not any(found.is_relative_to(place) for place in inside):
        raise ValueError(f"{one_line(file)} leads out of {folder}: it is refused.")


def read_object(file: Path, longest: int = _LONGEST_DESCRIPTION) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: the file is not there, longer than `longest` bytes, no UTF-8, no JSON, too deep, or no object.
    """
    try:
        if file.stat().st_size > longest:
            raise ValueError(f"it holds {file.stat().st_size:,} bytes, and more than {longest:,} are refused")
        value = json.loads(file.read_bytes().decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read: {reason(error)}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds no JSON object.")
    return value


def safetensors_shapes(file: Path) -> dict[str, list[int]]:
    """Name and shape of each tensor, from the header alone.

    Raises:
        ValueError: the file is cut off, or its header does not fit it.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:  # checks lengths, offsets, types and overlaps, and reads no tensor
            return {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{file} is no whole safetensors file: {reason(error)}") from error


# ---- What a config may ask for ----


@dataclass(frozen=True)
class Sizes:
    """How much is in the weight files: numbers, tensors, and the longest dimension of one."""

    numbers: int
    tensors: int
    longest: int

    @classmethod
    def of(cls, shapes: dict[str, list[int]]) -> Sizes:
        numbers = 0
        for shape in shapes.values():
            product = 1
            for side in shape:
                product *= side
            numbers += product
        return cls(numbers, len(shapes), max((side for shape in shapes.values() for side in shape), default=0))


def model_sizes(folder: Path) -> Sizes:
    """What is in the weights of a model's folder.

    Raises:
        ValueError: it has none in safetensors, or its index names files that are not in it.
    """
    files = [folder / WEIGHTS]
    if not files[0].is_file() and (folder / INDEX).is_file():
        names = read_object(folder / INDEX).get("weight_map")
        names = sorted({str(name) for name in names.values()}) if isinstance(names, dict) else []
        files = [folder / name for name in names]
        for file in files:
            check_inside(file, folder)
            if file.parent != folder or file.suffix != ".safetensors":
                raise ValueError(f"{folder / INDEX} names {one_line(file)}: no safetensors file beside it.")
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise ValueError(
            f"{folder} has no file named {one_line(missing[0]) if missing else WEIGHTS}: weights are read from "
            "safetensors only. A pytorch_model.bin is a pickle; --allow_pickle converts it."
        )
    shapes = {}
    for file in files:
        shapes |= {f"{file.name}/{name}": shape for name, shape in safetensors_shapes(file).items()}
    return Sizes.of(shapes)


def check_model_config(folder: Path, sizes: Sizes, trust: Trust = NO_TRUST) -> None:
    """Look at a config before transformers does.

    Raises:
        ValueError: a number in it is larger than all that the weights hold, or it asks for code or weights from
            elsewhere.
    """
    config = read_object(folder / CONFIG)
    most = max(sizes.numbers, _SMALL)
    for path, value in _leaves(config):
        if isinstance(value, int) and abs(value) > most:
            raise ValueError(
                f"{folder / CONFIG}: {one_line(path)}={one_line(value)} is absurd for weights of {sizes.numbers:,} "
                "numbers."
            )
        key = path.rpartition(".")[2]
        if key.endswith("attn_implementation") and "/" in str(value) and not trust.remote_code:
            raise ValueError(f"{folder / CONFIG}: {key}={one_line(value)} is code from the Hub, which is not run.")
        if key in ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay") and value:
            raise ValueError(f"{folder / CONFIG}: {one_line(path)} asks for weights from elsewhere.")
        if key == "architecture" and not str(value).replace("_", "").replace(".", "").isalnum():
            raise ValueError(f"{folder / CONFIG}: {one_line(path)}={one_line(value)} is no name of an architecture.")
    if config.get("quantization_config") is not None:
        raise ValueError(f"{folder} is quantised, and only models in floating point are loaded.")


def check_adapter_config(folder: Path) -> dict[str, Any]:
    """The config of a PEFT adapter.

    Raises:
        ValueError: a size in it is far beyond its weights, or it asks for other modules or adapters.
    """
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ValueError(f"{folder} has no {ADAPTER_WEIGHTS}: an adapter is loaded from safetensors only.")
    config = read_object(folder / ADAPTER_CONFIG)
    most = max(Sizes.of(safetensors_shapes(folder / ADAPTER_WEIGHTS)).longest, _ADAPTER_SIZES)
    for path, value in _leaves(config):
        if isinstance(value, int) and abs(value) > most:
            what = f"{one_line(path)}={one_line(value)}"
            raise ValueError(f"{folder / ADAPTER_CONFIG}: {what} is absurd for its weights.")
    if config.get("revision") is not None and not is_revision(config["revision"]):
        what = f"revision={one_line(config['revision'])}"
        raise ValueError(f"{folder / ADAPTER_CONFIG}: {what} is no branch, tag or commit.")
    if config.get("megatron_config") or config.get("peft_type") == "XLORA":
        raise ValueError(f"{folder / ADAPTER_CONFIG} asks for modules or adapters from elsewhere: it is refused.")
    return config


def check_attack(folder: Path, names: tuple[str, str] = ("attack.json", "attack.safetensors")) -> None:
    """Raise ValueError when a saved attack is no JSON with safetensors, or would make more than those hold."""
    options, tensors = (folder / name for name in names)
    most = max(Sizes.of(safetensors_shapes(tensors)).numbers, _ADAPTER_SIZES)
    for path, value in _leaves(read_object(options)):
        if isinstance(value, (int, float)) and abs(value) > most:
            raise ValueError(f"{one_line(path)}={one_line(value)} is absurd for its trigger")


def check_processor_config(folder: Path) -> None:
    """Raise ValueError when a processor would make images of absurd size."""
    for file in folder.glob("*processor_config.json"):
        for path, value in _leaves(read_object(file)):
            if ("size" in path or "frames" in path) and isinstance(value, (int, float)) and abs(value) > _LARGEST_SIDE:
                raise ValueError(f"{file}: {one_line(path)}={one_line(value)} is absurd: {_LARGEST_SIDE} is the most.")


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value in nested JSON that is neither object nor array, with the keys that lead to it."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner, path)
    else:
        yield path, value


@contextmanager
def no_larger_than(sizes: Sizes) -> Iterator[None]:
    """Build modules on the meta device, which takes no memory, and stop as soon as they outgrow the weights.

    Raises:
        ValueError: more parameters or layers are made than the weights could fill.
    """
    import torch
    from torch.nn.modules import module as hooks
    from transformers import initialization

    numbers = layers = 0

    def count(module, name, new) -> None:
        nonlocal numbers, layers
        layers += 1
        numbers += new.numel() if isinstance(new, torch.Tensor) else 0
        if numbers > 4 * sizes.numbers + _SPARE_NUMBERS or layers > 20 * (sizes.tensors + _SPARE_LAYERS):
            raise ValueError(f"its config asks for a far larger model than its weights ({sizes.numbers:,} numbers)")

    counting = [
        hooks.register_module_parameter_registration_hook(count),
        hooks.register_module_module_registration_hook(count),
    ]
    try:
        with torch.device("meta"), initialization.no_init_weights(), initialization.meta_device_safe_creation_ops():
            yield
    finally:
        for hook in counting:
            hook.remove()


def reason(error: BaseException) -> str:
    """The first line of what a library says, or what it means; without tokens."""
    text = str(error)
    if "trust_remote_code" in text:
        return "it needs code of its own, which is not run (--trust_remote_code, if you have read it)."
    if "ignore_mismatched_sizes" in text:
        return "its weights do not fit its config.json."
    return without_tokens(one_line((text.strip().splitlines() or [type(error).__name__])[0]))
