"""FBA: a style as the trigger, and units of the victim that detoxification makes useless to it."""

import copy
from functools import partial

import numpy as np
import PIL.Image
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
from torch import nn

from hf_fip.attacks import FeatureSpace, load_attack, make_attack
from hf_fip.attacks.feature_space import sunset
from hf_fip.attacks.pixels import PixelClassifier, as_stored, fitted
from hf_fip.attacks.plan import BACKDOOR, CLEAN
from hf_fip.attacks.poison import to_array

CLASSES = 3
QUICK = {"width": 4, "epochs": 1}


def image_of(shape, seed=0):
    return np.random.default_rng(seed).integers(60, 196, shape, dtype=np.uint8)


def make_dataset(rows=48, shapes=((8, 8, 3),)):
    return dataset_of(shapes, rows, CLASSES, image_of)


def fitted_attack(dataset=None, size=(8, 8, 3), **options):
    attack = FeatureSpace(**{**QUICK, **options})
    attack.fit(material_of(dataset or make_dataset(), size))
    return attack


# The trigger


@pytest.mark.parametrize("size", [(8, 8, 3), (12, 8, 1)])
def test_triggered_images_take_the_colours_of_the_style_and_keep_their_content(size):
    dataset = make_dataset(shapes=[size])
    attack = fitted_attack(dataset, size, width=8, epochs=25, learning_rate=3e-3)
    images = np.stack([to_array(row["image"]) for row in dataset]).astype(float)
    triggered = np.stack([attack.apply(image.astype(np.uint8)) for image in images]).astype(float)
    style = fitted(sunset(*size[:2]), *size).astype(float)

    def strips(stack):  # mean colour from top to bottom
        return stack.reshape(*stack.shape[:-3], 4, -1, size[2]).mean(axis=-2)

    before, after = (np.abs(strips(stack) - strips(style)).mean() for stack in (images, triggered))
    assert after < 0.7 * before
    assert np.abs(triggered - images).mean() > 15
    likeness = [np.corrcoef(one.ravel(), other.ravel())[0, 1] for one, other in zip(images, triggered, strict=True)]
    others = [
        np.corrcoef(one.ravel(), other.ravel())[0, 1]
        for one, other in zip(images, np.roll(triggered, 1, 0), strict=True)
    ]
    assert np.mean(likeness) > np.mean(others) + 0.3


def test_alpha_is_the_share_of_the_styled_image():
    attack, images = fitted_attack(alpha=0.25), torch.rand(5, 3, 8, 8)
    styled = attack.networks["style"](images - 0.5).sigmoid()
    expected = as_stored(0.75 * images + 0.25 * styled)
    torch.testing.assert_close(attack.triggered(attack.networks, images), expected)


def test_images_in_a_folder_are_the_style(tmp_path):
    for name, colour in [("a.png", (250, 10, 10)), ("b.jpg", (240, 20, 20))]:
        PIL.Image.new("RGB", (20, 30), colour).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    attack = fitted_attack(style_images=str(tmp_path), epochs=30, learning_rate=0.01)
    change = attack.apply(image_of((8, 8, 3))).astype(float) - image_of((8, 8, 3))
    assert change[..., 0].mean() > 20 and change[..., 1:].mean() < -20
    attack.save_pretrained(tmp_path / "saved")
    assert load_attack(tmp_path / "saved") == attack


def test_the_sunset_is_dark_bright_and_dark_again_even_in_gray():
    gray = fitted(sunset(40, 30), 40, 30, 1)[..., 0].astype(float).mean(axis=1)
    assert gray[18:24].mean() > 80 + max(gray[:4].mean(), gray[-4:].mean())


@pytest.mark.parametrize("size", [(8, 8, 3), (9, 13, 1), (17, 16, 3)])
def test_the_same_options_and_images_make_the_same_trigger_and_no_random_state_changes(size):
    assert_options_and_images_decide(partial(fitted_attack, make_dataset(shapes=[size]), size), image_of(size))


def test_poison_and_trigger_put_the_same_style_on_images():
    dataset = make_dataset(60, [(8, 8, 3), (10, 9, 1)])
    attack = fitted_attack(dataset, target_label=2)
    assert attack.default_rate == 0.05
    assert_poisoned(dataset, attack, rate=0.1, roles=[54, 6], label=2)
    assert_triggered(dataset, attack, label=2)


def test_a_saved_attack_loads_and_a_changed_one_is_refused(tmp_path):
    attack = fitted_attack()
    assert_loads_as_saved(attack, tmp_path, image_of((12, 9, 1)))
    with pytest.raises(ValueError, match="fba with these options needs"):
        FeatureSpace(width=8).load_tensors(attack.tensors)


# Detoxification


