"""Labelled images from the Hub, a folder, parquet files, or scikit-learn's digits; and the defender's clean split."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset, load_from_disk

from ..hub.safe_data import RefusedDataError, check_data_folder, check_hub_data, check_references
from .columns import image_and_label, with_classes
from .image_data import DIGITS, NAMED_IMAGES, NamedImages, named_images, squares

_VALIDATION_NAMES = ("validation", "valid", "val", "dev")
_TEST_NAMES = ("test", *_VALIDATION_NAMES)
_HELD_OUT = 0.25  # share of the rows taken for testing when a data set has no test split


@dataclass(frozen=True)
class LabelledImages:
    """Training and test images with one label each.

    Attributes:
        train, test: `datasets.Dataset`s with the columns `image` (a `datasets.Image`) and `label` (one `ClassLabel`).
        name: what the user called it.
        known: what is known of it, when it is one of `NAMED_IMAGES`.
    """

    train: Dataset
    test: Dataset
    name: str
    known: NamedImages | None = None

    @property
    def class_names(self) -> list[str]:
        return self.train.features["label"].names


def load_images(
    name_or_path: str = DIGITS,
    config_name: str | None = None,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    train_split: str | None = None,
    test_split: str | None = None,
    max_train_samples: int | None = None,
    max_test_samples: int | None = None,
    seed: int = 0,
    token: str | bool | None = None,
    revision: str | None = None,
) -> LabelledImages:
    """Load a labelled image data set.

    Args:
        name_or_path: a Hub id; a folder (of parquet files, of one folder of images a class, or one written by
            `save_to_disk`); a single parquet file; or a short name of `NAMED_IMAGES`, unless there is a file or folder
            of that name. Among them is `digits`, scikit-learn's 1,797 handwritten digits of 8×8 pixels.
        config_name: the configuration of a Hub data set that has several.
        image_column, label_column: known, or guessed from the column types and usual names, when left out.
        train_split, test_split: the same. Without a test split a quarter of the rows is set aside.
        max_train_samples, max_test_samples: keep a seeded random part.

    Raises:
        ValueError: when the data, a split or a column cannot be found; the message lists what is there.
    """
    is_local = name_or_path != DIGITS and os.path.exists(name_or_path)
    known = None if is_local else named_images(name_or_path)
    try:
        place = known.hub_id if known else name_or_path
        splits = _digits() if name_or_path == DIGITS else load_splits(place, config_name, token, revision)
    except ValueError as error:
        if known or is_local or "/" in name_or_path:
            raise
        raise ValueError(f"{error} (Short names: {', '.join(NAMED_IMAGES)}.)") from error
    if known:
        image_column, label_column = image_column or known.image_column, label_column or known.label_column
        test_split = test_split or known.test_split
    train, test = train_and_test(
        splits,
        name_or_path,
        lambda part: image_and_label(part, image_column, label_column, folder_of(name_or_path)),
        train_split=train_split,
        test_split=test_split,
        max_train_samples=max_train_samples,
        max_test_samples=max_test_samples,
        seed=seed,
    )
    if known and known.side:
        train, test = squares(train, known.side), squares(test, known.side)
    return LabelledImages(train, test, name_or_path, known)


def train_and_test(
    splits: DatasetDict,
    name: str,
    columns: Callable[[Dataset], Dataset],
    *,
    train_split: str | None,
    test_split: str | None,
    max_train_samples: int | None,
    max_test_samples: int | None,
    seed: int,
) -> tuple[Dataset, Dataset]:
    """Training and test data with the same classes, from the splits of a data set.

    Args:
        splits: what was found.
        name: of the data set, for messages.
        columns: makes of a split the columns that are wanted, among them `label`.
        train_split, test_split, max_train_samples, max_test_samples, seed: as in `load_images`.

    Raises:
        ValueError: as in `load_images`.
    """
    names = pick_splits(splits, name, train_split, test_split)
    for split in names:
        if len(splits[split]) < 3 - len(names):
            raise ValueError(f"{name}: the split {split!r} has {len(splits[split])} rows, which is too few.")
    parts = with_classes(*(columns(splits[split]) for split in names))
    return divide(parts, max_train_samples, max_test_samples, seed)


def pick_splits(splits: DatasetDict, name: str, train_split: str | None, test_split: str | None) -> list[str]:
    """The names of the splits to train and to test on; the former alone where there is none to test on.

    Beside a training split such as `trainval` no validation split is guessed: its rows are in both.

    Raises:
        ValueError: as in `load_images`.
    """
    train_split = _pick_split(splits, train_split, ("train", "training"), name, "--train_split")
    names = [train_split]
    merged = train_split not in _TEST_NAMES and any(part in train_split for part in _VALIDATION_NAMES)
    usual = _TEST_NAMES[:1] if merged else _TEST_NAMES
    if test_split or set(usual) & set(splits):
        names.append(_pick_split(splits, test_split, usual, name, "--test_split"))
    if names[1:] == [train_split]:
        raise ValueError(f"The split {train_split!r} cannot be both for training and for testing. Set --test_split.")
    return names


def divide(
    parts: list[Dataset], max_train_samples: int | None, max_test_samples: int | None, seed: int
) -> tuple[Dataset, Dataset]:
    """Training and test data of the splits that were picked, at most so many; a quarter of one split is for testing.

    Raises:
        ValueError: when a limit is below 1.
    """
    if len(parts) == 1:
        rows = np.random.default_rng(seed).permutation(len(parts[0]))
        held_out = math.ceil(_HELD_OUT * len(rows))
        parts = [parts[0].select(rows[held_out:]), parts[0].select(rows[:held_out])]
    train = _random_part(parts[0], max_train_samples, seed, "max_train_samples")
    test = _random_part(parts[1], max_test_samples, seed, "max_test_samples")
    return train, test


def split_clean(train: Dataset, samples: int, seed: int) -> tuple[Dataset, Dataset]:
    """The defender's clean images and the rest, which is all the attacker trains on.

    The rows are shuffled by `seed` and the first `samples` are the clean ones, so that with one seed a smaller clean
    split lies inside a larger one.

    Raises:
        ValueError: when the clean split would be empty, or leaves nothing.
    """
    if not 0 < samples < len(train):
        raise ValueError(
            f"A clean split of {samples} out of {len(train)} training images is not possible: "
            "set --clean_samples (or --clean_fraction) so that at least one image is clean and one is left."
        )
    order = np.random.default_rng(seed).permutation(len(train))
    return train.select(np.sort(order[:samples])), train.select(np.sort(order[samples:]))


def folder_of(path: str) -> Path | None:
    """The folder that a local data set's files lie in; None for one from the Hub."""
    return Path(path) if os.path.isdir(path) else Path(path).parent if os.path.exists(path) else None


