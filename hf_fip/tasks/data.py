"""Labelled images from the Hub, a folder, parquet files, or scikit-learn's digits; and the defender's clean split."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, load_dataset, load_from_disk

DIGITS = "digits"
_IMAGE_NAMES = ("image", "img", "pixel_values", "picture")
_LABEL_NAMES = ("label", "labels", "fine_label", "class", "target")
_TEST_NAMES = ("test", "validation", "valid", "val", "dev")
_HELD_OUT = 0.25  # share of the rows taken for testing when a data set has no test split


@dataclass(frozen=True)
class LabelledImages:
    """Training and test images with one label each.

    Attributes:
        train, test: `datasets.Dataset`s with the columns `image` (a `datasets.Image`) and `label` (a `ClassLabel`).
        name: what the user called it.
    """

    train: Dataset
    test: Dataset
    name: str

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
            `save_to_disk`); a single parquet file; or `digits`, scikit-learn's 1,797 handwritten digits of 8×8 pixels.
        config_name: the configuration of a Hub data set that has several.
        image_column, label_column: guessed from the column types and usual names when left out.
        train_split, test_split: guessed when left out. Without a test split a quarter of the rows is set aside.
        max_train_samples, max_test_samples: keep a seeded random part.

    Raises:
        ValueError: when the data, a split or a column cannot be found; the message lists what is there.
    """
    splits = _digits() if name_or_path == DIGITS else _load(name_or_path, config_name, token, revision)
    train_split = _pick_split(splits, train_split, ("train", "training"), name_or_path, "--train_split")
    if test_split is None and not set(_TEST_NAMES) & set(splits):
        parts = splits[train_split].train_test_split(test_size=_HELD_OUT, seed=seed, load_from_cache_file=False)
        train, test = parts["train"], parts["test"]
    else:
        test_split = _pick_split(splits, test_split, _TEST_NAMES, name_or_path, "--test_split")
        train, test = splits[train_split], splits[test_split]
    image_column = pick_column(train, image_column, _IMAGE_NAMES, Image, "image")
    label_column = pick_column(train, label_column, _LABEL_NAMES, ClassLabel, "label")
    train, test = (_normalise(part, image_column, label_column) for part in (train, test))
    if not isinstance(train.features["label"], ClassLabel):
        train, test = _name_classes(train, test)
    train = _random_part(train, max_train_samples, seed, "max_train_samples")
    test = _random_part(test, max_test_samples, seed, "max_test_samples")
    for part, what in ((train, "training"), (test, "test")):
        if not len(part):
            raise ValueError(f"{name_or_path}: the {what} split is empty.")
    return LabelledImages(train, test, name_or_path)


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


def pick_column(dataset: Dataset, wanted: str | None, usual: tuple[str, ...], feature: type, what: str) -> str:
    """The column the user named; else the only one of the right type; else one with a usual name.

    Raises:
        ValueError: listing the columns, when there is no such column or no good guess.
    """
    columns = dataset.features
    there = ", ".join(f"{name} ({type(kind).__name__})" for name, kind in columns.items())
    if wanted is not None:
        if wanted not in columns:
            raise ValueError(f"No column {wanted!r} for the {what}s: the columns are {there}. Set --{what}_column.")
        return wanted
    typed = [name for name, kind in columns.items() if isinstance(kind, feature)]
    if len(typed) == 1:
        return typed[0]
    for name in usual:
        if name in (typed or columns):
            return name
    raise ValueError(f"Cannot tell which column holds the {what}s: the columns are {there}. Set --{what}_column.")


def _load(path: str, config_name: str | None, token: str | bool | None, revision: str | None) -> DatasetDict:
    from datasets.exceptions import DatasetNotFoundError

    is_local = os.path.exists(path)
    if not is_local and (path.startswith((".", "/", "~")) or path.endswith(".parquet")):
        raise ValueError(f"{path} does not exist. Set --dataset_name to a folder, a parquet file or a Hub id.")
    try:
        if is_local and os.path.isdir(path) and {"dataset_dict.json", "state.json"} & set(os.listdir(path)):
            found = load_from_disk(path)
        elif is_local and os.path.isfile(path):
            found = load_dataset("parquet", data_files=path)
        else:
            found = load_dataset(path, config_name, token=token, revision=revision)
    except DatasetNotFoundError as error:
        raise ValueError(
            f"No data set {path!r} on the Hub or on disk (offline, misspelt, or private: log in with `hf auth login`)."
        ) from error
    except (OSError, RuntimeError) as error:  # unreadable or truncated files
        raise ValueError(f"The data set {path!r} cannot be read: {str(error).splitlines()[0]}") from error
    return found if isinstance(found, DatasetDict) else DatasetDict(train=found)


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


def _normalise(dataset: Dataset, image_column: str, label_column: str) -> Dataset:
    """Keep the two columns, under the names `image` and `label`."""
    for column, what in ((image_column, "image"), (label_column, "label")):
        if column not in dataset.features:
            raise ValueError(f"One split has no column {column!r}: it has {', '.join(dataset.features)}.")
        if column != what and what in dataset.features:
            dataset = dataset.remove_columns(what)
        if column != what:
            dataset = dataset.rename_column(column, what)
    dataset = dataset.select_columns(["image", "label"])
    if not isinstance(dataset.features["image"], Image):
        try:
            dataset = dataset.cast_column("image", Image())
        except Exception as error:  # pyarrow raises several kinds
            raise ValueError(
                f"The column {image_column!r} holds no images but {dataset.features['image']}. Set --image_column."
            ) from error
    return dataset


def _name_classes(train: Dataset, test: Dataset) -> tuple[Dataset, Dataset]:
    """Give labels that are plain strings or integers a ClassLabel."""
    kind = train.features["label"]
    if not isinstance(kind, Value) or kind.dtype.startswith("float"):
        raise ValueError(f"The label column holds {kind}, not one class a row. Set --label_column.")
    values = set(train.unique("label")) | set(test.unique("label"))
    if None in values:
        raise ValueError("Some rows have no label (null). Remove them, or set --label_column.")
    if all(isinstance(value, int) for value in values):
        if min(values) < 0:
            raise ValueError(f"The label column holds negative numbers (the least is {min(values)}).")
        names = [str(number) for number in range(max(values) + 1)]
    else:
        names = sorted(values)
    return tuple(_cast_labels(part, ClassLabel(names=names)) for part in (train, test))


def _cast_labels(dataset: Dataset, feature: ClassLabel) -> Dataset:
    labels = dataset["label"][:]
    if labels and isinstance(labels[0], str):
        labels = feature.str2int(labels)
    dataset = dataset.remove_columns("label").add_column("label", np.asarray(labels, dtype=np.int64))
    return dataset.cast_column("label", feature)


def _random_part(dataset: Dataset, samples: int | None, seed: int, name: str) -> Dataset:
    if samples is None:
        return dataset
    if samples < 1:
        raise ValueError(f"--{name}={samples} has to be at least 1.")
    if samples >= len(dataset):
        return dataset
    return dataset.select(np.sort(np.random.default_rng(seed).permutation(len(dataset))[:samples]))
