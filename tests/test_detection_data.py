"""Annotated images from every format, and what is left out or refused."""

import json
import re
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
from datasets import ClassLabel, Dataset, Features, Image, List, Value

from hf_fip.tasks.detection_data import load_annotated_images, match_classes
from hf_fip.tasks.scenes import SHAPES, SIDE, scenes


def picture(place, width=20, height=10) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(place)


def png(width=20, height=10) -> dict:
    buffer = BytesIO()
    PIL.Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def voc(root) -> None:
    """Four images: one with a car, and a person that is difficult; two empty; one whose file is damaged."""
    objects = """
        <object><name>car</name><difficult>0</difficult>
          <bndbox><xmin>1</xmin><ymin>2</ymin><xmax>10</xmax><ymax>6</ymax></bndbox></object>
        <object><name>person</name><difficult>1</difficult>
          <bndbox><xmin>1</xmin><ymin>1</ymin><xmax>5</xmax><ymax>5</ymax></bndbox></object>"""
    for name, content in {"a": objects, "b": "", "c": "", "d": ""}.items():
        picture(root / "JPEGImages" / f"{name}.jpg")
        (root / "Annotations").mkdir(exist_ok=True)
        text = f"<annotation><filename>{name}.jpg</filename>{content}</annotation>"
        (root / "Annotations" / f"{name}.xml").write_text(text)
    (root / "JPEGImages" / "c.jpg").write_bytes(b"no picture")
    (root / "ImageSets" / "Main").mkdir(parents=True)
    for split, names in {"train": "a\nb\nc\n", "test": "d\n", "car_train": "a 1\n"}.items():
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text(names)


def coco(root) -> None:
    categories = [{"id": 3, "name": "dog"}, {"id": 7, "name": "cat"}]
    for split in ("train2017", "val2017"):
        picture(root / split / "1.jpg")
        picture(root / split / "2.jpg")
        boxes = [
            {"id": 1, "image_id": 1, "category_id": 7, "bbox": [2, 1, 5, 4], "iscrowd": 0},
            {"id": 2, "image_id": 1, "category_id": 3, "bbox": [0, 0, 9, 9], "iscrowd": 1},
        ]
        images = [{"id": number, "file_name": f"{number}.jpg"} for number in (1, 2)]
        (root / "annotations").mkdir(exist_ok=True)
        content = {"images": images, "annotations": boxes, "categories": categories}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def parquet(place, objects: list, feature, count: int = 4, image=png) -> str:
    features = Features({"image": Image(), "objects": feature})
    Dataset.from_dict({"image": [image()] * count, "objects": objects}, features=features).to_parquet(str(place))
    return str(place)


LISTS = {"bbox": List(List(Value("float32"))), "category": List(ClassLabel(names=["x", "y"]))}


@pytest.mark.parametrize("below", ["", "VOCdevkit/VOC2007"])
def test_pascal_voc_is_read_without_difficult_objects_and_damaged_images(below, tmp_path):
    root = tmp_path / below
    root.mkdir(parents=True, exist_ok=True)
    voc(root)
    data = load_annotated_images(str(tmp_path))
    assert data.class_names == ["car"]
    assert [row["bbox"] for row in data.train["objects"]] == [[[0, 1, 10, 5]], []]
    assert len(data.left_out) == 1 and "row 2" in data.left_out[0] and len(data.test) == 1


def test_coco_is_read_without_crowds(tmp_path):
    coco(tmp_path)
    data = load_annotated_images(str(tmp_path))
    assert data.class_names == ["cat"] and len(data.train) == len(data.test) == 2
    assert data.train["objects"][:] == [{"bbox": [[2, 1, 5, 4]], "category": [0]}, {"bbox": [], "category": []}]
    assert data.train[0]["image"].size == (20, 10)


def test_annotations_that_cannot_be_read_are_refused_by_name(tmp_path):
    coco(tmp_path)
    (tmp_path / "annotations" / "instances_train2017.json").write_text('{"images": []}')
    with pytest.raises(ValueError, match=f"annotations in {re.escape(str(tmp_path))} cannot be read: KeyError"):
        load_annotated_images(str(tmp_path))


