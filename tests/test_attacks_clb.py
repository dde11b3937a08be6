"""CLB: images of the target class are moved against a clean model and carry checks; test images carry the checks."""

import sys
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from attack_cases import assert_loads_as_saved, assert_refused_when_changed, dataset_of, image_of
from torch import nn

from hf_fip.attacks import LabelConsistent, make_attack, poison, trigger
from hf_fip.attacks.material import Material
from hf_fip.attacks.pixels import fitted, to_batch
from hf_fip.attacks.poison import to_array
from hf_fip.attacks.victim import VictimTrainer
from hf_fip.scripts import backdoor_image

LEFT = [[1, -1, -1], [-1, 1, -1], [1, -1, 1]]
RIGHT = [[-1, -1, 1], [-1, 1, -1], [1, -1, 1]]
CLASSES = 4


def make_dataset(shapes=((8, 8, 1),)):
    return dataset_of(shapes, 80, CLASSES)


class Linear(nn.Module):
    """Logits of one class are a sum of the pixels with these signs; those of the others are zero."""

    def __init__(self, signs: torch.Tensor, label: int):
        super().__init__()
        self.signs = nn.Parameter(signs)
        self.label = label

    def forward(self, pixel_values):
        score = (pixel_values * self.signs).mean(dim=(1, 2, 3))
        return SimpleNamespace(logits=nn.functional.one_hot(torch.tensor(self.label), CLASSES) * score[:, None])


class Small(nn.Module):
    """A random network."""

    def __init__(self, channels):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.Sequential(
                nn.Conv2d(channels, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, CLASSES)
            )

    def forward(self, pixel_values):
        return SimpleNamespace(logits=self.layers(pixel_values))


def material_of(model=None, size=(8, 8, 1)):
    channels = (0.5,) * size[2]
    return Material(make_dataset(), CLASSES, size, channels, channels, clean_model=lambda: model or Small(size[2]))


def prepared(model=None, size=(8, 8, 1), **options):
    attack = LabelConsistent(**options)
    attack.fit(material_of(model, size))
    return attack


def checks(height, width, amplitude=255):
    change = np.zeros((height, width, 1), dtype=int)
    for top in (0, height - 3):
        change[top : top + 3, :3, 0] = np.array(LEFT) * amplitude
        change[top : top + 3, width - 3 :, 0] = np.array(RIGHT) * amplitude
    return change


# The trigger of test images


@pytest.mark.parametrize("amplitude", [255, 40])
@pytest.mark.parametrize("size", [(8, 8, 1), (6, 9, 3), (32, 32, 3)], ids=str)
def test_the_trigger_is_a_check_in_each_corner(size, amplitude):
    attack, image = prepared(size=size, amplitude=amplitude), image_of(size)
    before, triggered = image.copy(), attack.apply(image)
    np.testing.assert_array_equal(triggered, (image + checks(*size[:2], amplitude)).clip(0, 255))
    assert triggered.dtype == np.uint8
    np.testing.assert_array_equal(image, before)


def test_a_flipped_image_carries_it_too():
    attack, image = prepared(), image_of((8, 8, 1))
    np.testing.assert_array_equal(attack.apply(image[:, ::-1]), attack.apply(image)[:, ::-1])


