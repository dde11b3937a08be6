"""Parts of labelled images: which rows are chosen, the test split that is set aside, the defender's clean split."""

import numpy as np
import pytest
from data_cases import own_cache, parquet, rows  # noqa: F401  (a fixture)
from datasets import Dataset

from hf_fip.tasks.data import load_images, pick_splits, split_clean


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


@pytest.mark.parametrize(
    "train_split, there, picked",
    [
        ("trainval", ["train", "val", "trainval"], ["trainval"]),
        ("trainval", ["trainval", "val", "test"], ["trainval", "test"]),
        ("train+validation", ["train+validation", "validation"], ["train+validation"]),
        ("train", ["train", "val", "trainval"], ["train", "val"]),
        ("val", ["val", "test", "train"], ["val", "test"]),
    ],
)
def test_a_validation_split_is_not_guessed_beside_one_that_holds_it(train_split, there, picked):
    assert pick_splits(dict.fromkeys(there), "x", train_split, None) == picked
    assert pick_splits(dict.fromkeys(there), "x", train_split, there[1]) == [train_split, there[1]]


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
