"""The image data sets known by a short name, on small copies in the layout they have on the Hub."""

import os
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Pillow

from hf_fip.scripts.arguments import Parser
from hf_fip.scripts.images import ImageData, augmentation
from hf_fip.tasks import data
from hf_fip.tasks.data import DIGITS, LabelledImages, load_images
from hf_fip.tasks.image_data import NAMED_IMAGES, named_images

ODD_SIZES = [(15, 15), (60, 41)]
LAYOUTS = {  # column of the images, classes, sizes of the images, rows of each split
    "cifar10": ("img", 10, [(32, 32)], {"train": 12, "test": 5}),
    "gtsrb": ("image", 43, ODD_SIZES, {"train": 50, "test": 7, "contrast": 3, "jpeg_compression": 3}),
    "tiny-imagenet": ("image", 200, [(64, 64)], {"train": 12, "valid": 6}),
    "imagenet": ("image", 1000, ODD_SIZES, {"train": 12, "validation": 4, "test": 3}),
}


def picture(row: int, size: tuple[int, int]) -> Pillow.Image:
    """Dark on the left; the first row is gray, as some of ImageNet's are."""
    pixels = np.random.default_rng(row).integers(0, 100, (size[1], size[0], 3), dtype=np.uint8)
    pixels[:, size[0] // 2 :] += 150
    return Pillow.fromarray(pixels if row else pixels[..., 0])


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A folder that stands in for the Hub, with all of them; the test runs in another."""
    for name, (column, classes, sizes, splits) in LAYOUTS.items():
        features = Features({column: Image(), "label": ClassLabel(names=[f"class {c}" for c in range(classes)])})
        folder = tmp_path / "hub" / NAMED_IMAGES[name].hub_id / "data"
        folder.mkdir(parents=True)
        for split, rows in splits.items():
            pictures = [picture(row, sizes[row % len(sizes)]) for row in range(rows)]
            hidden = name == "imagenet" and split == "test"
            labels = [-1 if hidden else row % classes for row in range(rows)]
            part = Dataset.from_dict({column: pictures, "label": labels}, features=features)
            part.to_parquet(folder / f"{split}-00000-of-00001.parquet")

    def load_dataset(path, *args, **kwargs):
        place = path if os.path.exists(path) else str(tmp_path / "hub" / path)
        return datasets.load_dataset(place, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(data, "load_dataset", load_dataset)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "hub"


def test_data_sets_load_by_their_short_names_or_hub_ids(hub):
    expected = {"cifar10": (12, 5), "gtsrb": (50, 7), "tiny-imagenet": (12, 6), "imagenet": (12, 4)}
    assert {DIGITS, *expected} == set(NAMED_IMAGES)
    for short, sizes in expected.items():
        for name in (short, NAMED_IMAGES[short].hub_id):
            images = load_images(name)
            assert (images.name, images.known) == (name, NAMED_IMAGES[short])
            assert (len(images.train), len(images.test)) == sizes
            assert images.train.column_names == images.test.column_names == ["image", "label"]
            assert images.class_names == [f"class {c}" for c in range(LAYOUTS[short][1])]


def test_traffic_signs_become_squares_and_other_images_keep_their_sizes(hub):
    sizes = {name: {row["image"].size for row in load_images(name).train} for name in LAYOUTS}
    assert sizes == {
        "cifar10": {(32, 32)},
        "gtsrb": {(32, 32)},
        "tiny-imagenet": {(64, 64)},
        "imagenet": set(ODD_SIZES),
    }
    signs = load_images("gtsrb")
    assert {row["image"].mode for part in (signs.train, signs.test) for row in part} == {"RGB"}
    expected = picture(1, ODD_SIZES[1]).resize((32, 32), Pillow.Resampling.BILINEAR)
    assert np.array_equal(np.asarray(signs.train[1]["image"]), np.asarray(expected))
    assert signs.train["label"][:] == [row % 43 for row in range(50)]


def test_what_the_user_names_wins_over_what_is_known(hub):
    images = load_images("gtsrb", test_split="contrast", max_train_samples=9)
    assert (len(images.train), len(images.test)) == (9, 3)
    with pytest.raises(ValueError, match="No column 'picture' for the images: the columns are img"):
        load_images("cifar10", image_column="picture")
    with pytest.raises(ValueError, match="negative"):
        load_images("imagenet", test_split="test")


def test_a_folder_of_that_name_wins_over_a_short_name(hub):
    os.makedirs("gtsrb")
    part = datasets.load_dataset("parquet", data_files=str(hub / "tanganke/gtsrb/data/test-*.parquet"))["train"]
    part.to_parquet("gtsrb/train.parquet")
    images = load_images("gtsrb")
    assert images.known is None and len(images.train) + len(images.test) == 7
    assert {row["image"].size for row in images.train} <= set(ODD_SIZES)


def test_other_names_are_not_known():
    assert [named_images(name) for name in ("cifar11", "None", "", "someone/cifar10")] == [None] * 4


def test_a_misspelt_short_name_is_refused_with_those_there_are(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise datasets.exceptions.DatasetNotFoundError("not found")

    monkeypatch.setattr(data, "load_dataset", load_dataset)
    names = "digits, cifar10, gtsrb, tiny-imagenet, imagenet"
    with pytest.raises(ValueError, match=f"No data set 'cifar11'.*not found \\(Short names: {names}"):
        load_images("cifar11")
    for name in ("someone/cifar10", "imagenet"):
        with pytest.raises(ValueError, match="No data set .*not found$"):
            load_images(name)


def test_the_names_are_in_the_help():
    text = Parser((ImageData,)).format_help()
    assert all(name in text for name in NAMED_IMAGES)


# What suits their images


def test_a_normalisation_has_one_number_a_channel_and_is_that_of_pixels_up_to_one():
    for name, known in NAMED_IMAGES.items():
        assert len(known.mean) == len(known.std) == (1 if name == DIGITS else 3)
        assert all(0.3 < mean <= 0.5 for mean in known.mean) and all(0.2 < std <= 0.5 for std in known.std)


def mirrors(images: LabelledImages) -> bool:
    """Whether any of 64 augmented images, dark on the left, is dark on the right."""
    torch.manual_seed(0)
    dark_on_the_left = torch.arange(16.0).expand(64, 1, 16, 16)
    changed = augmentation(True, images)({"pixel_values": dark_on_the_left})["pixel_values"]
    return bool((changed[..., :8].mean((1, 2, 3)) > changed[..., 8:].mean((1, 2, 3))).any())


def test_images_are_mirrored_unless_they_are_digits_or_signs(hub):
    found = {name: mirrors(load_images(name)) for name in NAMED_IMAGES}
    assert found == {DIGITS: False, "cifar10": True, "gtsrb": False, "tiny-imagenet": True, "imagenet": True}
    part = load_images("cifar10").train
    assert mirrors(LabelledImages(part, part, "my photos")) and augmentation(False, load_images("cifar10")) is None
