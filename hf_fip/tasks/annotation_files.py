"""Annotated images as PASCAL VOC and COCO keep them on disk: XML or JSON files beside folders of images."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from datasets import Dataset, DatasetDict, Image, List, Value

BOX, CATEGORY = "bbox", "category"
_VOC_IMAGES, _VOC_BOXES, _VOC_SPLITS = "JPEGImages", "Annotations", "ImageSets/Main"
_COCO = "annotations/instances_*.json"


def read_annotated_folder(folder: Path) -> DatasetDict | None:
    """The splits of a folder in the layout of PASCAL VOC or COCO; None when it has neither.

    VOC: `JPEGImages`, `Annotations` and, for the splits, `ImageSets/Main/<split>.txt`, or one such folder below
    (`VOCdevkit/VOC2007`). COCO: `annotations/instances_<split>.json` and the images in `<split>`, `images/<split>` or
    `images`; numbers are dropped from the names of splits (`train2017`). Objects marked as difficult (VOC) or as a
    crowd (COCO) are left out, as their benchmarks do not count them.

    Returns:
        Columns `image` (the file) and `objects`: `bbox`, [x, y, width, height] in pixels, and `category`, its name.

    Raises:
        ValueError: an annotation cannot be read, or there are several such folders or several files of one split.
    """
    roots = (folder, *sorted(folder.glob("VOC*")), *sorted(folder.glob("VOC*/VOC*")))
    roots = [place for place in roots if (place / _VOC_IMAGES).is_dir() and (place / _VOC_BOXES).is_dir()]
    if len(roots) > 1:
        raise ValueError(f"{folder} holds several data sets: choose one, such as {roots[0]}.")
    try:
        if roots:
            return _voc(roots[0])
        files: dict[str, Path] = {}
        for file in sorted(folder.glob(_COCO)):
            split = file.stem.removeprefix("instances_").rstrip("0123456789")
            if split in files:
                raise ValueError(
                    f"{files[split]} and {file.name} are both of the split {split!r}: move one elsewhere."
                )
            files[split] = file
        return DatasetDict({split: _coco(folder, file) for split, file in files.items()}) or None
    except (OSError, KeyError, TypeError, AttributeError, ElementTree.ParseError, json.JSONDecodeError) as error:
        raise ValueError(f"The annotations in {folder} cannot be read: {type(error).__name__}: {error}") from error


def _voc(root: Path) -> DatasetDict:
    lists = sorted((root / _VOC_SPLITS).glob("*.txt"))
    names = {file.stem: file.read_text().split() for file in lists if "_" not in file.stem}  # others: of one class
    if not names:
        names = {"train": [file.stem for file in sorted((root / _VOC_BOXES).glob("*.xml"))]}
    return DatasetDict({split: _dataset([_voc_row(root, name) for name in part]) for split, part in names.items()})


def _voc_row(root: Path, name: str) -> tuple[Path, list, list]:
    boxes, names = [], []
    tree = ElementTree.parse(root / _VOC_BOXES / f"{name}.xml")
    for thing in tree.iter("object"):
        if thing.findtext("difficult", "0").strip() == "1":
            continue
        left, top, right, bottom = (float(thing.find("bndbox").findtext(side)) for side in _VOC_SIDES)
        boxes.append([left - 1, top - 1, right - left + 1, bottom - top + 1])  # its pixels are counted from 1
        names.append(thing.findtext("name").strip())
    given = root / _VOC_IMAGES / tree.findtext("filename", f"{name}.jpg")
    return given if given.is_file() else root / _VOC_IMAGES / f"{name}.jpg", boxes, names


_VOC_SIDES = ("xmin", "ymin", "xmax", "ymax")


def _coco(folder: Path, file: Path) -> Dataset:
    split = file.stem.removeprefix("instances_")
    content = json.loads(file.read_text(encoding="utf-8"))
    names = {category["id"]: category["name"] for category in content["categories"]}
    places = (folder / split, folder / "images" / split, folder / "images")
    place = next((place for place in places if place.is_dir()), places[0])
    rows = {image["id"]: (place / image["file_name"], [], []) for image in content["images"]}
    for thing in content["annotations"]:
        if not thing.get("iscrowd", 0):
            _, boxes, found = rows[thing["image_id"]]
            boxes.append([float(number) for number in thing["bbox"]])
            found.append(names[thing["category_id"]])
    return _dataset(list(rows.values()))


def _dataset(rows: list[tuple[Path, list, list]]) -> Dataset:
    objects = [{BOX: boxes, CATEGORY: names} for _, boxes, names in rows]
    feature = {BOX: List(List(Value("float32"), length=4)), CATEGORY: List(Value("string"))}
    dataset = Dataset.from_dict({"image": [str(file) for file, _, _ in rows]}).cast_column("image", Image())
    return dataset.add_column("objects", objects, feature=feature)
