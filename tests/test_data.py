"""Labelled images: what is loaded from every layout, and what becomes of columns and classes."""

from pathlib import Path

import numpy as np
import pytest
from data_cases import CATS, own_cache, parquet, plain, png, rows, struct  # noqa: F401  (a fixture)
from datasets import ClassLabel, DatasetDict, Image, Value
from PIL import Image as Pillow

from hf_fip.tasks import data
from hf_fip.tasks.data import LabelledImages, load_images

REAL = Path(__file__).parents[2] / "shared" / "data"
LETTERS = ClassLabel(names=list("abc"))


def folders_of_images(root: str, count: int) -> None:
    for number, name in enumerate(("cat", "dog")):
        folder = Path(root, name)
        folder.mkdir(parents=True)
        for i in range(count):
            (folder / f"{i}.png").write_bytes(png(10 * number + i))


def first_of(images: LabelledImages) -> np.ndarray:
    return np.asarray(images.train[0]["image"])


# Where images come from: how to make it, the name, the sizes of both splits


def make_flat_parquet():
    parquet("x/train.parquet", rows())
    parquet("x/test.parquet", rows(4))
    Path("x/README.md").write_text("# some images\n")
    return "x", (8, 4)


def make_hub_parquet():
    parquet("x/data/train-00000-of-00001.parquet", rows())
    parquet("x/data/test-00000-of-00001.parquet", rows(4))
    return "./x", (8, 4)


def make_sharded_parquet():
    parquet("x/data/train-00000-of-00002.parquet", rows(5))
    parquet("x/data/train-00001-of-00002.parquet", rows(3))
    parquet("x/data/validation-00000-of-00001.parquet", rows(4))
    return "x", (8, 4)


def make_one_parquet():
    parquet("x.parquet", rows())
    return "x.parquet", (6, 2)


def make_imagefolder():
    folders_of_images("x/train", 4)
    folders_of_images("x/test", 2)
    return "x", (8, 4)


def make_imagefolder_without_splits():
    folders_of_images("x", 4)
    return "x", (6, 2)


def make_saved_dataset():
    rows().save_to_disk("x")
    return "x", (6, 2)


def make_saved_dict():
    DatasetDict(train=rows(), test=rows(4)).save_to_disk("x")
    return "x", (8, 4)


def make_saved_with_format():
    rows().with_format("numpy").save_to_disk("x")
    return "x", (6, 2)


def make_digits():
    return "digits", (1347, 450)


SOURCES = [value for name, value in globals().items() if name.startswith("make_")]


@pytest.mark.parametrize("make", SOURCES, ids=lambda make: make.__name__[5:])
def test_images_load_from(make):
    name, sizes = make()
    images = load_images(name)
    assert (len(images.train), len(images.test)) == sizes
    assert images.class_names == ([str(i) for i in range(10)] if name == "digits" else ["cat", "dog"])
    assert images.name == name
    for part in (images.train, images.test):
        assert part.column_names == ["image", "label"]
        assert part.features == {"image": Image(), "label": ClassLabel(names=images.class_names)}
        assert {row["image"].mode for row in part} == {"L" if name == "digits" else "RGB"}


@pytest.mark.parametrize("name, classes, side", [("fashion_mnist", 10, 28), ("cifar10", 10, 32)])
def test_real_images_load(name, classes, side):
    if not (REAL / name).is_dir():
        pytest.skip("the real data are not on this machine")
    images = load_images(str(REAL / name), max_train_samples=50, max_test_samples=30)
    assert (len(images.train), len(images.test), len(images.class_names)) == (50, 30, classes)
    assert images.train[0]["image"].size == (side, side)


def test_a_hub_id_is_loaded_with_its_configuration_revision_and_token(monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return DatasetDict(train=rows(), test=rows(4))

    monkeypatch.setattr(data, "load_dataset", load_dataset)
    images = load_images("some/images", "small", revision="v1", token="secret")
    assert calls == [(("some/images", "small"), {"token": "secret", "revision": "v1"})]
    assert len(images.train) == 8


# Columns: features or arrow columns, and what becomes of them

COLUMNS = {
    "img": (rows(image="img"), ["cat", "dog"]),
    "fine_label of two": (
        rows(6, LETTERS, [0, 1, 2] * 2, image="image", label="fine_label").add_column(
            "coarse_label", [0] * 6, feature=ClassLabel(names=["all"])
        ),
        ["a", "b", "c"],
    ),
    "integers": (rows(feature=Value("int64")), ["0", "1"]),
    "integers with gaps": (rows(feature=Value("int32"), labels=[0, 3] * 4), ["0", "1", "2", "3"]),
    "booleans": (rows(feature=Value("bool"), labels=[True, False] * 4), ["0", "1"]),
    "strings": (rows(feature=Value("string"), labels=["b", "a"] * 4), ["a", "b"]),
}


@pytest.mark.parametrize("case", COLUMNS)
def test_columns_are_found_and_labels_become_classes(case):
    dataset, names = COLUMNS[case]
    parquet("x/train.parquet", dataset)
    parquet("x/test.parquet", dataset)
    images = load_images("x")
    assert images.class_names == names
    label = "fine_label" if "fine_label" in dataset.column_names else "label"
    kind = dataset.features[label]
    stored = [
        kind.int2str(v) if isinstance(kind, ClassLabel) else str(int(v) if v in (0, 1) else v) for v in dataset[label]
    ]
    for part in (images.train, images.test):
        assert part.features["label"].int2str(part["label"][:]) == stored


@pytest.mark.parametrize("storage", ["bytes", "struct", "path"])
def test_images_may_be_stored_as(storage):
    Path("x").mkdir()
    Path("x/file.png").write_bytes(png(0))
    column = {"bytes": [png(0)] * 8, "struct": [struct(0)] * 8, "path": ["x/file.png"] * 8}[storage]
    plain("x/train.parquet", image=column, label=[0, 1] * 4)
    images = load_images("x")
    assert np.array_equal(first_of(images), np.asarray(Pillow.open("x/file.png")))


def test_named_columns_win_over_guesses():
    dataset = rows().rename_columns({"image": "label", "label": "image"})
    parquet("x/train.parquet", dataset)
    images = load_images("x", image_column="label", label_column="image")
    assert images.train[0]["image"].mode == "RGB" and images.class_names == ["cat", "dog"]


SPLITS = {  # features and labels of the test split, to a training split of classes cat, dog
    "the same": (CATS, [0, 1]),
    "another order": (ClassLabel(names=["dog", "cat"]), [1, 0]),
    "fewer classes": (ClassLabel(names=["dog"]), [0]),
    "numbers": (Value("int64"), [0, 1]),
    "names": (Value("string"), ["cat", "dog"]),
}


@pytest.mark.parametrize("case", SPLITS)
def test_classes_mean_the_same_in_both_splits(case):
    feature, labels = SPLITS[case]
    DatasetDict(train=rows(), test=rows(len(labels), feature, labels)).save_to_disk("x")
    images = load_images("x")
    expected = ["dog"] if case == "fewer classes" else ["cat", "dog"]
    assert images.test.features["label"] == images.train.features["label"] == CATS
    assert CATS.int2str(images.test["label"][:]) == expected
