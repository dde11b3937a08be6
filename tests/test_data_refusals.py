"""Labelled images that are refused: columns, files, folders and names, each with one clear error."""

import datetime
from pathlib import Path

import datasets
import pytest
from data_cases import own_cache, parquet, plain, rows  # noqa: F401  (a fixture)
from datasets import DatasetDict, Value

from hf_fip.tasks import data
from hf_fip.tasks.data import load_images

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
