"""Small sets of labelled images and the files that hold them, shared by the tests of what is loaded."""

from __future__ import annotations

import io
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Pillow

CATS = ClassLabel(names=["cat", "dog"])


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
