"""Trojan: the patch is the one that excites the chosen units of a clean model, and every image carries it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from attack_cases import assert_loads_as_saved, assert_refused_when_changed, assert_triggered, dataset_of, image_of
from torch import nn

from hf_fip.attacks import TrojAll, TrojOne, make_attack, poison, trigger
from hf_fip.attacks.material import Material
from hf_fip.attacks.pixels import fitted
from hf_fip.attacks.poison import to_array
from hf_fip.tasks.image_architectures import ARCHITECTURES

CLASSES = 3


def make_dataset(shapes=((8, 8, 1),)):
    return dataset_of(shapes, 60, CLASSES)


class HandMade(nn.Module):
    """Four units, each a sum of all pixels with signs: `signs`, (1, C, H, W), for units 1 and 3, reversed for 0 and 2.

    Units 1 and 3 have the largest Σ |weight| in the last layer; units 0 and 2 the largest Σ weight.
    """

    def __init__(self, signs: torch.Tensor):
        super().__init__()
        self.head = nn.Linear(4, CLASSES)  # called last, but made first
        self.body = nn.Linear(signs.numel(), 4)
        self.unused = nn.Linear(4, CLASSES)
        with torch.no_grad():
            self.body.weight.copy_(torch.stack([-signs.flatten(), signs.flatten()] * 2))
            self.head.weight.copy_(torch.tensor([[2.0, 9.0, 2.0, -8.0], [2.0, -9.0, 2.0, 8.0], [2.0, 0.0, 2.0, 0.0]]))

    def forward(self, pixel_values):
        return SimpleNamespace(logits=self.head(self.body(pixel_values.flatten(1)).relu()))


def material_of(model=None, size=(8, 8, 1), dataset=None, signs=None):
    signs = torch.ones(1, size[2], *size[:2]) if signs is None else signs
    made = lambda: model or HandMade(signs)  # noqa: E731
    channels = size[2]
    return Material(dataset or make_dataset(), CLASSES, size, (0.0,) * channels, (1.0,) * channels, clean_model=made)


def learned(attack=None, **kwargs):
    attack = attack or TrojOne()
    attack.fit(material_of(**kwargs))
    return attack


# Learning


@pytest.mark.parametrize("size", [(8, 8, 1), (9, 12, 3)], ids=str)
@pytest.mark.parametrize("side", [3, 5])
def test_the_patch_excites_the_inputs_of_the_last_layer_with_the_largest_weights(size, side):
    signs = torch.ones(1, size[2], *size[:2])
    signs[..., ::2] = -0.5  # of the columns
    attack = learned(TrojOne(patch_size=side, activation=1000.0), size=size, signs=signs)
    expected = np.where(signs[0].permute(1, 2, 0).numpy() > 0, 255, 0)[-side:, -side:]
    np.testing.assert_array_equal(attack.tensors["pattern"], expected)
    assert attack.size == size


def test_the_units_come_as_near_to_the_activation_as_steps_of_that_length_can():
    class Total(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(1, CLASSES)

        def forward(self, pixel_values):
            return SimpleNamespace(logits=self.head(pixel_values[..., -3:, -3:].sum(dim=(1, 2, 3))[:, None]))

    attack = learned(TrojOne(units=1, activation=3.0, step_size=1 / 255), model=Total())
    assert attack.tensors["pattern"].sum() / 255 == pytest.approx(3.0, abs=9 / 255)


def test_steps_are_counted_and_end_where_they_have_been_before():
    calls = []

    class Counted(HandMade):
        def forward(self, pixel_values):
            calls.append(len(pixel_values))
            return super().forward(pixel_values)

    first = learned(TrojOne(steps=1), model=Counted(torch.ones(64)))
    assert len(calls) == 1
    noise = first.tensors["pattern"]
    second = learned(TrojOne(steps=2), model=Counted(torch.ones(64)))
    np.testing.assert_allclose(second.tensors["pattern"], np.minimum(noise + 25.5, 255), atol=0.5, rtol=0)
    calls.clear()
    learned(TrojOne(steps=1000), model=Counted(torch.ones(64)))
    assert len(calls) < 20 and set(calls) == {32}


@pytest.mark.parametrize("architecture", ["vit", "resnet"])
def test_real_classifiers_are_excited_more_than_by_noise(architecture):
    torch.manual_seed(0)
    model, _ = ARCHITECTURES[architecture](["a", "b", "c"], 8, 3)
    given = {"model": model, "size": (8, 8, 3), "dataset": make_dataset(((8, 8, 3),))}
    noise, trained = learned(TrojOne(steps=1), **given), learned(TrojOne(steps=10), **given)
    material = material_of(**given)

    head = [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1]
    units = head.weight.abs().sum(dim=0).topk(2).indices

    def excitation(attack):
        seen = []
        handle = head.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0][:, units]))
        images = np.stack([attack.apply(to_array(image)) for image in material.images["image"]])
        material.classifier(torch.from_numpy(images).permute(0, 3, 1, 2) / 255)
        handle.remove()
        return seen[0].mean().item()

    assert excitation(trained) > excitation(noise)


def test_fit_is_decided_by_the_seed_and_leaves_nothing_behind():
    model = HandMade(torch.ones(64))
    state = torch.get_rng_state()
    first, again, other = (learned(TrojOne(seed=seed, steps=1), model=model) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.tensors["pattern"], again.tensors["pattern"])
    assert (first.tensors["pattern"] != other.tensors["pattern"]).any()
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_pre_hooks for module in model.modules())


class Convolutional(nn.Module):
    def __init__(self, gate: bool):
        super().__init__()
        self.gate = nn.Linear(1, 7) if gate else None
        self.head = nn.Conv2d(1, CLASSES, 8)

    def forward(self, pixel_values):
        if self.gate:
            pixel_values = pixel_values * self.gate(pixel_values.mean(dim=(2, 3))).mean()
        return SimpleNamespace(logits=self.head(pixel_values).flatten(1))


@pytest.mark.parametrize("gate", [False, True], ids=["no linear layer", "one inside"])
def test_a_model_without_a_linear_layer_at_its_end_is_refused(gate):
    model = Convolutional(gate)
    with pytest.raises(ValueError, match="does not end in one with 3 outputs: give another clean model"):
        learned(model=model)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    "options, size, message",
    [
        ({"units": 5}, (8, 8, 1), "units=5, but the last layer has 4 inputs"),
        ({"patch_size": 9}, (8, 10, 1), "patch_size=9 does not fit an image of 8×10 pixels: choose 8 or less"),
    ],
)
def test_what_the_model_or_the_images_do_not_have_is_refused(options, size, message):
    with pytest.raises(ValueError, match=message):
        learned(TrojOne(**options), size=size)


def test_it_needs_a_clean_model_and_to_be_learned():
    with pytest.raises(ValueError, match="clean_model"):
        TrojOne().fit(Material(make_dataset(), CLASSES, (8, 8, 1), (0.0,), (1.0,)))
    with pytest.raises(ValueError, match="troj_one is learned, not drawn"):
        TrojOne().apply(image_of((8, 8, 1)))


# Images


@pytest.mark.parametrize("shape", [(8, 10, 3), (8, 10, 1), (20, 15, 3), (5, 6, 1)], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_patch_lies_in_the_corner_of_the_image_at_the_victims_size(shape, channels):
    attack = learned(size=(8, 10, channels))
    image = image_of(shape)
    before, triggered = image.copy(), attack.apply(image)
    expected = fitted(image, 8, 10, channels).copy()
    expected[5:, 7:] = attack.tensors["pattern"]
    np.testing.assert_array_equal(triggered, expected)
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("name, labels", [("troj_one", [2, 2, 2]), ("troj_all", [1, 2, 0])])
def test_poisoned_and_test_images_carry_the_same_trigger(name, labels):
    dataset, attack = make_dataset(((8, 8, 3), (9, 14, 1))), make_attack(name, target_label=2)
    learned(attack, dataset=dataset)
    assert attack.default_rate == 0.1
    poisoned = poison(dataset, attack, rate=0.2, seed=0)
    assert poisoned["poison_role"][:].count(1) == 12
    for old, new in zip(dataset, poisoned, strict=True):
        if new["poison_role"]:
            assert new["label"] == labels[old["label"]] != old["label"]
            np.testing.assert_array_equal(to_array(new["image"]), attack.apply(to_array(old["image"])))
        else:
            assert new["label"] == old["label"] and new["image"] == old["image"]
    again = poison(dataset, attack, rate=0.2, seed=0)
    assert again["poison_role"][:] == poisoned["poison_role"][:]

    assert_triggered(dataset, attack, label=2 if name == "troj_one" else None)
    assert len(trigger(dataset, attack)) == (40 if name == "troj_one" else 60)


def test_all_targets_is_one_target_with_another_label_rule():
    one, every = TrojOne(seed=3, patch_size=4), TrojAll(seed=3, patch_size=4)
    learned(one), learned(every)
    np.testing.assert_array_equal(one.tensors["pattern"], every.tensors["pattern"])
    assert (one.label_rule, every.label_rule) == ("all_to_one", "all_to_all")


# Options and files


@pytest.mark.parametrize(
    "options, message",
    [
        ({"patch_size": 0}, "patch_size=0 must be 1 or more"),
        ({"units": 0}, "units=0 must be 1 or more"),
        ({"steps": 0}, "steps=0 must be 1 or more"),
        ({"activation": 0.0}, "activation=0.0 must be above 0"),
        ({"activation": float("inf")}, "activation=inf"),
        ({"step_size": 0.001}, "step_size=0.001 is for pixels of 8 bits"),
        ({"step_size": 1.1}, "step_size=1.1"),
        ({"step_size": float("nan")}, "step_size=nan"),
    ],
)
@pytest.mark.parametrize("attack", [TrojOne, TrojAll])
def test_wrong_options_are_refused(attack, options, message):
    with pytest.raises(ValueError, match=message):
        attack(**options)


@pytest.mark.parametrize("name", ["troj_one", "troj_all"])
def test_a_saved_attack_loads_to_the_same_trigger(name, tmp_path):
    attack = learned(make_attack(name, patch_size=4, seed=5))
    assert_loads_as_saved(attack, tmp_path, image_of((8, 8, 1)))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"pattern": np.zeros((4, 4, 1), np.uint8)}, r"needs \{'pattern': 'uint8 \(3, 3, 1\)'"),
        ({"pattern": np.zeros((3, 3, 1), np.float32)}, r"needs \{'pattern': 'uint8 \(3, 3, 1\)'"),
        ({"more": np.zeros(1)}, r"needs \{'pattern': 'uint8 \(3, 3, 1\)'"),
        ({"size": np.array([8, 8, 3])}, r"needs \{'pattern': 'uint8 \(3, 3, 3\)'"),
        ({"size": np.array([2, 8, 1])}, "patch_size=3 does not fit an image of 2×8 pixels"),
        ({"size": np.array([8, 8, 2])}, "impossible size"),
        ({"size": np.array([8, 8])}, "has no size"),
    ],
)
def test_changed_files_are_refused(change, message, tmp_path):
    assert_refused_when_changed(learned(), tmp_path, lambda tensors: tensors.update(change), message)
