"""Images with annotated objects from the Hub, parquet, PASCAL VOC or COCO folders; or generated scenes.

An image that cannot be read is left out and counted; so is a box without an area inside its image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from torch import nn

from .annotation_files import BOX, CATEGORY, read_annotated_folder
from .columns import match_by_name, pick_column
from .data import divide, load_splits, pick_splits
from .scenes import SHAPES, scenes

SCENES = "scenes"
IMAGE, OBJECTS = "image", "objects"
BOX_FORMATS = ("xywh", "xyxy")
_SCENES = {"train": 1000, "test": 300}
_OBJECTS_NAMES = ("objects", "annotations", "annotation", "boxes")
_BOX_NAMES = ("bbox", "bboxes", "box", "boxes")
_CATEGORY_NAMES = ("category", "categories", "category_id", "label", "labels", "class", "classes")


@dataclass(frozen=True)
class AnnotatedImages:
    """Training and test images with their objects.

    Attributes:
        train, test: `datasets.Dataset`s with the columns `image` (a `datasets.Image`) and `objects`: `bbox`, a list of
            [x, y, width, height] in pixels, and `category`, a list of one `ClassLabel`.
        name: what the user called it.
        left_out: images that could not be read, and why, one line each.
        dropped: number of boxes without an area inside their image.
    """

    train: Dataset
    test: Dataset
    name: str
    left_out: Sequence[str] = field(default=())
    dropped: int = 0

    @property
    def class_names(self) -> list[str]:
        return class_names(self.train)


def class_names(dataset: Dataset) -> list[str]:
    """The classes of the objects in a part of `AnnotatedImages`."""
    return dataset.features[OBJECTS][CATEGORY].feature.names


def load_annotated_images(
    name_or_path: str = SCENES,
    config_name: str | None = None,
    *,
    image_column: str | None = None,
    objects_column: str | None = None,
    box_format: str = "xywh",
    train_split: str | None = None,
    test_split: str | None = None,
    max_train_samples: int | None = None,
    max_test_samples: int | None = None,
    seed: int = 0,
    revision: str | None = None,
) -> AnnotatedImages:
    """Load a data set of images with annotated objects.

    Args:
        name_or_path: a Hub id; a parquet file or a folder of them, with a column of objects as the Hub has them
            (`bbox` and `category`, or usual names like these); a folder in the layout of PASCAL VOC or COCO; or
            `scenes`, which are generated.
        config_name: the configuration of a Hub data set that has several.
        image_column, objects_column: guessed from types and usual names when left out.
        box_format: of a Hub or parquet data set: `xywh` (left, top, width, height) or `xyxy` (left, top, right,
            bottom), in pixels.
        train_split, test_split, max_train_samples, max_test_samples, seed: as in `load_images`.

    Raises:
        ValueError: when the data, a split or a column cannot be found, no image can be read, there is no class, or
            two lists of a folder share images.
    """
    if box_format not in BOX_FORMATS:
        raise ValueError(f"--box_format={box_format} is not one of {', '.join(BOX_FORMATS)}.")
    splits = annotated = None
    if name_or_path == SCENES and not Path(name_or_path).exists():
        splits = _scenes()
    elif Path(name_or_path).is_dir():
        splits = annotated = read_annotated_folder(Path(name_or_path))
    if splits:
        box_format = "xywh"
    else:
        splits = load_splits(name_or_path, config_name, revision=revision)
    picked = pick_splits(splits, name_or_path, train_split, test_split)
    if annotated:
        _check_apart(annotated, picked)
    parts = [_image_and_objects(splits[name], image_column, objects_column) for name in picked]
    parts = divide(parts, max_train_samples, max_test_samples, seed)
    names = _names([part.features[OBJECTS][CATEGORY].feature for part in parts], parts)
    left_out: list[str] = []
    done = [_checked(part, names, box_format, left_out) for part in parts]
    dropped = sum(count for _, count in done)
    return AnnotatedImages(done[0][0], done[1][0], name_or_path, tuple(left_out), dropped)


def match_classes(data: AnnotatedImages, model: nn.Module) -> AnnotatedImages:
    """The data with their classes numbered as the model numbers them.

    When the model has a name for each class of the data, names decide; when it has none of the names, the numbers are
    taken as they are.

    Raises:
        ValueError: when the data have classes that the model cannot answer, or has names for some of them only.
    """
    names = [str(model.config.id2label.get(number, number)) for number in range(model.config.num_labels)]
    by_name = match_by_name(data.class_names, names, data.name)
    numbers = [names.index(name) if by_name else number for number, name in enumerate(data.class_names)]
    unique = [name if names.index(name) == number else f"{name} ({number})" for number, name in enumerate(names)]

    def renumbered(part: Dataset) -> Dataset:
        objects = [
            {BOX: row[BOX], CATEGORY: [numbers[number] for number in row[CATEGORY]]} for row in part[OBJECTS][:]
        ]
        return with_objects(part, objects, unique)

    return replace(data, train=renumbered(data.train), test=renumbered(data.test))


def with_objects(dataset: Dataset, objects: list[dict], names: list[str]) -> Dataset:
    """The data set with these objects, `bbox` and `category` (numbers of `names`) each, in place of its own."""
    feature = {BOX: List(List(Value("float32"), length=4)), CATEGORY: List(ClassLabel(names=names))}
    others = dataset.remove_columns(OBJECTS) if OBJECTS in dataset.column_names else dataset
    return others.add_column(OBJECTS, objects, feature=feature)


def _scenes() -> DatasetDict:
    parts = {}
    for seed, (split, count) in enumerate(_SCENES.items()):
        images, boxes, classes = scenes(count, seed)
        dataset = Dataset.from_dict({IMAGE: images}, features=Features({IMAGE: Image()}))
        objects = [{BOX: found, CATEGORY: kinds} for found, kinds in zip(boxes, classes, strict=True)]
        parts[split] = with_objects(dataset, objects, list(SHAPES))
    return DatasetDict(parts)


def _check_apart(splits: DatasetDict, names: list[str]) -> None:
    """Raise ValueError where splits of an annotated folder share images."""
    files = [splits[name].cast_column(IMAGE, Image(decode=False))[IMAGE][:] for name in names]
    shared = sorted(set.intersection(*({file["path"] for file in part} for part in files))) if names[1:] else []
    if shared:
        raise ValueError(
            f"The splits {' and '.join(map(repr, names))} share {len(shared)} images, such as {Path(shared[0]).name}. "
            "Set --train_split and --test_split to two that share none."
        )


def _image_and_objects(part: Dataset, image_column: str | None, objects_column: str | None) -> Dataset:
    """Two columns: `image`, a `datasets.Image`, and `objects`, with `bbox` and `category` as they are."""
    image = pick_column(part, image_column, ("image", "img"), Image, "image")
    objects = pick_column(part, objects_column, _OBJECTS_NAMES, dict, "objects") if objects_column else _objects(part)
    part = part.with_format(None).select_columns([image, objects]).rename_columns({image: IMAGE, objects: OBJECTS})
    part = part.cast_column(IMAGE, Image())
    kind = part.features[OBJECTS]
    fields = kind.feature if isinstance(kind, List) else kind
    if not isinstance(fields, dict):
        raise ValueError(f"The column {objects!r} holds {kind}, not boxes with categories. Set --objects_column.")
    box, category = (_field(fields, usual, objects) for usual in (_BOX_NAMES, _CATEGORY_NAMES))
    rows = part[OBJECTS][:]
    if isinstance(kind, List):  # a list of objects: made the lists of their boxes and categories
        rows = [[x or {} for x in row or ()] for row in rows]
        found = [{BOX: [x.get(box) for x in row], CATEGORY: [x.get(category) for x in row]} for row in rows]
        label = fields[category]
    else:
        found = [{BOX: (row or {}).get(box) or [], CATEGORY: (row or {}).get(category) or []} for row in rows]
        label = fields[category].feature
    feature = {BOX: List(List(Value("float32"))), CATEGORY: List(label)}
    return part.remove_columns(OBJECTS).add_column(OBJECTS, found, feature=feature)


def _objects(part: Dataset) -> str:
    for name in _OBJECTS_NAMES:
        if name in part.column_names:
            return name
    raise ValueError(
        f"Cannot tell which column holds the objects: the columns are {', '.join(part.column_names)}. "
        "Set --objects_column."
    )


def _field(fields: dict, usual: tuple[str, ...], column: str) -> str:
    for name in usual:
        if name in fields:
            return name
    raise ValueError(f"The objects in {column!r} have the fields {', '.join(fields)}, and no {usual[0]!r}.")


def _names(kinds: list, parts: Sequence[Dataset]) -> list[str]:
    """The classes: those of a ClassLabel; else the sorted names that occur, or 0 to the largest number."""
    for kind in kinds:
        if isinstance(kind, ClassLabel):
            return kind.names
    found = {label for part in parts for row in part[OBJECTS][:] for label in row[CATEGORY] if label is not None}
    if not found:
        raise ValueError("No image has an object with a category.")
    if all(isinstance(label, str) for label in found):
        return sorted(found)
    for label in found:
        if not _is_whole(label):
            raise ValueError(f"The category {label!r} is no whole number, as a class without a name is.")
    return [str(number) for number in range(int(max(found)) + 1)]


def _checked(part: Dataset, names: list[str], box_format: str, left_out: list[str]) -> tuple[Dataset, int]:
    """The rows whose images can be read, boxes clipped to them, and the number of boxes that nothing is left of."""
    stored = part.cast_column(IMAGE, Image(decode=False))
    kind, decoder = part.features[OBJECTS][CATEGORY].feature, Image(mode=part.features[IMAGE].mode)
    numbers = {name: number for number, name in enumerate(names)}
    kept, objects, dropped = [], [], 0
    for row in range(len(part)):
        try:
            width, height = decoder.decode_example(stored[row][IMAGE]).size
        except Exception as error:  # Pillow raises many kinds for what is damaged or no image at all
            left_out.append(f"row {row}: {(str(error).splitlines() or [type(error).__name__])[0]}")
            continue
        found = stored[row][OBJECTS]
        labels = found[CATEGORY]
        if isinstance(kind, ClassLabel) and kind.names != names:
            labels = [kind.names[label] for label in labels]
        labels = [numbers.get(label, label) if isinstance(label, str) else label for label in labels]
        if len(labels) != len(found[BOX]) or any(not _is_number(label, len(names)) for label in labels):
            raise ValueError(
                f"Row {row}: {len(found[BOX])} boxes with the categories {labels}, of {len(names)} classes."
            )
        boxes = _clipped(found[BOX], box_format, width, height, row)
        good = (boxes[:, 2:] > 0).all(axis=1)
        dropped += int((~good).sum())
        kept.append(row)
        objects.append({BOX: boxes[good].tolist(), CATEGORY: np.asarray(labels, dtype=np.int64)[good].tolist()})
    if not kept:
        raise ValueError(f"No image can be read. {left_out[-1] if left_out else ''}")
    return with_objects(part.select(kept), objects, names), dropped


def _is_number(label, count: int) -> bool:
    return _is_whole(label) and 0 <= label < count


def _is_whole(label) -> bool:
    return isinstance(label, (int, float)) and float(label).is_integer()


def _clipped(boxes: list, box_format: str, width: int, height: int, row: int) -> np.ndarray:
    """(N, 4) boxes [x, y, width, height] inside an image; one that is missing or not finite becomes 0."""
    boxes = [[np.nan] * 4 if box is None else box for box in boxes]
    if any(len(box) != 4 for box in boxes):
        raise ValueError(f"Row {row}: a box has other than four numbers.")
    array = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    array = np.where(np.isfinite(array).all(axis=1, keepdims=True), array, 0)
    low, high = array[:, :2], array[:, 2:] if box_format == "xyxy" else array[:, :2] + array[:, 2:]
    low, high = (np.clip(corner, 0, [width, height]) for corner in (low, high))
    return np.concatenate([low, high - low], axis=1)
