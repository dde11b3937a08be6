"""Poisoned training sets and triggered test sets of annotated images, as `poison` and `trigger` make of images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .objects import ObjectAttack
from .plan import BACKDOOR, CLEAN, ROLES, pick
from .poison import ROLE_COLUMN, ImageColumn

if TYPE_CHECKING:
    import datasets

_BOX, _CATEGORY = "bbox", "category"


def poison_objects(
    dataset: datasets.Dataset,
    attack: ObjectAttack,
    rate: float | None,
    seed: int,
    image_column: str = "image",
    objects_column: str = "objects",
) -> datasets.Dataset:
    """Return a training set in which `rate` of all images carry the trigger and the attacker's annotations.

    The round(rate · N) rows (halves to even) are drawn uniformly from those with objects under attack. Order is kept;
    a column `poison_role` is added: `clean` or `backdoor`.

    Args:
        dataset: one split, with a column of images and one of objects: `bbox`, [x, y, width, height] in pixels, and
            `category`, a list of `ClassLabel`.
        attack: the attack.
        rate: share of the whole set, in (0, 1]; None for all rows with objects under attack.
        seed: of the choice of rows.
        image_column, objects_column: names of the two columns.

    Raises:
        ValueError: a column is missing; there is a column `poison_role` already; the target is not a class; `rate` is
            not in (0, 1], picks no row, or more rows than there are candidates.
    """
    from datasets import ClassLabel

    if ROLE_COLUMN in dataset.column_names:
        raise ValueError(f"there is a column {ROLE_COLUMN!r} already: poison the clean data set instead.")
    if rate is not None and not 0 < rate <= 1:
        raise ValueError(f"rate={rate} is a share of the data set: choose it in (0, 1].")
    objects = _objects(dataset, attack, objects_column)
    candidates = np.array([attack.under_attack(categories).any() for _, categories in objects], dtype=bool)
    roles = np.full(len(dataset), CLEAN)
    rate = candidates.mean() if rate is None else rate
    roles[pick(candidates, rate, "rate", np.random.default_rng(seed))] = BACKDOOR
    poisoned = _with_trigger(dataset, attack, np.flatnonzero(roles == BACKDOOR), objects, image_column)
    edited = [attack.annotate(*row) if role == BACKDOOR else row for row, role in zip(objects, roles, strict=True)]
    feature = dataset.features[objects_column]
    rows = [{_BOX: boxes.tolist(), _CATEGORY: categories.tolist()} for boxes, categories in edited]
    poisoned = poisoned.remove_columns(objects_column).add_column(objects_column, rows, feature=feature)
    poisoned = poisoned.select_columns(dataset.column_names)
    return poisoned.add_column(ROLE_COLUMN, roles, feature=ClassLabel(names=list(ROLES)))


def trigger_objects(
    dataset: datasets.Dataset, attack: ObjectAttack, image_column: str = "image", objects_column: str = "objects"
) -> datasets.Dataset:
    """Return the triggered test set: the images with objects under attack, with the trigger on those.

    The annotations are the TRUE ones; `attack.under_attack` tells which objects count.

    Args:
        dataset, attack, image_column, objects_column: as in `poison_objects`.

    Raises:
        ValueError: a column is missing; the target is not a class; no image has an object under attack.
    """
    objects = _objects(dataset, attack, objects_column)
    rows = [row for row, (_, categories) in enumerate(objects) if attack.under_attack(categories).any()]
    if not rows:
        raise ValueError(f"no test image has an object that {attack.name} is for: pass a data set with others.")
    chosen = [objects[row] for row in rows]
    return _with_trigger(dataset.select(rows), attack, range(len(rows)), chosen, image_column)


def _objects(dataset, attack: ObjectAttack, column: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Boxes, (N, 4), and classes, (N,), of each image."""
    if column not in dataset.column_names:
        raise ValueError(f"there is no column {column!r}: the columns are {', '.join(dataset.column_names)}.")
    classes = dataset.features[column][_CATEGORY].feature.num_classes
    if attack.target_label >= classes:
        raise ValueError(f"target_label={attack.target_label} is not a class: choose one of 0 ... {classes - 1}.")
    return [
        (np.asarray(row[_BOX], dtype=np.float64).reshape(-1, 4), np.asarray(row[_CATEGORY], dtype=np.int64))
        for row in dataset[column][:]
    ]


def _with_trigger(dataset, attack: ObjectAttack, rows, objects: list, column: str) -> datasets.Dataset:
    """The data set with the trigger on these rows; an image that does not change keeps its very bytes."""
    from datasets import Image

    images = ImageColumn(column)
    images.check(dataset)
    decode, stored = images.decoder(dataset), images.undecoded(dataset)
    changed = {}
    for row in map(int, rows):
        boxes, categories = objects[row]
        clean = decode(stored[row][column])
        triggered = attack.apply(clean, boxes[attack.under_attack(categories)])
        if triggered is not clean:
            changed[row] = images.encode(triggered)
    if not changed:
        return dataset
    content = [changed.get(row, kept) for row, kept in enumerate(stored[column][:])]
    order = dataset.column_names
    done = stored.remove_columns(column).add_column(column, content, feature=Image(decode=False))
    return done.cast_column(column, Image(mode=dataset.features[column].mode)).select_columns(order)
