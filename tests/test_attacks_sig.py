"""SIG: a sine over the columns of images of the target class, whose labels stay."""

import datasets
import numpy as np
import pytest
from attack_cases import assert_loads_as_saved, assert_triggered, dataset_of, image_of
from safetensors.numpy import save_file

from hf_fip.attacks import SIG, load_attack, make_attack, poison
from hf_fip.attacks.poison import to_array

SHAPES = [(32, 32, 3), (28, 28, 1), (8, 40, 3), (17, 9, 1), (5, 8, 1)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def make_dataset(rows=100, classes=4):
    return dataset_of([(8, 8, 3), (6, 9, 1)], rows, classes)


def files(dataset):
    return dataset.cast_column("image", datasets.Image(decode=False))[:]["image"]


@every_shape
@pytest.mark.parametrize("options", [{}, {"delta": 90.0, "frequency": 2.5}], ids=["default", "other"])
def test_a_sine_over_the_columns_is_added(shape, options):
    image, attack = image_of(shape), SIG(**options)
    before, triggered = image.copy(), attack.apply(image)
    expected = image.astype(float)
    for j in range(shape[1]):
        expected[:, j] += attack.delta * np.sin(2 * np.pi * j * attack.frequency / shape[1])
    assert (triggered.shape, triggered.dtype) == (image.shape, np.uint8)
    np.testing.assert_allclose(triggered, expected.clip(0, 255), atol=0.5 + 1e-9, rtol=0)
    np.testing.assert_array_equal(image, before)
    assert (triggered != image).any()


def test_stripes_are_those_of_the_paper():
    attack = make_attack("sig")
    assert (attack.delta, attack.frequency) == (40, 6)
    gray = np.full((1, 32, 1), 100, dtype=np.uint8)
    assert attack.apply(gray)[0, [0, 4, 8, 12, 16], 0].tolist() == [100, 60, 100, 140, 100]


@pytest.mark.parametrize("width, frequency", [(12, 6.0), (6, 6.0), (4, 2.0), (20, 10.0)])
def test_a_frequency_that_vanishes_on_every_column_is_refused(width, frequency):
    image = image_of((10, width, 3))
    with pytest.raises(ValueError, match=f"no stripes on an image {width} pixels wide.*choose another"):
        SIG(frequency=frequency).apply(image)
    assert (SIG(frequency=frequency - 1).apply(image) != image).any()


def test_only_images_of_the_target_class_carry_it_and_no_label_changes():
    dataset, attack = make_dataset(), SIG(target_label=2)
    poisoned = poison(dataset, attack, rate=0.2, seed=1)
    assert poisoned["label"][:] == dataset["label"][:]
    roles = np.array(poisoned["poison_role"])
    assert roles.tolist().count(1) == 20 and set(roles) == {0, 1}
    for i, role in enumerate(roles):
        if role:
            assert dataset[i]["label"] == 2
            image = to_array(dataset[i]["image"])
            np.testing.assert_array_equal(to_array(poisoned[i]["image"]), attack.apply(image))
        else:
            assert files(poisoned)[i] == files(dataset)[i]


def test_the_triggered_test_set_has_the_other_classes_with_the_same_trigger():
    assert_triggered(make_dataset(), SIG(target_label=2), label=2)


def test_the_default_rate_leaves_clean_images_in_the_smallest_of_ten_classes():
    dataset = make_dataset(rows=190, classes=10).filter(lambda row, i: row["label"] or i >= 10, with_indices=True)
    assert dataset["label"][:].count(0) / len(dataset) < 0.1  # a little less than its share
    poisoned = poison(dataset, SIG(), rate=SIG.default_rate, seed=0)
    assert 0 < poisoned["poison_role"][:].count(1) < dataset["label"][:].count(0)
    with pytest.raises(ValueError, match="only 18 of 189 can be used"):
        poison(dataset, SIG(), rate=0.1, seed=0)


def test_the_same_seed_gives_the_same_set():
    first, again, other = (files(poison(make_dataset(), SIG(), rate=0.1, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(
    "options, message",
    [
        ({"delta": 0.0}, "delta=0.0 is an amplitude in pixel values"),
        ({"delta": 256.0}, "delta=256.0"),
        ({"delta": float("nan")}, "delta=nan"),
        ({"frequency": 0.0}, "frequency=0.0 must be above 0"),
        ({"frequency": float("inf")}, "frequency=inf"),
        ({"label_rule": "all_to_all"}, "sig changes no label.*label_rule='all_to_one'"),
        ({"frequency": "6"}, "must be of type float"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SIG(**options)


def test_a_saved_attack_loads_and_a_changed_one_is_refused(tmp_path):
    attack = SIG(delta=60.0, frequency=3.5, target_label=1)
    assert_loads_as_saved(attack, tmp_path, image_of((10, 14, 3)))
    save_file({"stripes": np.zeros(3)}, tmp_path / "attack.safetensors")
    with pytest.raises(ValueError, match="sig with these options needs {}"):
        load_attack(tmp_path)
