"""Data sets from strangers: a folder, or rows, that name only what is theirs.

`datasets` runs no script of a data set and opens no pickle. What is left are names of other files: links, the lists of
`save_to_disk`, the `data_files` of a README or a `.huggingface.yaml`, and rows of images or videos that are a path and
no bytes.
"""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow.compute as compute
import yaml
from datasets import Dataset, Image, Video, config
from datasets.utils.file_utils import is_relative_path
from huggingface_hub import RepoCard, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import EntryNotFoundError

from .safety import check_inside, read_object, reason
from .text import one_line

_DESCRIPTIONS = (config.REPOCARD_FILENAME, config.REPOYAML_FILENAME)  # README.md; .huggingface.yaml, which wins


class RefusedDataError(ValueError):
    """A data set names what is not its own."""


def check_data_folder(folder: Path) -> None:
    """Look at a data set's folder before `datasets` does.

    Raises:
        ValueError: a file in it, or one that it names, lies elsewhere.
    """
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            file = Path(place, name)
            if file.is_symlink():
                check_inside(file, folder)
        for name in {"state.json", "dataset_info.json", "dataset_dict.json"} & set(files):
            state = read_object(Path(place, name), longest=64 * 2**20)
            for listed in state.get("_data_files") or []:
                check_inside(Path(place, str(listed.get("filename") if isinstance(listed, dict) else listed)), folder)
    for name in _DESCRIPTIONS:
        if (folder / name).is_file():
            _check_description(folder / name)


def check_hub_data(name: str, revision: str | None = None, token: str | bool | None = None) -> None:
    """Look at what a data set on the Hub says of itself before `datasets` does.

    What cannot be reached is passed over: `datasets` then has no more than what it prepared earlier.

    Raises:
        RefusedDataError: it names a file that lies elsewhere.
    """
    if config.HF_HUB_OFFLINE:
        return
    name = name.removeprefix("hf://datasets/")
    options = {"repo_type": "dataset", "revision": revision, "token": token}
    for description in _DESCRIPTIONS:
        try:
            url = hf_hub_url(name, description, repo_type="dataset", revision=revision)
            get_hf_file_metadata(url, token=token)  # asks once, where a download would ask for half a minute
        except EntryNotFoundError:
            continue
        except Exception:  # of the client, its HTTP library or the network
            return
        _check_description(Path(hf_hub_download(name, description, **options)))


def _check_description(file: Path) -> None:
    """Raise RefusedDataError when the `configs` of a data set name files elsewhere."""
    try:
        if file.name == config.REPOCARD_FILENAME:
            said = RepoCard.load(file, ignore_metadata_errors=False).data.to_dict()
        else:
            said = dict(yaml.safe_load(file.read_text(encoding="utf-8")) or {})  # pairs do as well
        for name in _strings(said.get("configs")):
            if not is_relative_path(name) or "::" in name or name.startswith("~") or ".." in Path(name).parts:
                raise RefusedDataError(f"{file} names data elsewhere, {one_line(name)}: it is refused.")
    except RefusedDataError:
        raise
    except Exception as error:  # YAML is wrong in many ways
        raise RefusedDataError(f"{file} cannot be read: {reason(error)}") from error


def check_references(dataset: Dataset, folder: Path | None = None) -> None:
    """Look at the images and videos that are rows without bytes: paths.

    Args:
        folder: of the data set; None for one from the Hub.

    Raises:
        RefusedDataError: one lies neither in the folder nor where downloads are kept.
    """
    places = [Path(place).resolve() for place in (folder, HF_HUB_CACHE, config.HF_CACHE_HOME) if place is not None]
    columns = [name for name, kind in dataset.features.items() if _holds_files(kind)]
    for name in columns:
        column = dataset.select_columns(name).with_format("arrow")
        for start in range(0, len(column), 10_000):
            values = column[start : start + 10_000][name]
            paths = values.filter(compute.is_null(compute.struct_field(values, "bytes")))
            for path in compute.struct_field(paths, "path").to_pylist():
                if path is not None and not any(Path(path).resolve().is_relative_to(place) for place in places):
                    raise RefusedDataError(f"a row of {name!r} is a path elsewhere, {one_line(path)}: it is refused")


def _holds_files(kind) -> bool:
    return isinstance(kind, (Image, Video)) or (isinstance(kind, dict) and {"bytes", "path"} <= kind.keys())


def _strings(value) -> list[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple, set)):  # YAML has them all
        return [text for inner in value for text in _strings(inner)]
    return [value] if isinstance(value, str) else []