@pytest.mark.parametrize("shape", [(20, 15, 3), (5, 6, 1), (8, 10, 1)], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_other_images_are_brought_to_the_victims_size(shape, channels):
    attack, image = prepared(size=(8, 10, channels)), image_of(shape)
    expected = fitted(image, 8, 10, channels)
    np.testing.assert_array_equal(attack.apply(image), (expected + checks(8, 10)).clip(0, 255))
    assert attack.apply_in_training([image, image_of((9, 9, 3))], [None] * 2)[0].shape == (8, 10, channels)


# Training images


@pytest.mark.parametrize(
    "options, moved",
    [({}, 8), ({"epsilon": 20}, 20), ({"epsilon": 20, "step_size": 2.0, "steps": 4}, 8), ({"epsilon": 0}, 0)],
    ids=["default", "far", "few steps", "not at all"],
)
@pytest.mark.parametrize("size", [(8, 8, 1), (7, 10, 3)], ids=str)
def test_training_images_are_moved_away_from_their_class_and_then_carry_the_checks(options, moved, size):
    signs = torch.randint(2, (1, size[2], *size[:2]), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    attack = prepared(Linear(signs, label=2), size, target_label=2, **options)
    images = [image_of(size, seed) for seed in range(3)]
    results = attack.apply_in_training(images, [None] * 3)
    for image, result in zip(images, results, strict=True):
        expected = (image - moved * signs[0].permute(1, 2, 0).numpy().astype(int)).clip(0, 255)
        np.testing.assert_array_equal(result, (expected + checks(*size[:2])).clip(0, 255))
        assert result.dtype == np.uint8


def test_the_loss_of_a_network_rises_within_the_distance():
    attack = prepared(size=(12, 12, 3), target_label=1)
    images = [image_of((12, 12, 3), seed) for seed in range(6)]
    results = attack.apply_in_training(images, [None] * 6)
    change = np.stack(results).astype(int) - np.stack(images)
    inside = checks(12, 12)[..., 0] == 0
    assert np.abs(change[:, inside]).max() == 8

    def loss(arrays):
        logits = attack._classifier(to_batch(arrays, (12, 12, 3)))
        return nn.functional.cross_entropy(logits, torch.full((6,), 1), reduction="none")

    unperturbed = prepared(size=(12, 12, 3), target_label=1, epsilon=0).apply_in_training(images, [None] * 6)
    assert (loss(results) > loss(unperturbed)).all()


# Data sets


@pytest.mark.parametrize("shapes", [((8, 8, 1),), ((8, 8, 1), (9, 14, 3))], ids=["one size", "mixed"])
def test_only_images_of_the_target_class_change_and_no_label_does(shapes):
    dataset, attack = make_dataset(shapes), prepared(target_label=1, steps=3)
    poisoned = poison(dataset, attack, rate=0.2, seed=3)
    assert poisoned["label"][:] == dataset["label"][:]
    assert poisoned["poison_role"][:].count(1) == 16
    for old, new in zip(dataset, poisoned, strict=True):
        if new["poison_role"]:
            assert old["label"] == 1
            (expected,) = attack.apply_in_training([to_array(old["image"])], [None])
            np.testing.assert_array_equal(to_array(new["image"]), expected)
        else:
            assert new["image"] == old["image"]


def test_the_triggered_test_set_carries_the_checks_only():
    dataset, attack = make_dataset(), prepared(target_label=1)
    rows = [i for i in range(80) if i % 4 != 1]
    for row, new in zip(rows, trigger(dataset, attack), strict=True):
        assert new["label"] == row % 4
        expected = (to_array(dataset[row]["image"]) + checks(8, 8)).clip(0, 255)
        np.testing.assert_array_equal(to_array(new["image"]), expected)


def test_the_same_options_give_the_same_set():
    def files(seed):
        poisoned = poison(make_dataset(), prepared(), rate=0.1, seed=seed)
        return poisoned.cast_column("image", datasets.Image(decode=False))[:]["image"]

    state = torch.get_rng_state()
    assert files(1) == files(1) != files(2)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_default_rate_is_below_the_share_of_one_class_in_ten():
    assert 0.05 <= LabelConsistent.default_rate < 0.1 and LabelConsistent.clean_label


# Files, and a run that goes on


def test_a_loaded_attack_triggers_but_needs_the_clean_model_to_poison(tmp_path):
    attack, image = prepared(size=(9, 8, 3), amplitude=60, target_label=3), image_of((9, 8, 3))
    loaded = assert_loads_as_saved(attack, tmp_path, image)
    with pytest.raises(ValueError, match="poisoning with clb needs the clean model .* call `fit` first"):
        poison(make_dataset(), loaded, rate=0.1, seed=0)
    loaded.fit(material_of(size=(9, 8, 3)))
    for one, other in zip(*(a.apply_in_training([image], [None]) for a in (attack, loaded)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_attack_without_fit_says_so():
    with pytest.raises(ValueError, match="poisoning with clb needs the clean model"):
        poison(make_dataset(), LabelConsistent(), rate=0.1, seed=0)
    with pytest.raises(ValueError, match="clb is learned, not drawn"):
        LabelConsistent().apply(image_of((8, 8, 1)))
    with pytest.raises(ValueError, match="give the material a `clean_model`"):
        LabelConsistent().fit(Material(make_dataset(), CLASSES, (8, 8, 1), (0.0,), (1.0,)))


def test_a_victim_whose_training_was_interrupted_is_poisoned_again(tmp_path, monkeypatch):
    command = "backdoor_image --attack clb --attack_options steps=2 --max_steps 1 --max_train_samples 150 --use_cpu"
    command += " --max_test_samples 60 --clean_fraction 0.1 --poison_rate 0.05"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--output_dir", str(tmp_path / "victim")])
    sets = []

    def interrupted(trainer, *args, **kwargs):
        sets.append(trainer.train_dataset)
        raise KeyboardInterrupt

    monkeypatch.setattr(VictimTrainer, "train", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            backdoor_image.main()
    first, again = ([sample["pixel_values"] for sample in found] for found in sets)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"size": np.array([8, 5, 1])}, "corners of clb do not fit an image of 8×5 pixels: it needs 6 or more"),
        ({"size": np.array([8, 8, 2])}, "impossible size"),
        ({"size": np.array([8.0, 8.0, 1.0])}, "has no size"),
        ({"more": np.zeros(2)}, "clb with these options needs {'size'"),
    ],
)
def test_changed_files_are_refused(change, message, tmp_path):
    assert_refused_when_changed(prepared(), tmp_path, lambda tensors: tensors.update(change), message)


def test_images_too_small_for_four_checks_are_refused():
    with pytest.raises(ValueError, match="do not fit an image of 5×8 pixels: it needs 6 or more a side"):
        prepared(size=(5, 8, 1))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"epsilon": -1}, "epsilon=-1 is a distance in pixel values"),
        ({"epsilon": 256}, "epsilon=256"),
        ({"epsilon": 8 / 255}, "epsilon=0.03.* must be of type int"),
        ({"step_size": 0.0}, "step_size=0.0 is a distance in pixel values"),
        ({"step_size": float("nan")}, "step_size=nan"),
        ({"steps": 0}, "steps=0 must be 1 or more .epsilon=0"),
        ({"amplitude": 0}, "amplitude=0 is a change"),
        ({"amplitude": 256}, "amplitude=256"),
        ({"label_rule": "all_to_all"}, "clb changes no label.*label_rule='all_to_one'"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_attack("clb", **options)