def test_two_coco_files_of_one_split_are_refused(tmp_path):
    coco(tmp_path)
    (tmp_path / "annotations" / "instances_train2014.json").write_text("{}")
    with pytest.raises(ValueError, match="train2014.json and instances_train2017.json are both of the split 'train'"):
        load_annotated_images(str(tmp_path))


def lists_of_voc(root) -> str:
    """The lists that VOC2012 has."""
    voc(root)
    (root / "ImageSets" / "Main" / "test.txt").unlink()
    for split, names in {"train": "a\nb\n", "val": "c\nd\n", "trainval": "a\nb\nc\nd\n"}.items():
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text(names)
    picture(root / "JPEGImages" / "c.jpg")
    return str(root)


@pytest.mark.parametrize("train_split, sizes", [(None, (2, 2)), ("trainval", (3, 1))])
def test_no_image_of_a_voc_folder_is_both_trained_and_tested_on(train_split, sizes, tmp_path):
    data = load_annotated_images(lists_of_voc(tmp_path), train_split=train_split)
    train, test = (
        {file["path"] for file in part.cast_column("image", Image(decode=False))["image"]}
        for part in (data.train, data.test)
    )
    assert (len(train), len(test)) == sizes and not train & test


def test_two_lists_that_share_images_are_refused(tmp_path):
    folder = lists_of_voc(tmp_path)
    with pytest.raises(ValueError, match="'trainval' and 'val' share 2 images, such as c.jpg. Set --train_split"):
        load_annotated_images(folder, train_split="trainval", test_split="val")


def test_two_voc_data_sets_in_one_folder_are_refused(tmp_path):
    for year in ("VOC2007", "VOC2012"):
        (tmp_path / year).mkdir()
        voc(tmp_path / year)
    with pytest.raises(ValueError, match="several data sets: choose one, such as .*VOC2007"):
        load_annotated_images(str(tmp_path))


OBJECTS = List({"bbox": List(Value("float32")), "category": ClassLabel(names=["x", "y"])})
FLOATS = {"bbox": List(List(Value("float32"))), "category": List(Value("float32"))}

FORMATS = {
    "lists": ([{"bbox": [[1, 2, 3, 4]], "category": [1]}] * 4, LISTS, "xywh"),
    "corners": ([{"bbox": [[1, 2, 4, 6]], "category": [1]}] * 4, LISTS, "xyxy"),
    "a list of objects": (
        [[{"bbox": [1, 2, 3, 4], "category_id": 1}]] * 4,
        List({"bbox": List(Value("float32")), "category_id": ClassLabel(names=["x", "y"])}),
        "xywh",
    ),
    "names": (
        [{"bbox": [[1, 2, 3, 4]], "label": ["y"]}] * 3 + [{"bbox": [[1, 2, 3, 4]], "label": ["x"]}],
        {"bbox": List(List(Value("float32"))), "label": List(Value("string"))},
        "xywh",
    ),
    "numbers": (
        [{"bbox": [[1, 2, 3, 4]], "category": [1]}] * 4,
        {"bbox": List(List(Value("float32"))), "category": List(Value("int64"))},
        "xywh",
    ),
    "numbers as floats": ([{"bbox": [[1, 2, 3, 4]], "category": [1]}] * 4, FLOATS, "xywh"),
}


@pytest.mark.parametrize("case", FORMATS)
def test_the_formats_of_the_hub_give_the_same(case, tmp_path):
    objects, feature, box_format = FORMATS[case]
    data = load_annotated_images(parquet(tmp_path / "data.parquet", objects, feature), box_format=box_format)
    found = [*data.train["objects"], *data.test["objects"]]
    assert len(data.class_names) == 2 and all(row["bbox"] == [[1, 2, 3, 4]] for row in found)
    assert sum(row["category"] == [1] for row in found) == (3 if case == "names" else 4)


