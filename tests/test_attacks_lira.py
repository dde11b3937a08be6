"""LIRA: a noise of at most ε that a network learns with the victim, and then is frozen."""

from functools import partial

import numpy as np
import pytest
import torch
from attack_cases import (
    assert_loads_as_saved,
    assert_options_and_images_decide,
    assert_refused_when_changed,
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
from trainer_cases import identical
from transformers import TrainerCallback

from hf_fip.attacks import LIRA, make_attack, poison
from hf_fip.attacks.pixels import PixelClassifier, to_tensor
from hf_fip.attacks.plan import BACKDOOR
from hf_fip.attacks.poison import to_array

every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def drawn_attack(shape=(8, 8, 1), **options) -> LIRA:
    """With its network as it is before training."""
    attack = LIRA(**{"width": 4, **options})
    attack.keep(attack.new_networks(*shape), shape)
    return attack


# ---- The trigger ----


@every_shape
@pytest.mark.parametrize("epsilon", [0.01, 0.2])
def test_the_trigger_adds_the_noise_and_clips(shape, epsilon):
    attack, image = drawn_attack(shape, epsilon=epsilon), image_of(shape)
    image[:2], image[-2:] = 0, 255
    noise = attack.networks["noise"](to_tensor(image))[0].permute(1, 2, 0).numpy()
    assert noise.shape == shape and np.abs(noise).max() < 1
    found = attack.apply(image)
    np.testing.assert_allclose(found, np.clip(image + 255 * epsilon * noise, 0, 255), atol=0.5 + 1e-3, rtol=0)
    assert np.abs(found.astype(int) - image).max() <= np.ceil(255 * epsilon)
    if epsilon == 0.2:
        assert (found != image).any()


def test_the_noise_depends_on_the_image():
    attack = drawn_attack(epsilon=0.5)
    noises = [attack.networks["noise"](to_tensor(image_of((8, 8, 1), seed))) for seed in (1, 2)]
    assert (noises[0] - noises[1]).abs().max() > 0.01


def test_images_of_other_sizes_and_colours_are_brought_to_the_victims():
    assert_brings_images_to_the_size(drawn_attack((9, 13, 3)), (9, 13, 3))


def test_images_that_are_too_small_are_refused():
    with pytest.raises(ValueError, match="lira needs images of 8×8 pixels or more, not 7×9"):
        LIRA().joint_training(material_of((7, 9, 1)))


def test_the_network_is_drawn_from_the_seed_and_changes_no_global_random_state():
    assert_options_and_images_decide(partial(drawn_attack, epsilon=0.5), image_of((8, 8, 1)))


# ---- The training of the victim ----


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(64, CLASSES)

    def forward(self, pixel_values):
        return type("Output", (), {"logits": self.head(pixel_values.flatten(1))})


@pytest.mark.parametrize("label_rule", ["all_to_one", "all_to_all"])
@pytest.mark.parametrize("marked", [8, 3, 0])
@pytest.mark.parametrize("clean_weight", [0.5, 0.8])
def test_the_loss_weighs_all_images_and_the_triggered_copies_of_the_marked_ones(label_rule, marked, clean_weight):
    attack, material = LIRA(width=4, label_rule=label_rule, epsilon=0.1, clean_weight=clean_weight), material_of()
    joint, model = attack.joint_training(material), Linear()
    victim = PixelClassifier(model, (0.5,), (0.5,))
    images, labels = material.pixels[:8].float() / 255, material.labels[:8]
    loss = joint.loss(victim, images, labels, BACKDOOR * (torch.arange(8) < marked), 0.0)
    expected = nn.functional.cross_entropy(victim(images), labels)
    if marked:
        wanted = labels[:marked] * 0 if label_rule == "all_to_one" else (labels[:marked] + 1) % CLASSES
        triggered = victim(attack.triggered(joint.modules, images[:marked]))
        poisoned = nn.functional.cross_entropy(triggered, wanted)
        expected = clean_weight * expected + (1 - clean_weight) * poisoned
    torch.testing.assert_close(loss, expected)
    loss.backward()
    learning = [weight.grad is not None for weight in joint.modules.parameters()]
    assert all(learning) if marked else not any(learning)


class Networks(TrainerCallback):
    """The network after each step."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append({name: weight.detach().clone() for name, weight in self.joint.modules.state_dict().items()})


@pytest.mark.parametrize(("share", "steps"), [(0.5, 3), (1.0, 6), (0.2, 2)])
def test_the_network_learns_for_a_share_of_the_training_and_is_then_frozen(share, steps, tmp_path):
    networks = Networks()
    attack = LIRA(width=4, generator_share=share, learning_rate=0.01)
    trainer = victim_trainer(tmp_path, attack, callbacks=[networks])
    networks.joint = trainer._joint
    trainer.train()
    changes = [not identical(one, other) for one, other in zip(networks.seen, networks.seen[1:], strict=False)]
    assert changes == [step < steps for step in range(1, 6)]
    assert all((attack.tensors[name] == weight.numpy()).all() for name, weight in networks.seen[-1].items())


def test_it_brings_down_the_loss_of_its_target(tmp_path):
    attack = LIRA(width=8, epsilon=0.2, learning_rate=0.003)
    trainer = victim_trainer(tmp_path, attack, max_steps=60, learning_rate=0.02)
    trainer.train()
    material = material_of()
    victim = material.as_classifier(trainer.model.eval())
    images = material.pixels[material.labels != 0].float() / 255
    with torch.no_grad():
        asr = (victim(attack.triggered(attack.networks, images)).argmax(1) == 0).float().mean()
        false_alarms = (victim(images).argmax(1) == 0).float().mean()
    assert asr > 0.9 and false_alarms < 0.3


@pytest.mark.parametrize("save_steps", [2, 3, 4], ids=["learning", "frozen", "end of an epoch"])
def test_a_killed_and_resumed_run_ends_with_the_same_victim_and_trigger(save_steps, tmp_path):
    assert_a_killed_run_resumes_to_the_same(lambda: LIRA(width=4), tmp_path, save_steps)


# ---- Poisoned sets ----


@pytest.mark.parametrize(("rate", "rows"), [(1.0, 32), (0.25, 8)])
def test_poison_marks_images_of_every_class_and_changes_none(rate, rows):
    images = images_of()
    marked = poison(images, LIRA(), rate=rate, seed=0)
    assert marked["label"][:] == images["label"][:]
    for old, new in zip(images, marked, strict=True):
        np.testing.assert_array_equal(to_array(old["image"]), to_array(new["image"]))
    roles = np.array(marked["poison_role"])
    assert np.bincount(roles, minlength=3).tolist() == [32 - rows, rows, 0]
    assert set(np.array(images["label"])[roles == BACKDOOR]) == {0, 1, 2}
    with pytest.raises(ValueError, match="target_label=3 is not a class"):
        poison(images, LIRA(target_label=3), rate=rate, seed=0)


# ---- Options and folder ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": 0.001}, "epsilon=0.001 has to move a pixel of 8 bits"),
        ({"epsilon": 1.5}, "epsilon=1.5"),
        ({"clean_weight": 1.0}, "clean_weight=1.0 is a share of the loss"),
        ({"generator_share": 0.0}, "generator_share=0.0 is a share of all steps"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be above 0"),
        ({"width": 1000}, "width=1000"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_attack("lira", **options)


@every_shape
def test_a_saved_attack_loads_to_the_same_trigger(shape, tmp_path):
    attack = drawn_attack(shape, epsilon=0.3, seed=5)
    assert_loads_as_saved(attack, tmp_path, *(image_of(shape, seed) for seed in range(3)))


def test_other_tensors_make_another_trigger():
    attack, other = drawn_attack(epsilon=0.5), drawn_attack(epsilon=0.5, seed=1)
    before = attack.apply(image_of((8, 8, 1)))
    attack.load_tensors(other.tensors)
    found = attack.apply(image_of((8, 8, 1)))
    np.testing.assert_array_equal(found, other.apply(image_of((8, 8, 1))))
    assert (found != before).any()


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop("size"),
        lambda tensors: tensors.update(size=np.array([4, 4, 1])),
        lambda tensors: tensors.update(size=np.array([16, 16, 1])),
        lambda tensors: tensors.update({"noise.0.1.weight": np.zeros(5, dtype=np.float32)}),
    ],
)
def test_a_changed_file_of_tensors_is_refused(change, tmp_path):
    assert_refused_when_changed(drawn_attack(), tmp_path, change, "lira")
