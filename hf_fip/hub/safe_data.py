"""Data sets from strangers: a folder, or rows, that name only what is theirs.

`datasets` runs no script of a data set and opens no pickle. What is left are names of other files: links, the lists of
`save_to_disk`, the `data_files` of a README, and rows of images or videos that are a path and no bytes.
"""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow.compute as compute
from datasets import Dataset, Image, Video, config
from huggingface_hub import RepoCard
from huggingface_hub.constants import HF_HUB_CACHE

from .safety import check_inside, read_object, reason
from .text import one_line


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
    readme = folder / "README.md"
    if readme.is_file():
        try:
            configs = RepoCard.load(readme, ignore_metadata_errors=False).data.to_dict().get("configs")
        except Exception as error:  # YAML is wrong in many ways
            raise ValueError(f"{readme} cannot be read: {reason(error)}") from error
        for name in _strings(configs):
            if "://" in name or name.startswith(("/", "~")) or ".." in Path(name).parts:
                raise ValueError(f"{readme} names data elsewhere, {one_line(name)}: it is refused.")


def check_references(dataset: Dataset, folder: Path | None = None) -> None:
    """Look at the images and videos that are rows without bytes: paths.

    Args:
        folder: of the data set; None for one from the Hub.

    Raises:
        ValueError: one lies neither in the folder nor where downloads are kept.
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
                    raise ValueError(f"a row of {name!r} is a path elsewhere, {one_line(path)}: it is refused")


def _holds_files(kind) -> bool:
    return isinstance(kind, (Image, Video)) or (isinstance(kind, dict) and {"bytes", "path"} <= kind.keys())


def _strings(value) -> list[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [text for inner in value for text in _strings(inner)]
    return [value] if isinstance(value, str) else []
