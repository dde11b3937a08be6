"""Dynamic: masks first, then patterns with the victim; covers carry another image's; every image its own trigger."""

import numpy as np
import pytest
import torch
from attack_cases import (
    assert_loads_as_saved,
    assert_options_and_images_decide,
    assert_refused_when_changed,
    assert_triggered,
    image_of,
)
from generated_cases import (
    CLASSES,
    SHAPES,
    assert_a_killed_run_resumes_to_the_same,
    assert_brings_images_to_the_size,
    images_of,
    material_of,
    victim_trainer,
)
from torch import nn

from hf_fip.attacks import DynAll, DynOne, make_attack, poison, trigger
from hf_fip.attacks.dynamic import mask_of, pattern_of
from hf_fip.attacks.pixels import PixelClassifier, to_tensor
from hf_fip.attacks.plan import BACKDOOR, CLEAN, COVER
from hf_fip.attacks.poison import to_array

SMALL = {"width": 4, "mask_epochs": 1}
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def fitted_attack(shape=(8, 8, 1), name="dyn_one", **options):
    attack = make_attack(name, **{**SMALL, **options})
    attack.fit(material_of(shape))
    return attack


# ---- The trigger ----


@every_shape
def test_the_trigger_lays_the_pattern_over_the_image_where_the_mask_is(shape):
    attack, image = fitted_attack(shape), image_of(shape)
    before, pixels = image.copy(), to_tensor(image).double()
    pattern, mask = (make(attack.networks, to_tensor(image)).double() for make in (pattern_of, mask_of))
    assert pattern.shape == pixels.shape and mask.shape == (1, 1, *shape[:2])
    assert min(pattern.min(), mask.min()) >= 0 and max(pattern.max(), mask.max()) <= 1
    expected = (255 * (pixels + mask * (pattern - pixels)))[0].permute(1, 2, 0)
    found = attack.apply(image)
    np.testing.assert_allclose(found, expected, atol=0.5 + 1e-3, rtol=0)
    np.testing.assert_array_equal(image, before)
    assert (found != image).any()


@every_shape
def test_the_trigger_of_an_image_is_the_same_alone_and_in_a_batch_and_in_training(shape):
    attack, images = fitted_attack(shape), [image_of(shape, seed) for seed in range(6)]
    attack.networks.train()
    together = attack.triggered(attack.networks, torch.cat([to_tensor(image) for image in images]))
    for one, image in zip(together, images, strict=True):
        difference = (one.permute(1, 2, 0) * 255).round().numpy() - attack.apply(image)
        assert np.abs(difference).max() <= 1 and (difference != 0).mean() < 0.01  # rounded sums


def test_images_of_other_sizes_and_colours_are_brought_to_the_victims():
    assert_brings_images_to_the_size(fitted_attack((9, 13, 3)), (9, 13, 3))


@pytest.mark.parametrize("shape", [(7, 20, 1), (20, 7, 1)])
def test_images_that_are_too_small_are_refused(shape):
    with pytest.raises(ValueError, match=f"dyn_one needs images of 8×8 pixels or more, not {shape[0]}×{shape[1]}"):
        DynOne(**SMALL).fit(material_of(shape))


# ---- The masks ----


def distance(one, other):
    return (one - other).square().mean((1, 2, 3)).sqrt()


def test_masks_become_small_and_different():
    images = material_of().pixels.float() / 255
    drawn, trained = DynOne(width=8), DynOne(width=8, mask_epochs=60)
    drawn.keep(drawn.new_networks(8, 8, 1), (8, 8, 1))
    trained.fit(material_of())
    masks = mask_of(trained.networks, images)
    assert masks.mean() < 0.1 < 0.3 < mask_of(drawn.networks, images).mean()
    # A pixel of its own in each mask gives √(2/64).
    assert distance(masks, masks.roll(1, 0)).mean() > (2 / 64) ** 0.5 / 2


def test_a_lower_weight_of_the_size_makes_larger_masks():
    images = material_of().pixels.float() / 255
    heavy, light = (DynOne(width=8, mask_epochs=40, mask_weight=weight) for weight in (100.0, 2.0))
    sizes = []
    for attack in (heavy, light):
        attack.fit(material_of())
        sizes.append(mask_of(attack.networks, images).mean().item())
    assert sizes[1] > 2 * sizes[0]