def test_boxes_are_clipped_and_those_without_an_area_inside_are_dropped(tmp_path):
    boxes = [
        [15, 5, 10, 10],
        [-5, 0, 10, 5],
        [30, 0, 5, 5],
        [1, 1, 0, 5],
        [float("nan"), 0, 1, 1],
        None,
        [1, None, 3, 4],
    ]
    objects = [{"bbox": boxes, "category": [0] * len(boxes)}] * 4
    data = load_annotated_images(parquet(tmp_path / "data.parquet", objects, LISTS))
    assert data.train[0]["objects"]["bbox"] == [[15, 5, 5, 5], [0, 0, 5, 5]]
    assert data.dropped == 4 * 5


REFUSED = {
    "no objects": (lambda place: parquet(place, [1] * 4, Value("int64")), {}, "not boxes with categories"),
    "three numbers": (
        lambda place: parquet(place, [{"bbox": [[1, 2, 3]], "category": [0]}] * 4, LISTS),
        {},
        "other than four numbers",
    ),
    "a category too few": (
        lambda place: parquet(place, [{"bbox": [[1, 2, 3, 4]], "category": []}] * 4, LISTS),
        {},
        "1 boxes with the categories",
    ),
    "a category between two": (
        lambda place: parquet(place, [{"bbox": [[1, 2, 3, 4]], "category": [0.5]}] * 4, FLOATS),
        {},
        "category 0.5 is no whole number",
    ),
    "an object that is missing": (
        lambda place: parquet(place, [[None, {"bbox": [1, 2, 3, 4], "category": 0}]] * 4, OBJECTS),
        {},
        r"2 boxes with the categories \[None, 0\]",
    ),
    "another format": (lambda place: str(place), {"box_format": "cxcywh"}, "not one of xywh, xyxy"),
    "nothing there": (lambda place: str(place), {}, "does not exist"),
    "no picture at all": (
        lambda place: parquet(
            place, [{"bbox": [], "category": []}] * 4, LISTS, image=lambda: {"bytes": b"x", "path": None}
        ),
        {},
        "No image can be read",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_with_the_reason(case, tmp_path):
    make, options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        load_annotated_images(make(tmp_path / "data.parquet"), **options)


def test_classes_get_the_models_numbers_by_name(tmp_path):
    coco(tmp_path)
    data = load_annotated_images(str(tmp_path))
    model = SimpleNamespace(config=SimpleNamespace(num_labels=4, id2label={0: "N/A", 1: "N/A", 2: "cat", 3: "dog"}))
    matched = match_classes(data, model)
    assert matched.train["objects"][0]["category"] == [2]
    assert matched.class_names == ["N/A", "N/A (1)", "cat", "dog"]
    model.config.num_labels, model.config.id2label = 0, {}
    with pytest.raises(ValueError, match="1 classes and the model answers 0"):
        match_classes(data, model)


def people_and_planes(place):
    feature = {"bbox": List(List(Value("float32"))), "category": List(Value("string"))}
    objects = [{"bbox": [[1, 2, 3, 4]] * 2, "category": ["person", "aeroplane"]}] * 4
    return load_annotated_images(parquet(place / "data.parquet", objects, feature))


def test_classes_keep_their_numbers_where_the_model_has_none_of_their_names(tmp_path):
    model = SimpleNamespace(config=SimpleNamespace(num_labels=3, id2label={0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}))
    assert match_classes(people_and_planes(tmp_path), model).train[0]["objects"]["category"] == [1, 0]


def test_classes_of_which_the_model_has_some_by_name_are_refused(tmp_path):
    model = SimpleNamespace(config=SimpleNamespace(num_labels=3, id2label={0: "N/A", 1: "person", 2: "airplane"}))
    with pytest.raises(ValueError, match="by name, but not aeroplane: it answers N/A, person, airplane. Name the"):
        match_classes(people_and_planes(tmp_path), model)


def test_scenes_are_seeded_and_their_boxes_are_around_their_shapes():
    images, boxes, classes = scenes(40, seed=3)
    again, _, _ = scenes(40, seed=3)
    assert all(np.array_equal(one, other) for one, other in zip(images, again, strict=True))
    assert {kind for found in classes for kind in found} == set(range(len(SHAPES)))
    for found in boxes:
        assert found and all(min(x, y) >= 0 and max(x + w, y + h) <= SIDE for x, y, w, h in found)
    assert load_annotated_images(max_train_samples=3, max_test_samples=2).class_names == list(SHAPES)
