"""ISSBA: what the encoder hides the decoder reads, and images carry it after saving in 8 bits."""

from functools import partial

import numpy as np
import pytest
import torch
from attack_cases import (
    assert_loads_as_saved,
    assert_options_and_images_decide,
    assert_poisoned,
    assert_triggered,
    dataset_of,
    material_of,
)

from hf_fip.attacks import ISSBA, make_attack, trigger
from hf_fip.attacks.issba import gradient_distance
from hf_fip.attacks.pixels import fitted, to_tensor
from hf_fip.attacks.poison import to_array

QUICK = {"secret_bits": 4, "width": 8, "epochs": 1, "secret_epochs": 0}


def image_of(shape, seed=0):
    """Smooth at random: a plane of its own, and a little noise."""
    rng = np.random.default_rng(seed)
    height, width, channels = shape
    slopes = rng.uniform(-80, 80, (2, channels))
    plane = np.linspace(-1, 1, height)[:, None, None] * slopes[0] + np.linspace(-1, 1, width)[:, None] * slopes[1]
    return (127 + plane / 2 + rng.normal(0, 4, shape)).clip(0, 255).astype(np.uint8)


def make_dataset(rows=48, shapes=((8, 8, 3),)):
    return dataset_of(shapes, rows, 3, image_of)


def fitted_attack(dataset=None, size=(8, 8, 3), **options):
    attack = ISSBA(**{**QUICK, **options})
    attack.fit(material_of(dataset or make_dataset(), size))
    return attack


@pytest.fixture(scope="module")
def trained():
    """An encoder of gray images that has learned its code, and the images."""
    material = material_of(make_dataset(96), (8, 8, 1))
    attack = ISSBA(secret_bits=2, width=8, epochs=40, secret_epochs=10, learning_rate=3e-3)
    attack.fit(material)
    return attack, material


def test_the_decoder_reads_the_secret_from_stored_images(trained):
    attack, material = trained
    assert attack.bit_accuracy(material.pixels) > 0.95
    decoder, secret = attack.networks["decoder"], attack.networks["encoder"].secret > 0
    with torch.no_grad():
        read = torch.stack([decoder(to_tensor(attack.apply(image_of((8, 8, 1), i))))[0] > 0 for i in range(256, 300)])
        clean = torch.stack([decoder(to_tensor(image_of((8, 8, 1), i)))[0] > 0 for i in range(256, 300)])
    assert (read == secret).float().mean() > 0.9  # images it has not seen
    assert (clean == secret).float().mean() < 0.9


def test_the_change_is_small_and_each_images_own(trained):
    attack, _ = trained
    images = np.stack([image_of((8, 8, 1), i).astype(float) for i in range(20)])
    changes = np.stack([attack.apply(image.astype(np.uint8)) for image in images]) - images
    assert 0 < np.abs(changes).mean() < 30
    assert (np.abs(changes - changes[0]).reshape(20, -1).max(axis=1)[1:] > 0).all()


def test_the_secret_is_drawn_from_the_seed():
    secrets = {
        seed: tuple(ISSBA(seed=seed).new_networks(8, 8, 1)["encoder"].secret.tolist()) for seed in (0, 0, 1, 2, 3)
    }
    assert len(set(secrets.values())) == 4 and {bit for secret in secrets.values() for bit in secret} == {0.0, 1.0}


@pytest.mark.parametrize("size", [(8, 8, 3), (9, 13, 1), (17, 16, 3)])
def test_the_same_options_and_images_make_the_same_trigger_and_no_random_state_changes(size):
    assert_options_and_images_decide(partial(fitted_attack, make_dataset(shapes=[size]), size), image_of(size))


def test_poison_and_trigger_hide_the_same_secret():
    dataset = make_dataset(60, [(8, 8, 3), (10, 9, 1)])
    attack = fitted_attack(dataset, target_label=2)
    assert_poisoned(dataset, attack, rate=0.1, roles=[54, 6], label=2)
    assert_triggered(dataset, attack, label=2)
    assert {to_array(image).shape for image in trigger(dataset, attack)["image"]} == {(8, 8, 3)}


def test_other_sizes_and_channels_are_brought_to_the_encoders():
    attack = fitted_attack()
    for shape in [(20, 15, 1), (6, 30, 3)]:
        image = image_of(shape)
        np.testing.assert_array_equal(attack.apply(image), attack.apply(fitted(image, 8, 8, 3)))


def test_a_saved_attack_loads_and_a_changed_one_is_refused(tmp_path):
    attack = fitted_attack()
    assert_loads_as_saved(attack, tmp_path, image_of((8, 8, 3)))
    with pytest.raises(ValueError, match="issba with these options needs"):
        ISSBA(**{**QUICK, "secret_bits": 5}).load_tensors(attack.tensors)
    attack.tensors.pop("encoder.secret")
    with pytest.raises(ValueError, match="issba with these options needs .*encoder.secret"):
        ISSBA(**QUICK).load_tensors(attack.tensors)


def test_the_gradient_distance_sees_structure_and_not_brightness():
    images = torch.rand(2, 3, 12, 10)
    assert gradient_distance(images, images) == 0
    assert gradient_distance(images + 0.1, images) == pytest.approx(0, abs=1e-6)
    columns = torch.arange(10) % 2 * 0.1  # 9 of 9 steps across change by 0.1 at full scale, none at the others
    assert gradient_distance(images + columns, images).item() == pytest.approx(0.1 / 6, rel=1e-3)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"secret_bits": 0}, "secret_bits=0"),
        ({"epochs": 0, "secret_epochs": 0}, "epochs=0"),
        ({"epochs": 3, "secret_epochs": 4}, "secret_epochs=4"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"width": 0}, "width=0"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_attack("issba", **options)


def test_small_images_and_an_encoder_that_has_not_learned_are_refused():
    with pytest.raises(ValueError, match="issba needs images of 8×8 pixels or more, not 7×12"):
        fitted_attack(size=(7, 12, 3))
    with pytest.raises(ValueError, match="issba is learned, not drawn"):
        ISSBA().apply(image_of((8, 8, 3)))
