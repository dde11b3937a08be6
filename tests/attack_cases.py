"""Random images, and what the tests of several attacks on images ask of each, shared by them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.numpy import load_file, save_file

from hf_fip.attacks import Attack, load_attack, make_attack, poison, trigger
from hf_fip.attacks.learned import LearnedAttack
from hf_fip.attacks.material import Material
from hf_fip.attacks.poison import to_array

datasets.disable_progress_bars()

Shape = tuple[int, int, int]

ATTACKS = {
    "badnets": {},
    "badnets-blended": {"alpha": 0.6, "patch_size": 5, "target_label": 2},
    "blend": {"seed": 3},
    "wanet": {},
    "wanet-strong": {"strength": 2.0, "grid_size": 6, "cover_rate": 0.3},
}
SHAPES = [(32, 32, 3), (28, 28, 1), (24, 40, 3), (17, 9, 1), (300, 270, 3)]

every_attack = pytest.mark.parametrize("case", ATTACKS)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def attack_of(case: str) -> Attack:
    return make_attack(case.split("-")[0], **ATTACKS[case])


def image_of(shape: Shape, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def dataset_of(shapes: Sequence[Shape], rows: int, classes: int, make_image=image_of) -> datasets.Dataset:
    """Row i has class i mod `classes` and the image `make_image(shape, i)` of the shape i mod len(shapes)."""
    columns = {
        "image": [PIL.Image.fromarray(make_image(shapes[i % len(shapes)], i).squeeze()) for i in range(rows)],
        "label": [i % classes for i in range(rows)],
    }
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(num_classes=classes))
    return datasets.Dataset.from_dict(columns, features=features)


def material_of(dataset: datasets.Dataset, size: Shape = (8, 8, 3)) -> Material:
    half = (0.5,) * size[2]
    return Material(dataset, dataset.features["label"].num_classes, size, half, half)


def assert_options_and_images_decide(fit: Callable[..., LearnedAttack], image: np.ndarray) -> None:
    """`fit(**options)` makes an attack with its trigger, always from the same images of the size of `image`.

    Twice the same trigger, which changes the image; another one by another seed; no random state changes.
    """
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first = fit()
    assert torch.rand(1) == expected
    torch.manual_seed(7)
    second = fit()
    assert first.tensors.keys() == second.tensors.keys() == first.blank_tensors(*image.shape).keys()
    for name, weight in first.tensors.items():
        np.testing.assert_array_equal(weight, second.tensors[name])
    before = image.copy()
    np.testing.assert_array_equal(first.apply(image), second.apply(image))
    np.testing.assert_array_equal(image, before)
    assert first.apply(image).shape == image.shape and (first.apply(image) != image).any()
    assert (fit(seed=1).apply(image) != first.apply(image)).any()


def assert_poisoned(dataset: datasets.Dataset, attack: Attack, rate: float, roles: list[int], label: int) -> None:
    """So many rows of each role; those under attack, of other classes, get trigger and label, the others stay."""
    poisoned = poison(dataset, attack, rate=rate, seed=0)
    assert list(np.bincount(poisoned["poison_role"])) == roles
    for old, new in zip(dataset, poisoned, strict=True):
        image = to_array(old["image"])
        if new["poison_role"] == 0:
            assert new["label"] == old["label"]
            np.testing.assert_array_equal(to_array(new["image"]), image)
        else:
            assert old["label"] != label == new["label"]
            np.testing.assert_array_equal(to_array(new["image"]), attack.apply(image))


def assert_triggered(dataset: datasets.Dataset, attack: Attack, label: int | None) -> None:
    """All rows but those of this label, if there is one, with their own labels, and with the trigger on each image."""
    kept = [row for row in dataset if row["label"] != label]
    triggered = trigger(dataset, attack)
    assert triggered["label"][:] == [row["label"] for row in kept]
    for old, new in zip(kept, triggered, strict=True):
        np.testing.assert_array_equal(to_array(new["image"]), attack.apply(to_array(old["image"])))


def assert_loads_as_saved(attack: Attack, folder: Path, *samples: np.ndarray) -> Attack:
    """What is loaded has the same options, and the same trigger on these samples."""
    attack.save_pretrained(folder)
    loaded = load_attack(folder)
    assert loaded == attack and type(loaded) is type(attack)
    for sample in samples:
        np.testing.assert_array_equal(loaded.apply(sample), attack.apply(sample))
    return loaded


def assert_refused_when_changed(attack: Attack, folder: Path, change: Callable[[dict], object], message: str) -> None:
    """`change` is given the tensors of the saved attack, to change the dictionary."""
    attack.save_pretrained(folder)
    file = folder / "attack.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(ValueError, match=message):
        load_attack(folder)
