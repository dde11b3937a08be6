"""BPPA: quantised colours, dithered or not, and covers that carry another image's residual."""

import numpy as np
import pytest
from attack_cases import assert_loads_as_saved, assert_triggered, dataset_of, image_of

from hf_fip.attacks import BPPA, make_attack, poison
from hf_fip.attacks.pixels import fitted
from hf_fip.attacks.poison import to_array
from hf_fip.scripts.arguments import AttackArguments

SHAPES = [(32, 32, 3), (28, 28, 1), (9, 17, 3), (1, 1, 1), (1, 5, 3), (7, 1, 1)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def make_dataset():
    return dataset_of([(8, 8, 3), (6, 9, 1)], rows=60, classes=3)


def scanned(image, steps):
    """Floyd and Steinberg pixel by pixel, line by line."""
    height, width, _ = image.shape
    values = image.astype(np.float64)
    for y in range(height):
        for x in range(width):
            old = values[y, x].copy()
            values[y, x] = (old / 255 * steps).round().clip(0, steps) / steps * 255
            for dy, dx, share in [(0, 1, 7), (1, -1, 3), (1, 0, 5), (1, 1, 1)]:
                if y + dy < height and 0 <= x + dx < width:
                    values[y + dy, x + dx] += (old - values[y, x]) * share / 16
    return values.round().astype(np.uint8)


@every_shape
@pytest.mark.parametrize("bits", [1, 3, 7])
def test_each_value_becomes_the_nearest_of_evenly_spaced_levels(shape, bits):
    image = image_of(shape)
    steps = 2**bits - 1
    levels = np.arange(steps + 1) * 255 / steps
    triggered = BPPA(bits=bits).apply(image).astype(float)
    np.testing.assert_allclose(
        np.abs(triggered - image), np.abs(levels - image[..., None]).min(axis=-1), atol=0.5 + 1e-9, rtol=0
    )
    assert set(np.unique(triggered)) <= set(levels.round())


@every_shape
@pytest.mark.parametrize("bits", [1, 3])
def test_dithering_is_that_of_floyd_and_steinberg(shape, bits):
    image = image_of(shape)
    before = image.copy()
    triggered = BPPA(bits=bits, dithering=True).apply(image)
    np.testing.assert_array_equal(triggered, scanned(image, 2**bits - 1))
    np.testing.assert_array_equal(image, before)


def test_dithering_keeps_the_mean_that_rounding_loses():
    gray = np.full((64, 64, 3), 120, dtype=np.uint8)
    assert abs(BPPA(bits=1).apply(gray).mean() - 120) > 100
    assert BPPA(bits=1, dithering=True).apply(gray).mean() == pytest.approx(120, abs=2)


@pytest.mark.parametrize(
    "shape, donor_shape", [((12, 12, 3), (12, 12, 3)), ((12, 12, 3), (20, 9, 1)), ((9, 7, 1),) * 2]
)
@pytest.mark.parametrize("dithering", [False, True])
def test_a_cover_is_the_image_with_the_residual_of_its_donor(shape, donor_shape, dithering):
    attack = BPPA(dithering=dithering)
    image, donor = image_of(shape), image_of(donor_shape, 1)
    cover = attack.apply_cover(image, np.random.default_rng(0), donor)
    other = fitted(donor, *shape)
    expected = np.clip(image + (attack.apply(other).astype(float) - other), 0, 255)
    np.testing.assert_array_equal(cover, expected)
    assert cover.dtype == np.uint8 and (cover != attack.apply(image)).any()


def test_a_poisoned_set_has_the_shares_labels_and_images_that_were_asked_for():
    dataset, attack = make_dataset(), BPPA(target_label=1, cover_rate=0.2)
    poisoned = poison(dataset, attack, rate=0.1, seed=3)
    assert list(np.bincount(poisoned["poison_role"])) == [42, 6, 12]
    plan = attack.plan(np.array(dataset["label"]), 3, 0.1, np.random.default_rng(3))
    for i, (old, new) in enumerate(zip(dataset, poisoned, strict=True)):
        image, changed = to_array(old["image"]), to_array(new["image"])
        if new["poison_role"] == 1:
            assert old["label"] != 1 == new["label"]
            np.testing.assert_array_equal(changed, attack.apply(image))
            continue
        assert new["label"] == old["label"]
        if new["poison_role"] == 2:
            donor = to_array(dataset[int(plan.donors[i])]["image"])
            image = attack.apply_cover(image, None, donor)
        np.testing.assert_array_equal(changed, image)
    again = poison(dataset, attack, rate=0.1, seed=3)
    assert [to_array(image).tolist() for image in again["image"]] == [
        to_array(image).tolist() for image in poisoned["image"]
    ]


def test_the_triggered_test_set_carries_the_training_trigger():
    assert_triggered(make_dataset(), BPPA(), label=0)


def test_a_saved_attack_loads_and_a_changed_one_is_refused(tmp_path):
    attack = make_attack("bppa", bits=2, dithering=True)
    assert_loads_as_saved(attack, tmp_path, image_of((10, 11, 3)))
    with pytest.raises(ValueError, match=r"bppa with these options needs .*uint8 \(8,\)"):
        BPPA(bits=3).load_tensors(attack.tensors)


def test_the_recipe_can_switch_dithering_on():
    attack = AttackArguments("bppa", attack_options="bits=2,dithering=true").make(10)
    assert attack == BPPA(bits=2, dithering=True)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"bits": 0}, "bits=0"),
        ({"bits": 8}, "bits=8"),
        ({"bits": 2.0}, "bits=2.0 must be of type int"),
        ({"dithering": 1}, "dithering=1 must be of type bool"),
        ({"cover_rate": -0.1}, "cover_rate=-0.1"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BPPA(**options)