def load_splits(
    path: str, config_name: str | None = None, token: str | bool | None = None, revision: str | None = None
) -> DatasetDict:
    """The splits of a data set: a Hub id, a folder or a parquet file.

    Raises:
        ValueError: when there is none, it cannot be read, or it names data elsewhere.
    """
    is_local = os.path.exists(path)
    if not is_local and (path.startswith((".", "/", "~")) or path.endswith(".parquet") or not path):
        raise ValueError(f"{path!r} does not exist. Set --dataset_name to a folder, a parquet file or a Hub id.")
    folder = folder_of(path)
    try:
        if os.path.isdir(path):
            check_data_folder(folder)
        elif not is_local:
            check_hub_data(path, revision, token)
        if is_local and os.path.isdir(path) and {"dataset_dict.json", "state.json"} & set(os.listdir(path)):
            found = load_from_disk(path)
        elif is_local and os.path.isfile(path):
            found = load_dataset("parquet", data_files=path)
        else:
            found = load_dataset(path, config_name, token=token, revision=revision)
        found = found if isinstance(found, DatasetDict) else DatasetDict(train=found)
        for part in found.values():
            check_references(part, folder)
    except Exception as error:  # each reader raises kinds of its own
        refused = isinstance(error, RefusedDataError)
        why = (str(error if refused else error.__cause__ or error).splitlines() or [type(error).__name__])[0]
        if is_local or refused:
            raise ValueError(f"The data set {path!r} cannot be read: {why}") from error
        raise ValueError(
            f"No data set {path!r} on disk or on the Hub (misspelt, offline, or private: `hf auth login`): {why}"
        ) from error
    return found


def _digits() -> DatasetDict:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = np.round(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    return DatasetDict(train=Dataset.from_dict({"image": list(images), "label": labels}, features=features))


def _pick_split(splits: DatasetDict, wanted: str | None, usual: tuple[str, ...], path: str, argument: str) -> str:
    for name in (wanted,) if wanted else usual:
        if name in splits:
            return name
    raise ValueError(f"{path} has no split {wanted or usual[0]!r}: it has {', '.join(splits)}. Set {argument}.")


def _random_part(dataset: Dataset, samples: int | None, seed: int, name: str) -> Dataset:
    if samples is None:
        return dataset
    if samples < 1:
        raise ValueError(f"--{name}={samples} has to be at least 1.")
    if samples >= len(dataset):
        return dataset
    return dataset.select(np.sort(np.random.default_rng(seed).permutation(len(dataset))[:samples]))
