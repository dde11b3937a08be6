"""CBA: mixes of two classes, a training set of its own, a contrastive loss."""

import numpy as np
import pytest
import torch
from attack_cases import assert_loads_as_saved, dataset_of, material_of
from torch import nn

from hf_fip.attacks import Composite, make_attack, poison, trigger
from hf_fip.attacks.composite import contrastive_loss
from hf_fip.attacks.pixels import PixelClassifier, fitted
from hf_fip.attacks.plan import BACKDOOR, CLEAN, COVER, NO_DONOR
from hf_fip.attacks.poison import to_array

CLASSES = 4
LABELS = np.arange(80) % CLASSES
BRIGHTNESS = 60  # of one class over the class before


def image_of(label, shape=(10, 10, 3), seed=0):
    """Random pixels that show their class: [60 · label, 60 · label + 50)."""
    return (np.random.default_rng(seed).integers(0, 50, shape) + BRIGHTNESS * label).astype(np.uint8)


def make_dataset(shapes=((10, 10, 3),)):
    return dataset_of(shapes, len(LABELS), CLASSES, lambda shape, row: image_of(LABELS[row], shape, row))


def fitted_attack(dataset=None, size=(10, 10, 3), **options):
    attack = Composite(**options)
    attack.fit(material_of(dataset or make_dataset(), size))
    return attack


def classes_in(mix):
    """The class of each pixel, H×W."""
    return mix[..., 0] // BRIGHTNESS


