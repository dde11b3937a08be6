"""Poisoned training sets and triggered test sets.

Only the inputs that change are decoded. Images are stored as PNG, which loses nothing, so that the trigger survives;
all other rows keep the very bytes they had.

An image that changes becomes 8-bit gray (PIL's mode L) if it is gray: L, LA, 1, or I;16, of which the high byte is
kept. Any other (palette, CMYK, RGBA, ...) becomes RGB. Transparency is dropped.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np

from .base import Attack
from .plan import BACKDOOR, COVER, NO_DONOR, ROLES

if TYPE_CHECKING:
    import datasets
    import PIL.Image

ROLE_COLUMN = "poison_role"


def poison(
    dataset: datasets.Dataset,
    attack: Attack,
    rate: float,
    seed: int,
    image_column: str = "image",
    label_column: str = "label",
    num_labels: int | None = None,
) -> datasets.Dataset:
    """Return a training set in which `rate` of all rows carry the trigger of `attack` and its label.

    The round(rate · N) backdoor rows (halves to even) are drawn uniformly from `attack.candidates`: as a rule, from
    the rows whose label changes, so for `all_to_one` none of the target class; for clean-label attacks, from those of
    the target class. From the other rows, of any class, round(attack.cover_rate · N) become covers, which keep their
    labels. An attack with a plan of its own (`attack.plan`) says so. Where the trigger is trained with the victim
    (`attack.triggers_in_training`), the rows are marked, and images and labels are left to the training.

    Order and features are kept, formats and transforms are not. A column `poison_role` is added: `clean`, `backdoor`
    or `cover`. The same seed gives the same set; no global random state is read or changed.

    Args:
        dataset: one split, with a column of the feature `datasets.Image` (PIL images, paths or bytes, of any size).
        attack: the attack.
        rate: share of the whole set, in (0, 1].
        seed: of the choice of rows, and of the covers.
        image_column, label_column: names of the two columns.
        num_labels: number of classes; not needed if the label column is a `ClassLabel`.

    Raises:
        TypeError: `dataset` is not one split.
        ValueError: a column is missing or of the wrong kind; the target is not a class; `rate` is not in (0, 1],
            picks no row, or picks more rows than there are candidates.
    """
    return poison_column(dataset, attack, rate, seed, ImageColumn(image_column), label_column, num_labels)


def trigger(
    dataset: datasets.Dataset,
    attack: Attack,
    image_column: str = "image",
    label_column: str = "label",
    num_labels: int | None = None,
) -> datasets.Dataset:
    """Return the triggered test set, for ASR and RA: the rows that count (`attack.eligible`), with the trigger.

    The labels are the TRUE ones. RA compares predictions with them, ASR with `attack.attack_label` of them.
    Order and features are kept, formats and transforms are not.

    Args:
        dataset: one split, with a column of the feature `datasets.Image` (PIL images, paths or bytes, of any size).
        attack: the attack.
        image_column, label_column: names of the two columns.
        num_labels: number of classes; not needed if the label column is a `ClassLabel`.

    Raises:
        TypeError: `dataset` is not one split.
        ValueError: a column is missing or of the wrong kind; the target is not a class; no row counts.
    """
    return trigger_column(dataset, attack, ImageColumn(image_column), label_column, num_labels)


# ---- For any kind of input ----


@dataclass(frozen=True)
class InputColumn(ABC):
    """The column with the inputs of an attack: its name, and how an input is stored in it."""

    name: str
    noun = "inputs"

    @abstractmethod
    def check(self, dataset: datasets.Dataset) -> None:
        """Raise ValueError where the column holds something else."""

    @abstractmethod
    def undecoded(self, dataset: datasets.Dataset) -> datasets.Dataset:
        """The data set, giving its inputs as they are stored."""

    @abstractmethod
    def decoder(self, dataset: datasets.Dataset) -> Callable[..., np.ndarray]:
        """What makes of a stored input of this data set one as the attack takes it."""

    @abstractmethod
    def encode(self, array: np.ndarray):
        """What is stored of an input."""


class ImageColumn(InputColumn):
    """Images: uint8 H×W×1 or H×W×3, stored as PNG."""

    noun = "images"

    def check(self, dataset):
        from datasets import Image

        if not isinstance(dataset.features[self.name], Image):
            raise ValueError(
                f"column {self.name!r} does not hold images: use dataset.cast_column({self.name!r}, datasets.Image())."
            )

    def undecoded(self, dataset):
        from datasets import Image

        return dataset.cast_column(self.name, Image(decode=False))

    def decoder(self, dataset):
        from datasets import Image

        decoder = Image(mode=dataset.features[self.name].mode)
        return lambda stored: to_array(decoder.decode_example(stored))

    def encode(self, array):
        return {"bytes": to_png(array), "path": None}


def poison_column(
    dataset: datasets.Dataset,
    attack: Attack,
    rate: float,
    seed: int,
    inputs: InputColumn,
    label_column: str = "label",
    num_labels: int | None = None,
) -> datasets.Dataset:
    """`poison` for any column of inputs."""
    from datasets import ClassLabel, concatenate_datasets

    labels, num_labels = _labels(dataset, inputs, label_column, num_labels)
    if ROLE_COLUMN in dataset.column_names:
        raise ValueError(f"there is a column {ROLE_COLUMN!r} already: poison the clean data set instead.")
    if not 0 < rate <= 1:
        raise ValueError(f"rate={rate} is a share of the data set: choose it in (0, 1].")

    plan = attack.plan(labels, num_labels, rate, np.random.default_rng(seed))
    clean = dataset.with_format(None)
    parts, order = [clean], plan.rows.copy()

    decode, stored = inputs.decoder(clean), inputs.undecoded(clean.select_columns(inputs.name))

    def donors_of(entries: np.ndarray) -> list[np.ndarray | None]:
        rows = plan.donors[entries]
        return [None if row == NO_DONOR else decode(stored[int(row)][inputs.name]) for row in rows]

    def backdoored(arrays: list[np.ndarray], entries: np.ndarray) -> list[np.ndarray]:
        return attack.apply_in_training(arrays, donors_of(entries))

    def covered(arrays: list[np.ndarray], entries: np.ndarray) -> list[np.ndarray]:
        # A stream for each entry, apart from the one of the plan: the order of work does not matter.
        streams = [np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(int(entry),))) for entry in entries]
        return [
            attack.apply_cover(array, stream, donor)
            for array, stream, donor in zip(arrays, streams, donors_of(entries), strict=True)
        ]

    for role, change in ((BACKDOOR, backdoored), (COVER, covered)):
        entries = np.flatnonzero(plan.roles == role)
        if attack.triggers_in_training or len(entries) == 0:
            continue
        order[entries] = sum(map(len, parts)) + np.arange(len(entries))
        source, columns = clean.select(plan.rows[entries]), {label_column: plan.labels[entries]}
        what = f"{attack.name}, {ROLES[role]} {inputs.noun}"
        parts.append(_changed(source, inputs, change, entries, columns, what))
    poisoned = concatenate_datasets(parts).select(order)
    return poisoned.add_column(ROLE_COLUMN, plan.roles, feature=ClassLabel(names=list(ROLES)))


def trigger_column(
    dataset: datasets.Dataset,
    attack: Attack,
    inputs: InputColumn,
    label_column: str = "label",
    num_labels: int | None = None,
) -> datasets.Dataset:
    """`trigger` for any column of inputs."""
    labels, num_labels = _labels(dataset, inputs, label_column, num_labels)
    rows = np.flatnonzero(attack.eligible(labels, num_labels))
    if len(rows) == 0:
        raise ValueError("every row is of the attacked class already: pass a data set with other classes.")
    return _changed(
        dataset.with_format(None).select(rows),
        inputs,
        lambda arrays, rows: [attack.apply(array) for array in arrays],
        rows,
        {},
        f"{attack.name}, test {inputs.noun}",
    )


def _labels(
    dataset: datasets.Dataset, inputs: InputColumn, label_column: str, num_labels: int | None
) -> tuple[np.ndarray, int]:
    """Return the labels (int64) and the number of classes, after checking that the data set can be poisoned."""
    import pyarrow
    from datasets import ClassLabel, Dataset

    if not isinstance(dataset, Dataset):
        raise TypeError(f"expected a datasets.Dataset, not {type(dataset).__name__}: pass one split of it, loaded.")
    for column in (inputs.name, label_column):
        if column not in dataset.column_names:
            raise ValueError(f"there is no column {column!r}: the columns are {', '.join(dataset.column_names)}.")
    inputs.check(dataset)

    column = dataset.select_columns(label_column).with_format("arrow")[:][label_column]
    if pyarrow.types.is_list(column.type) or pyarrow.types.is_fixed_size_list(column.type):
        raise ValueError(
            f"column {label_column!r} holds several labels a row: these attacks are for {inputs.noun} of one class "
            "each."
        )
    if not pyarrow.types.is_integer(column.type) or column.null_count:
        raise ValueError(
            f"column {label_column!r} does not hold an integer in each row: "
            f"use dataset.class_encode_column({label_column!r})."
        )
    labels = column.to_numpy().astype(np.int64)

    feature = dataset.features[label_column]
    if num_labels is None and isinstance(feature, ClassLabel):
        num_labels = feature.num_classes
    if num_labels is None:
        raise ValueError(f"column {label_column!r} does not say how many classes there are: pass num_labels=.")
    if len(labels) and not 0 <= labels.min() <= labels.max() < num_labels:
        raise ValueError(
            f"labels from {labels.min()} to {labels.max()} do not fit {num_labels} classes: "
            "pass the right num_labels=, or leave unlabelled rows out with dataset.filter."
        )
    return labels, num_labels


def _changed(
    dataset: datasets.Dataset,
    inputs: InputColumn,
    change: Callable[[list[np.ndarray], np.ndarray], list[np.ndarray]],
    keys: np.ndarray,
    columns: dict[str, np.ndarray],
    description: str,
) -> datasets.Dataset:
    """Return `dataset` with its inputs replaced by change(inputs, their keys), and `columns` by other values."""
    decode = inputs.decoder(dataset)

    def rewrite(stored: list, indices: list[int]) -> dict[str, list]:
        arrays = change([decode(value) for value in stored], keys[indices])
        new = {name: values[indices] for name, values in columns.items()}
        return {inputs.name: [inputs.encode(array) for array in arrays], **new}

    return inputs.undecoded(dataset).map(
        rewrite,
        with_indices=True,
        input_columns=inputs.name,
        batched=True,
        batch_size=100,
        features=dataset.features,
        # The cache cannot tell when the code of an attack has changed.
        load_from_cache_file=False,
        desc=description,
    )


def to_array(image: PIL.Image.Image | None) -> np.ndarray:
    """Return a PIL image as uint8 H×W×1 (gray) or H×W×3 (RGB).

    Raises:
        ValueError: there is no image, or it has 32 bits a channel, whose range is not known.
    """
    if image is None:
        raise ValueError("a row has no image (None): leave such rows out with dataset.filter.")
    if image.mode in ("I", "F"):
        raise ValueError(f"images of mode {image.mode} have no fixed range of values: convert them to 8 bits first.")
    if image.mode.startswith("I;16"):  # PIL's own conversion would clip to 255
        array = (np.asarray(image) >> 8).astype(np.uint8)
    else:
        array = np.asarray(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))
    return array[..., None] if array.ndim == 2 else array


def to_png(array: np.ndarray) -> bytes:
    """Return a uint8 array, H×W×1 or H×W×3, as a PNG file."""
    import PIL.Image

    file = BytesIO()
    PIL.Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else array).save(file, format="PNG")
    return file.getvalue()
