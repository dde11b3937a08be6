"""Labelled images: what is loaded from every layout, what is refused and how, and the defender's clean split."""

import datetime
import io
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Pillow

from hf_fip.tasks import data
from hf_fip.tasks.data import LabelledImages, load_images, split_clean

REAL = Path(__file__).parents[2] / "shared" / "data"
CATS = ClassLabel(names=["cat", "dog"])
LETTERS = ClassLabel(names=list("abc"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """An own cache, an own working folder, and no network."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)


def png(number: int = 0, mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    file = io.BytesIO()
    Pillow.fromarray(pixels).convert(mode).save(file, "PNG")
    return file.getvalue()


def struct(number: int = 0, mode: str = "RGB") -> dict:
    return {"bytes": png(number, mode), "path": None}


def rows(count: int = 8, feature=CATS, labels=None, images=None, image="image", label="label") -> Dataset:
    columns = {
        image: images or [struct(i) for i in range(count)],
        label: labels or [i % 2 for i in range(count)],
        "note": ["x"] * (len(images) if images else count),
    }
    return Dataset.from_dict(columns, features=Features({image: Image(), label: feature, "note": Value("string")}))


def parquet(path: str, dataset: Dataset) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    dataset.to_parquet(path)


def plain(path: str, **columns) -> None:
    """A parquet file that knows nothing of Hugging Face's features."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


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


# What is refused

NOW = datetime.datetime(2020, 1, 1)
BAD_COLUMNS = {
    "negative labels": (rows(feature=Value("int64"), labels=[0, -7] * 4), {}, "negative"),
    "no label, as -1": (rows(labels=[0, -1] * 4), {}, "negative"),
    "null labels": (rows(labels=[0, None] * 4), {}, "no label"),
    "null names": (rows(feature=Value("string"), labels=["a", None] * 4), {}, "no label"),
    "float labels": (rows(feature=Value("float32"), labels=[0.0, 1.0] * 4), {}, "float32.*--label_column"),
    "dates": (rows(feature=Value("timestamp[ms]"), labels=[NOW] * 8), {}, "timestamp.*--label_column"),
    "lists": (rows(feature=datasets.List(Value("int64")), labels=[[0], [1]] * 4), {}, "not one class a row"),
    "numbers of rows": (rows(feature=Value("int64"), labels=[1, 10**9] * 4), {}, "1000000000.*--label_column"),
    "another image column": (
        rows(),
        {"image_column": "pixels"},
        r"No column 'pixels' .* image \(Image\), label \(ClassLabel\), note \(Value\). Set --image_column",
    ),
    "another label column": (rows(), {"label_column": "y"}, "No column 'y' .*Set --label_column"),
    "text for images": (rows(), {"image_column": "note"}, "'note' holds no images .*--image_column"),
    "one column for both": (rows(), {"label_column": "image"}, "both column of images and of labels"),
    "no image column": (
        rows().remove_columns("image"),
        {},
        r"label \(ClassLabel\), note \(Value\). Set --image_column",
    ),
    "no label column": (rows().remove_columns("label"), {}, r"image \(Image\), note \(Value\). Set --label_column"),
    "a corrupt image": (rows(images=[{"bytes": b"no image", "path": None}] * 8), {}, "holds no images"),
    "a null image": (rows(images=[None] * 8, labels=[0, 1] * 4), {}, "holds no images"),
    "no training split": (rows(), {"train_split": "big"}, "no split 'big': it has train. Set --train_split"),
    "no test split": (rows(), {"test_split": "big"}, "no split 'big': it has train. Set --test_split"),
    "the same split twice": (rows(), {"test_split": "train"}, "both for training and for testing. Set --test_split"),
    "too few rows": (rows(1), {}, "too few"),
    "no rows wanted": (rows(), {"max_train_samples": 0}, "--max_train_samples=0"),
    "no configuration": (rows(), {"config_name": "small"}, "small"),
}


@pytest.mark.parametrize("case", BAD_COLUMNS)
def test_these_data_are_refused(case):
    dataset, arguments, message = BAD_COLUMNS[case]
    parquet("x/train.parquet", dataset)
    with pytest.raises(ValueError, match=message):
        load_images("x", **arguments)


def bad_numbers():
    plain("x/train.parquet", image=[1, 2, 3], label=[0, 1, 0])
    return "x", "'image' holds no images"


def bad_paths():
    plain("x/train.parquet", image=["nowhere.png"] * 3, label=[0, 1, 0])
    return "x", "'image' holds no images .*nowhere.png"


def bad_parquet():
    Path("x.parquet").write_bytes(b"PAR1 and then nothing")
    return "x.parquet", "'x.parquet' cannot be read"


def bad_cut_off():
    parquet("x.parquet", rows())
    Path("x.parquet").write_bytes(Path("x.parquet").read_bytes()[:-100])
    return "x.parquet", "'x.parquet' cannot be read"


def bad_empty_folder():
    Path("x").mkdir()
    return "x", "'x' cannot be read"


def bad_saved_folder():
    Path("x").mkdir()
    Path("x/state.json").write_text("{}")
    return "x", "'x' cannot be read"


def bad_script():
    Path("x").mkdir()
    Path("x/x.py").write_text("raise SystemExit('this must not run')")
    return "x", "'x' cannot be read"


def bad_empty_split():
    DatasetDict(train=rows(), test=rows(4).filter(lambda row: row["label"] > 1)).save_to_disk("x")
    return "x", "empty|cannot be read|too few"


def bad_mixed_labels():
    named = rows(feature=Value("string"), labels=["a", "b"] * 4)
    DatasetDict(train=rows(feature=Value("int64")), test=named).save_to_disk("x")
    return "x", "numbers in one split and text in another"


def bad_new_class():
    DatasetDict(train=rows(), test=rows(2, Value("string"), ["cat", "cow"])).save_to_disk("x")
    return "x", r"'cow' is none of the 2 classes \(cat, dog\)"


def bad_path():
    return "./nowhere", "'./nowhere' does not exist"


def bad_file():
    return "nowhere.parquet", "'nowhere.parquet' does not exist"


def bad_name():
    return "", "does not exist"


def bad_hub_id():
    return "nobody/nothing", "No data set 'nobody/nothing' on disk or on the Hub"


BAD_SOURCES = [value for name, value in globals().items() if name.startswith("bad_")]


@pytest.mark.parametrize("make", BAD_SOURCES, ids=lambda make: make.__name__[4:])
def test_these_sources_are_refused_with_one_clear_error(make):
    name, message = make()
    with pytest.raises(ValueError, match=message):
        load_images(name)


@pytest.mark.parametrize(
    "error",
    [datasets.exceptions.DatasetNotFoundError("gated"), ConnectionError("no route"), RuntimeError("x\ny")],
    ids=lambda error: type(error).__name__,
)
def test_trouble_with_the_hub_is_a_value_error(error, monkeypatch):
    def load_dataset(*args, **kwargs):
        raise error

    monkeypatch.setattr(data, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=f"No data set 'some/images'.*{str(error).splitlines()[0]}$"):
        load_images("some/images")


# Parts


def test_rows_and_splits_depend_on_the_seed_alone():
    def chosen(**arguments):
        images = load_images("digits", max_train_samples=40, max_test_samples=20, **arguments)
        return [[np.asarray(row["image"]).tolist() for row in part] for part in (images.train, images.test)]

    assert chosen(seed=3) == chosen(seed=3)
    assert chosen(seed=3) != chosen(seed=4)


def test_without_a_test_split_a_quarter_is_set_aside_and_no_row_is_in_both():
    parquet("x.parquet", rows(16))
    images = load_images("x.parquet")
    pixels = [np.asarray(row["image"]).tobytes() for part in (images.train, images.test) for row in part]
    assert len(images.test) == 4 and len(set(pixels)) == 16


NUMBERS = Dataset.from_dict({"row": list(range(50))})


@pytest.mark.parametrize("samples", [1, 7, 49])
def test_a_clean_split_and_the_rest_are_all_rows_once(samples):
    clean, rest = split_clean(NUMBERS, samples, seed=1)
    assert len(clean) == samples
    assert sorted([*clean["row"], *rest["row"]]) == list(range(50))


def test_a_clean_split_is_decided_by_its_seed_and_lies_in_every_larger_one():
    splits = [set(split_clean(NUMBERS, samples, seed=1)[0]["row"]) for samples in (1, 5, 20, 49)]
    assert all(small < large for small, large in zip(splits, splits[1:], strict=False))
    assert splits[2] == set(split_clean(NUMBERS, 20, seed=1)[0]["row"])
    assert splits[2] != set(split_clean(NUMBERS, 20, seed=2)[0]["row"])


@pytest.mark.parametrize("samples", [-1, 0, 50, 51])
def test_an_empty_clean_split_and_one_that_leaves_nothing_are_refused(samples):
    with pytest.raises(ValueError, match=f"{samples} out of 50 .*--clean_samples"):
        split_clean(NUMBERS, samples, seed=0)