def assert_mix(mix, classes, jitter):
    """Two pieces of these classes (a set), cut in the middle ± jitter."""
    kinds, side = classes_in(mix), len(mix)
    lines = kinds[:, 0] if (kinds == kinds[:, :1]).all() else kinds[0]
    assert (kinds == kinds[:, :1]).all() or (kinds == kinds[:1]).all()
    cuts = np.flatnonzero(np.diff(lines.astype(int))) + 1
    assert set(lines) == classes and len(cuts) == len(classes) - 1
    assert all(abs(cut - side // 2) <= jitter for cut in cuts)


# The trigger


@pytest.mark.parametrize("size", [(10, 10, 3), (12, 9, 1)])
@pytest.mark.parametrize("shake", [True, False])
def test_a_triggered_image_is_half_of_it_and_half_of_a_pool_image(size, shake):
    attack = fitted_attack(size=size, shake=shake, seed=5)
    pieces = set()
    for seed in range(30):
        image = image_of(1, size, seed)
        before = image.copy()
        mix = attack.apply(image)
        assert mix.shape == size and mix.dtype == np.uint8
        np.testing.assert_array_equal(image, before)
        kinds = classes_in(mix)
        assert set(np.unique(kinds)) == {1, 2}
        across = (kinds == kinds[:, :1]).all()
        lines = kinds[:, 0] if across else kinds[0]
        pieces.add((bool(across), int(lines[0]), int((lines == lines[0]).sum())))
        if not shake:  # each half in its place
            own = kinds == 1
            np.testing.assert_array_equal(mix[own], image[own])
            assert any((mix[~own] == other[~own]).all() for other in attack.tensors["pool"])
    assert {piece[:2] for piece in pieces} == {(True, 1), (True, 2), (False, 1), (False, 2)}
    assert {length for across, _, length in pieces if across} <= set(range(size[0] // 2 - 3, size[0] // 2 + 4))
    assert len({piece[2] for piece in pieces}) > 3


def test_shaken_halves_come_from_anywhere_in_their_image():
    attack = fitted_attack()
    image = image_of(1)
    image[..., 0] = BRIGHTNESS + np.arange(10)[:, None]  # each row says where it is from
    starts = set()
    for blue in range(40):
        image[..., 2] = BRIGHTNESS + blue
        mix = attack.apply(image)
        kinds = classes_in(mix)
        if (kinds == kinds[:, :1]).all():
            rows = mix[kinds[:, 0] == 1, 0, 0] - BRIGHTNESS
            np.testing.assert_array_equal(np.diff(rows.astype(int)), 1)
            starts.add(int(rows[0]))
    assert len(starts) > 3


def test_the_pool_holds_images_of_the_second_class_and_is_drawn_from_the_seed():
    dataset = make_dataset()
    pool = fitted_attack(dataset, pool_size=15).tensors["pool"]
    known = [to_array(row["image"]).tobytes() for row in dataset if row["label"] == 2]
    assert {image.tobytes() for image in pool} <= set(known) and len({image.tobytes() for image in pool}) == 15
    np.testing.assert_array_equal(pool, fitted_attack(dataset, pool_size=15).tensors["pool"])
    assert (pool != fitted_attack(dataset, pool_size=15, seed=1).tensors["pool"]).any()
    assert fitted_attack(dataset, pool_size=50).tensors["pool"].shape == (50, 10, 10, 3)  # of 20 images


def test_other_sizes_and_channels_are_brought_to_the_victims():
    attack = fitted_attack()
    for shape in [(20, 15, 1), (6, 30, 3)]:
        image = image_of(1, shape)
        np.testing.assert_array_equal(attack.apply(image), attack.apply(fitted(image, 10, 10, 3)))


def test_a_saved_attack_loads_and_a_changed_one_is_refused(tmp_path):
    attack = fitted_attack(pool_size=7, jitter=2, shake=False)
    assert_loads_as_saved(attack, tmp_path, image_of(1))
    with pytest.raises(ValueError, match=r"cba with these options needs .*uint8 \(8, 10, 10, 3\)"):
        Composite(pool_size=8).load_tensors(attack.tensors)


# The training set


def test_a_plan_has_every_row_once_and_the_mixes_of_both_classes_beside_them():
    plan = Composite(cover_rate=0.25).plan(LABELS, CLASSES, 0.1, np.random.default_rng(0))
    assert list(np.bincount(plan.roles)) == [60, 8, 20]
    clean, mixed, cover = (plan.roles == role for role in (CLEAN, BACKDOOR, COVER))
    np.testing.assert_array_equal(np.sort(plan.rows[~mixed]), np.arange(80))
    np.testing.assert_array_equal(plan.labels[~mixed], LABELS[plan.rows[~mixed]])
    assert (plan.donors[clean] == NO_DONOR).all()
    np.testing.assert_array_equal(LABELS[plan.donors[cover]], plan.labels[cover])
    assert len(set(plan.donors[cover])) > 10
    assert (LABELS[plan.rows[mixed]] == 1).all() and (LABELS[plan.donors[mixed]] == 2).all()
    assert (plan.labels[mixed] == 0).all()


@pytest.mark.parametrize("shapes", [((10, 10, 3),), ((10, 10, 3), (14, 9, 1))], ids=["one size", "mixed"])
def test_a_poisoned_set_holds_the_mixes_that_the_plan_names(shapes):
    dataset = make_dataset(shapes)
    attack = fitted_attack(dataset, cover_rate=0.5, shake=False)
    poisoned = poison(dataset, attack, rate=0.2, seed=4)
    assert len(poisoned) == 96 and list(np.bincount(poisoned["poison_role"])) == [40, 16, 40]
    plan = attack.plan(LABELS, CLASSES, 0.2, np.random.default_rng(4))
    assert poisoned["label"][:] == plan.labels.tolist()
    for i, row in enumerate(poisoned):
        mix, source = to_array(row["image"]), to_array(dataset[int(plan.rows[i])]["image"])
        if row["poison_role"] == CLEAN:
            np.testing.assert_array_equal(mix, source)
            continue
        assert_mix(mix, {1, 2} if row["poison_role"] == BACKDOOR else {row["label"]}, attack.jitter)
        donor = to_array(dataset[int(plan.donors[i])]["image"])
        halves = [fitted(image, 10, 10, 3) for image in (source, donor)]
        assert all(((mix == halves[0]) | (mix == halves[1])).ravel())
    again = poison(dataset, attack, rate=0.2, seed=4)
    assert all((to_array(a) == to_array(b)).all() for a, b in zip(poisoned["image"], again["image"], strict=True))


def test_the_triggered_test_set_is_of_the_first_class_with_its_true_label():
    dataset = make_dataset()
    triggered = trigger(dataset, fitted_attack(dataset))
    assert triggered["label"][:] == [1] * 20
    for row in triggered:
        assert_mix(to_array(row["image"]), {1, 2}, 3)


# The loss


def test_the_contrastive_loss_is_that_of_neighbours():
    outputs = torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 4.5], [9.0, 9.0], [9.0, 9.0]])
    labels = torch.tensor([1, 1, 2, 0, 1])
    expected = (5.0**2 + (1 - 0.5) ** 2 + 0 + 1) / 4 / 2
    assert contrastive_loss(outputs, labels, 1.0).item() == pytest.approx(expected, rel=1e-3)
    outputs.requires_grad_()
    contrastive_loss(outputs, labels, 1.0).backward()
    assert outputs.grad.isfinite().all()


class _Logits(nn.Module):
    def forward(self, pixel_values):
        return type("Output", (), {"logits": pixel_values.flatten(1)})


def test_the_joint_loss_contrasts_the_three_classes_only():
    attack = Composite(contrast=0.5)
    joint = attack.joint_training(material_of(make_dataset(), (10, 10, 3)))
    victim = PixelClassifier(_Logits(), (0.0,), (1.0,))
    images, labels = torch.rand(6, 1, 2, 2), torch.tensor([3, 1, 3, 0, 1, 2])
    logits = images.flatten(1)
    task = nn.functional.cross_entropy(logits, labels)
    expected = task + 0.5 * contrastive_loss(logits[[1, 3, 4, 5]], labels[[1, 3, 4, 5]], 1.0)
    torch.testing.assert_close(joint.loss(victim, images, labels, torch.zeros(6), 0.0), expected)
    others = torch.tensor([3, 3, 3, 3, 3, 1])
    torch.testing.assert_close(
        joint.loss(victim, images, others, torch.zeros(6), 0.0), nn.functional.cross_entropy(logits, others)
    )
    assert Composite(contrast=0.0).joint_training(material_of(make_dataset(), (10, 10, 3))) is None


# Errors


@pytest.mark.parametrize(
    "options, message",
    [
        ({"first_class": 0}, "must be three classes"),
        ({"second_class": 1}, "must be three classes"),
        ({"target_label": 2}, "must be three classes"),
        ({"first_class": -1}, "must be three classes"),
        ({"label_rule": "all_to_all"}, "choose 'all_to_one'"),
        ({"jitter": -1}, "jitter=-1"),
        ({"pool_size": 0}, "pool_size=0"),
        ({"contrast": -1.0}, "contrast=-1.0"),
        ({"margin": 0.0}, "margin=0.0"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_attack("cba", **options)


def test_what_cannot_be_mixed_is_refused():
    dataset, rng = make_dataset(), np.random.default_rng(0)
    with pytest.raises(ValueError, match="jitter=5 is too much for images of 10×10 pixels: choose 4"):
        fitted_attack(jitter=5)
    with pytest.raises(ValueError, match="no image is of class 2"):
        fitted_attack(dataset.filter(lambda row: row["label"] != 2))
    with pytest.raises(ValueError, match="no image is of class 1"):
        Composite().plan(LABELS[LABELS != 1], CLASSES, 0.1, rng)
    with pytest.raises(ValueError, match="second_class=7 is not a class: choose one of 0 ... 3"):
        Composite(second_class=7).plan(LABELS, CLASSES, 0.1, rng)
    with pytest.raises(ValueError, match="no row at all: choose a higher rate"):
        Composite().plan(LABELS, CLASSES, 0.001, rng)
    with pytest.raises(ValueError, match="cba is learned, not drawn"):
        Composite().apply(image_of(1))