def test_fit_is_decided_by_the_seed_and_changes_no_global_random_state():
    assert_options_and_images_decide(fitted_attack, image_of((8, 8, 1)))


# ---- The training of the victim ----


class Seen(nn.Module):
    """A victim that keeps what it is shown."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, CLASSES)

    def forward(self, pixel_values):
        self.shown = pixel_values.detach()
        return type("Output", (), {"logits": self.head(pixel_values.flatten(1))})


ROLE_LISTS = {
    "all": [CLEAN] * 4 + [BACKDOOR] * 3 + [COVER] * 2,
    "more covers": [CLEAN] * 2 + [BACKDOOR] + [COVER] * 5,
    "no backdoor": [CLEAN] * 4 + [COVER] * 2,
    "no cover": [CLEAN] * 4 + [BACKDOOR] * 2,
    "one image": [BACKDOOR],
}


@pytest.mark.parametrize("name", ["dyn_one", "dyn_all"])
@pytest.mark.parametrize("roles", ROLE_LISTS.values(), ids=ROLE_LISTS)
def test_so_many_images_carry_their_own_trigger_and_so_many_that_of_another(name, roles):
    attack, material = fitted_attack(name=name, mask_weight=2.0, mask_epochs=5), material_of()
    joint, model = attack.joint_training(material), Seen()
    images, labels = material.pixels[: len(roles)].float() / 255, material.labels[: len(roles)]
    torch.manual_seed(1)
    loss = joint.loss(PixelClassifier(model, (0.5,), (0.5,)), images, labels, torch.tensor(roles), 0.0)
    shown = model.shown * 0.5 + 0.5
    own = attack.triggered(attack.networks, images)
    is_clean = (shown - images).flatten(1).abs().amax(1) < 1e-5
    is_backdoor = (shown - own).flatten(1).abs().amax(1) < 1e-5
    assert not (is_clean & is_backdoor).any()
    assert is_clean.sum() == roles.count(CLEAN) and is_backdoor.sum() == roles.count(BACKDOOR)
    everyone = material.pixels.float() / 255
    patterns, masks = pattern_of(attack.networks, everyone), mask_of(attack.networks, everyone)
    for image, cover in zip(images[~is_clean & ~is_backdoor], shown[~is_clean & ~is_backdoor], strict=True):
        candidates = image + masks * (patterns - image)
        assert (candidates - cover).flatten(1).abs().amax(1).min() < 0.5 / 255 + 1e-5

    wanted = torch.where(is_backdoor, 0 if name == "dyn_one" else (labels + 1) % CLASSES, labels)
    cross_entropy = nn.functional.cross_entropy(model.head(model.shown.flatten(1)), wanted)
    if roles.count(BACKDOOR):
        assert loss > cross_entropy + 1e-3  # and the diversity
    else:
        torch.testing.assert_close(loss, cross_entropy)
    loss.backward()
    assert model.head.weight.grad.abs().max() > 0
    assert all(weight.grad is None for weight in joint.networks["mask"].parameters())
    assert any(weight.grad is not None for weight in joint.networks["pattern"].parameters())


def test_a_batch_of_clean_images_is_plain_cross_entropy():
    joint, model, material = fitted_attack().joint_training(material_of()), Seen(), material_of()
    images, labels = material.pixels[:4].float() / 255, material.labels[:4]
    loss = joint.loss(PixelClassifier(model, (0.5,), (0.5,)), images, labels, torch.zeros(4, dtype=torch.long), 0.5)
    expected = nn.functional.cross_entropy(model.head((images * 2 - 1).flatten(1)), labels)
    torch.testing.assert_close(loss, expected)


def test_the_diversity_keeps_the_patterns_of_different_images_apart(tmp_path):
    images, apart = material_of().pixels.float() / 255, []
    for diversity in (0.0, 10.0):
        attack = fitted_attack(diversity=diversity, width=8)
        victim_trainer(tmp_path, attack, rate=0.5, max_steps=20, learning_rate=0.01).train()
        patterns = pattern_of(attack.networks, images)
        apart.append(distance(patterns, patterns.roll(1, 0)).mean())
    assert apart[1] > 1.2 * apart[0]


@pytest.mark.parametrize("shape", [(8, 8, 1), (9, 13, 3)], ids=str)
def test_training_changes_the_pattern_network_and_not_the_mask(shape, tmp_path):
    attack = fitted_attack(shape)
    drawn = attack.tensors
    victim_trainer(tmp_path, attack, shape).train()
    assert attack.tensors.keys() == drawn.keys()
    changed = {name.split(".")[0] for name in drawn if (attack.tensors[name] != drawn[name]).any()}
    assert changed == {"pattern"}
    assert attack.apply(image_of(shape)).shape == shape


@pytest.mark.parametrize("save_steps", [3, 4], ids=["amid an epoch", "end of an epoch"])
def test_a_killed_and_resumed_run_ends_with_the_same_victim_and_trigger(save_steps, tmp_path):
    assert_a_killed_run_resumes_to_the_same(fitted_attack, tmp_path, save_steps)


def test_it_is_not_trained_without_its_masks():
    with pytest.raises(ValueError, match="The trigger of dyn_one is learned, not drawn: train it, by `fit`"):
        DynOne().joint_training(material_of())


# ---- Poisoned and triggered sets ----


@pytest.mark.parametrize(("name", "counted"), [("dyn_one", {1, 2}), ("dyn_all", {0, 1, 2})])
def test_poison_marks_rows_and_leaves_images_and_labels(name, counted):
    images = images_of()
    marked = poison(images, make_attack(name, **SMALL, cover_rate=0.25), rate=0.25, seed=0)
    assert marked["label"][:] == images["label"][:]
    for old, new in zip(images, marked, strict=True):
        np.testing.assert_array_equal(to_array(old["image"]), to_array(new["image"]))
    roles, labels = np.array(marked["poison_role"]), np.array(marked["label"])
    assert np.bincount(roles).tolist() == [16, 8, 8]
    assert set(labels[roles == BACKDOOR]) <= counted
    again = poison(images, make_attack(name, **SMALL, cover_rate=0.25), rate=0.25, seed=0)
    assert again["poison_role"][:] == marked["poison_role"][:]


def test_the_triggered_set_holds_the_triggers_of_the_rows_that_count():
    images = images_of()
    one, all_ = (trigger(images, fitted_attack(name=name)) for name in ("dyn_one", "dyn_all"))
    assert len(one) == sum(label != 0 for label in images["label"]) and len(all_) == len(images)
    assert_triggered(images, fitted_attack(name="dyn_all"), label=None)


# ---- Options and folder ----


def test_dyn_all_wants_the_next_class():
    assert DynAll().label_rule == "all_to_all" and DynOne().label_rule == "all_to_one"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "width=0 is a number of channels: choose it from 1 to 512"),
        ({"width": 10**9}, "width=1000000000"),
        ({"mask_epochs": 0}, "mask_epochs=0 must be 1 or more"),
        ({"mask_density": 1.5}, "mask_density=1.5"),
        ({"mask_weight": -1.0}, "mask_weight=-1.0 must be 0 or more"),
        ({"diversity": float("nan")}, "diversity=nan"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be above 0"),
        ({"cover_rate": 2.0}, "cover_rate=2.0"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_attack("dyn_all", **options)


@every_shape
def test_a_saved_attack_loads_to_the_same_trigger(shape, tmp_path):
    assert_loads_as_saved(fitted_attack(shape, seed=5), tmp_path, *(image_of(shape, seed) for seed in range(3)))


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop("size"),
        lambda tensors: tensors.update(size=np.array([8, 4, 1])),
        lambda tensors: tensors.update(size=np.array([16, 16, 1])),
        lambda tensors: tensors.update(size=np.array([8, 8, 3])),
        lambda tensors: tensors.update(more=np.zeros(3)),
        lambda tensors: tensors.pop("mask.0.0.weight"),
        lambda tensors: tensors.update({"mask.0.0.weight": tensors["mask.0.0.weight"].astype(np.float64)}),
    ],
)
def test_a_changed_file_of_tensors_is_refused(change, tmp_path):
    assert_refused_when_changed(fitted_attack(), tmp_path, change, "dyn_one")