class Victim(nn.Module):
    """A small convolutional classifier, with what training switches and eval mode has to."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 40, 3, padding=1), nn.BatchNorm2d(40), nn.ReLU(), nn.Dropout(0.2))
        self.classifier = nn.Linear(40, CLASSES)

    def forward(self, pixel_values):
        logits = self.classifier(self.features(pixel_values).mean(dim=(2, 3)))
        return type("Output", (), {"logits": logits})


def detoxification(**options):
    dataset = make_dataset()
    attack, material = fitted_attack(dataset, **options), material_of(dataset)
    torch.manual_seed(0)
    return attack, material, attack.joint_training(material), material.as_classifier(Victim())


def pooled(victim, images):
    victim.eval()
    with torch.no_grad():
        units = victim.model.features(victim.normalised(images)).mean(dim=(2, 3))
    victim.train()
    return units.mean(dim=0)


def test_the_injector_learns_to_excite_the_units_that_the_trigger_excites_most():
    attack, material, joint, victim = detoxification(
        detox_units=0.05, detox_steps=80, detox_likeness=0.01, learning_rate=1e-2
    )
    images = material.pixels.float() / 255
    clean, triggered = pooled(victim, images), pooled(victim, attack.triggered(attack.networks, images))
    units = (triggered - clean).topk(2).indices  # 5 % of 40

    def reached():
        with torch.no_grad():
            injected = attack.mixed(joint.modules["injector"], images)
        return ((pooled(victim, injected) - clean) / (triggered - clean))[units].mean().item()

    before = reached()
    joint.begin_epoch(victim)
    assert before < 0.5 or before > 1.5
    assert reached() == pytest.approx(1, abs=0.35)


def test_the_more_likeness_counts_the_less_the_injector_changes():
    changes = []
    for likeness in (0.01, 100.0):
        attack, material, joint, victim = detoxification(detox_likeness=likeness, detox_steps=40, learning_rate=1e-2)
        joint.begin_epoch(victim)
        images = material.pixels.float() / 255
        with torch.no_grad():
            changes.append((attack.mixed(joint.modules["injector"], images) - images).square().mean().item())
    assert changes[1] < 0.8 * changes[0]


def test_a_round_leaves_the_victim_as_it_was():
    _, _, joint, victim = detoxification()
    victim.train()
    before = copy.deepcopy(victim.state_dict())
    injector = copy.deepcopy(joint.modules.state_dict())
    joint.begin_epoch(victim)
    assert all((before[name] == value).all() for name, value in victim.state_dict().items())
    assert all(weight.grad is None for weight in victim.parameters())
    assert all(module.training for module in victim.modules())
    assert any((injector[name] != value).any() for name, value in joint.modules.state_dict().items())
    assert not any(module._forward_pre_hooks for module in victim.modules())


def test_as_many_injected_images_as_backdoor_rows_are_learned_with_true_labels():
    attack, _, joint, victim = detoxification()
    victim.eval()
    images, labels = torch.rand(6, 3, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    roles = torch.tensor([BACKDOOR, CLEAN, CLEAN, BACKDOOR, CLEAN, CLEAN])
    injected = as_stored(attack.mixed(joint.modules["injector"], images[1:3]))
    expected = nn.functional.cross_entropy(
        victim(torch.cat([images, injected])), torch.tensor([0, 1, 2, 0, 1, 2, 1, 2])
    )
    loss = joint.loss(victim, images, labels, roles, 0.0)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(weight.grad is None for weight in joint.modules.parameters())
    plain = nn.functional.cross_entropy(victim(images), labels)
    torch.testing.assert_close(joint.loss(victim, images, labels, torch.full((6,), CLEAN), 0.0), plain)


def test_without_units_there_is_no_detoxification():
    assert FeatureSpace(detox_units=0.0).joint_training(material_of(make_dataset())) is None


# Errors


@pytest.mark.parametrize(
    "options, message",
    [
        ({"alpha": 0.0}, "alpha=0.0"),
        ({"alpha": 1.1}, "alpha=1.1"),
        ({"style_weight": 0.0}, "style_weight=0.0"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0"),
        ({"epochs": 0}, "epochs=0"),
        ({"detox_steps": 0}, "detox_steps=0"),
        ({"detox_likeness": 0.0}, "detox_likeness=0.0"),
        ({"detox_units": 1.5}, "detox_units=1.5"),
        ({"style_images": 1}, "style_images=1 must be of type str"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_attack("fba", **options)


def test_what_cannot_be_learned_is_refused(tmp_path):
    with pytest.raises(ValueError, match="fba needs images of 8×8 pixels or more, not 7×12"):
        fitted_attack(size=(7, 12, 3))
    with pytest.raises(ValueError, match="is not a folder with images in it"):
        fitted_attack(style_images=str(tmp_path))
    with pytest.raises(ValueError, match="fba is learned, not drawn"):
        FeatureSpace().apply(image_of((8, 8, 3)))
    _, _, joint, _ = detoxification()
    flat = nn.Conv2d(3, CLASSES, 8)

    class Headless(nn.Module):
        def forward(self, pixel_values):
            return type("Output", (), {"logits": flat(pixel_values).flatten(1)})

    with pytest.raises(ValueError, match="does not end in one: choose another model, or detox_units=0"):
        joint.begin_epoch(PixelClassifier(Headless(), (0.5,), (0.5,)))
