"""The columns of a labelled image data set, whatever their names and types, as `image` and `label`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Image, Value

from ..hub.safe_data import check_references
from ..hub.text import one_line

_IMAGE_NAMES = ("image", "img", "pixel_values", "picture")
_LABEL_NAMES = ("label", "labels", "fine_label", "class", "target")
_MOST_CLASSES = 100_000  # a larger number in a label column is no class
_LONGEST_LIST = 1000  # characters of the names of a model's classes that are shown


def image_and_label(
    dataset: Dataset, image_column: str | None = None, label_column: str | None = None, folder: Path | None = None
) -> Dataset:
    """Keep two columns of a data set with rows: `image`, which becomes a `datasets.Image`, and `label`, as it is.

    Images that are stored as paths have to lie in `folder`.

    Raises:
        ValueError: when a column is not there, cannot be guessed, or holds no images.
    """
    image_column = pick_column(dataset, image_column, _IMAGE_NAMES, Image, "image")
    label_column = pick_column(dataset, label_column, _LABEL_NAMES, ClassLabel, "label")
    if image_column == label_column:
        raise ValueError(f"{image_column!r} cannot be both column of images and of labels. Set --label_column.")
    dataset = dataset.with_format(None).select_columns([image_column, label_column])
    dataset = dataset.rename_columns({image_column: "image", label_column: "label"})
    try:
        dataset = dataset.cast_column("image", Image())
        check_references(dataset, folder)
        dataset[0]["image"].load()
    except Exception as error:  # whatever pyarrow and Pillow raise
        raise ValueError(
            f"The column {image_column!r} holds no images that can be read: {error}. Set --image_column."
        ) from error
    return dataset


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


def with_classes(*parts: Dataset, names: list[str] | None = None) -> list[Dataset]:
    """Give the `label` columns of all parts one and the same ClassLabel.

    Its names are `names`; else those of the first part that has a ClassLabel; else they come from the labels: 0 to the
    largest integer, or the sorted strings. Labels that have names keep their names (and may change their numbers).

    Raises:
        ValueError: for a label that is missing, negative, no class at all, or none of the classes.
    """
    columns = [_labels(part) for part in parts]
    if names is None:
        given = [part.features["label"] for part in parts if isinstance(part.features["label"], ClassLabel)]
        names = given[0].names if given else _names(set().union(*map(set, columns)))
    number = {name: number for number, name in enumerate(names)}
    done = []
    for part, labels in zip(parts, columns, strict=True):
        feature = part.features["label"]
        if isinstance(feature, ClassLabel) and feature.names != names:
            labels = feature.int2str(labels)
        unknown = next((label for label in labels if not _is_class(label, number)), None)
        if unknown is not None:
            raise ValueError(f"The label {unknown!r} is none of the {len(names)} classes ({_few(names)}).")
        if not isinstance(feature, ClassLabel) or feature.names != names:
            numbers = np.asarray([number.get(label, label) for label in labels], dtype=np.int64)
            part = part.remove_columns("label").add_column("label", numbers, feature=ClassLabel(names=names))
        done.append(part)
    return done


def match_by_name(classes: list[str], model_classes: list[str], name: str) -> bool:
    """Whether the classes of the data are those of a model by their names, and not by their numbers.

    They are when the model has all the names. Numbers decide when it has none of them.

    Raises:
        ValueError: the model has some of the names only, or answers fewer classes.
    """
    unknown = [label for label in classes if label not in model_classes]
    if 0 < len(unknown) < len(classes):
        wrong, there = (one_line(", ".join(dict.fromkeys(names)), _LONGEST_LIST) for names in (unknown, model_classes))
        raise ValueError(
            f"The model knows some classes of {name} by name, but not {wrong}: it answers {there}. Name the classes "
            "as the model does, or use the data set the model was trained for."
        )
    if len(classes) > len(model_classes):
        raise ValueError(
            f"{name} has {len(classes)} classes and the model answers {len(model_classes)}: "
            "use the data set the model was trained for."
        )
    return not unknown


def _labels(part: Dataset) -> list[int] | list[str]:
    """The labels of a part: all there, and all of a kind that can be a class."""
    feature = part.features["label"]
    kind = feature.dtype if isinstance(feature, Value) else "int64" if isinstance(feature, ClassLabel) else ""
    if not kind.startswith(("int", "uint", "bool", "string", "large_string")):
        raise ValueError(f"The label column holds {feature}, not one class a row. Set --label_column.")
    labels = part["label"][:]
    if None in labels:
        raise ValueError("Some rows have no label (null). Remove them, or set --label_column.")
    if any(label < 0 for label in labels if not isinstance(label, str)):
        raise ValueError("Some labels are negative, as in a split without labels. Remove those rows.")
    return labels


def _names(labels: set) -> list[str]:
    if len({isinstance(label, str) for label in labels}) > 1:
        raise ValueError("The labels are numbers in one split and text in another. Set --label_column.")
    if any(isinstance(label, str) for label in labels):
        return sorted(labels)
    most = max(labels, default=-1)
    if most >= _MOST_CLASSES:
        raise ValueError(f"The label column holds numbers up to {most}, which are no classes. Set --label_column.")
    return [str(label) for label in range(most + 1)]


def _is_class(label: int | str, number: dict[str, int]) -> bool:
    return label in number if isinstance(label, str) else label < len(number)


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
