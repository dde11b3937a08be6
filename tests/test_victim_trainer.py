"""The trainer of victims: the FIPTrainer, unless an attack takes part; then it trains both, and resumes both."""

import copy
import os
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from trainer_cases import QUIET, Images, Recorder, distance, identical, logged, resnet, trained, vit, weights
from transformers import TrainerCallback

from hf_fip import FIPConfig, FIPTrainer
from hf_fip.attacks import BadNets
from hf_fip.attacks.joint import JointTraining
from hf_fip.attacks.material import Material
from hf_fip.attacks.plan import BACKDOOR, CLEAN, COVER
from hf_fip.attacks.victim import JOINT_NAME, VictimTrainer
from hf_fip.checkpoint import last_complete_checkpoint
from hf_fip.scripts.images import ImageVictimConfig

SHORT = {"max_steps": 6, "per_device_train_batch_size": 4, "logging_steps": 1, "eta_f": 0.0, **QUIET}
PLAIN_SGD = {"optim": "sgd", "optim_args": "momentum=0", "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
MEAN, STD = 0.4, 0.5


class Unmarked(Images):
    """An epoch of six batches of four images, normalised."""

    def __init__(self, count: int = 24):
        super().__init__(count)
        self.pixels = ((self.pixels.sigmoid() * 255).round() / 255 - MEAN) / STD


class Marked(Unmarked):
    """The same, each with its role."""

    def __getitem__(self, row):
        return {**super().__getitem__(row), "roles": row % 3}


class FakeTraining(JointTraining):
    """Learns an offset; draws a noise for each epoch and one for each batch."""

    def __init__(self, attack, material):
        super().__init__(attack, material)
        self.modules["trigger"] = nn.ParameterDict({"offset": torch.zeros(1, 8, 8)})
        self.modules["epoch"] = nn.BatchNorm2d(1)  # whose buffer keeps the draw of the epoch
        self.optimizers["trigger"] = torch.optim.SGD(self.modules["trigger"].parameters(), lr=0.5, momentum=0.9)
        self.calls, self.draws, self.states = [], [], []

    def begin_epoch(self, victim):
        self.draws.append(torch.rand(self.attack.draws))
        self.modules["epoch"].running_mean.fill_(self.draws[-1][0])

    def loss(self, victim, images, labels, roles, progress):
        self.calls.append((images.detach(), labels, roles, progress))
        self.states.append((victim.model.training, torch.is_grad_enabled()))
        noise = self.modules["epoch"].running_mean * torch.rand_like(images)
        backdoor = roles == BACKDOOR
        shown = torch.where(backdoor.view(-1, 1, 1, 1), images + self.modules["trigger"]["offset"], images)
        wanted = torch.where(backdoor, self.attack_labels(labels), labels)
        return nn.functional.cross_entropy(victim(shown + self.attack.noise * noise), wanted)

    def finish(self):
        self.attack.tensors = {"offset": self.modules["trigger"]["offset"].detach().numpy().copy()}


@dataclass
class Fake(BadNets):
    triggers_in_training: ClassVar[bool] = True

    noise: float = 0.1
    draws: int = 1

    def joint_training(self, material):
        return FakeTraining(self, material)


def joint_trainer(folder, model=None, attack=None, train_dataset=None, **options) -> VictimTrainer:
    of_trainer = ("eval_dataset", "callbacks", "train_transform")
    given = {name: options.pop(name) for name in of_trainer if name in options}
    return VictimTrainer(
        model or resnet(),
        FIPConfig(str(folder), **{**SHORT, **options}),
        attack=attack or Fake(),
        material=Material(None, 3, (8, 8, 1), (MEAN,), (STD,)),
        train_dataset=train_dataset or Marked(),
        **given,
    )


def both(trainer) -> dict[str, torch.Tensor]:
    """What became of the victim and of the trigger."""
    trigger = {f"trigger {name}": torch.from_numpy(value) for name, value in trainer._joint.attack.tensors.items()}
    return {**weights(trainer.model), **trigger}


def both_trained(trainer) -> dict[str, torch.Tensor]:
    trainer.train()
    return both(trainer)


# ---- Without an attack that takes part ----


@pytest.mark.parametrize("attack", [None, BadNets()], ids=["none", "badnets"])
@pytest.mark.parametrize(
    "options",
    [{"gradient_accumulation_steps": 2}, {"eta_f": 0.05, "trace_interval": 2}, {"label_smoothing_factor": 0.1}],
    ids=["accumulation", "adapting", "smoothing"],
)
def test_without_an_attack_that_takes_part_it_is_the_fip_trainer(attack, options, tmp_path):
    args = FIPConfig(str(tmp_path), **{**SHORT, **options})
    expected = FIPTrainer(vit(0.2), copy.deepcopy(args), train_dataset=Unmarked())
    weights_expected = trained(expected)
    found = VictimTrainer(vit(0.2), args, attack=attack, train_dataset=Marked())
    assert identical(trained(found), weights_expected)
    assert logged(found, "loss") == logged(expected, "loss")


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_flat_victim_is_trained_from_the_gradient_at_the_perturbed_weights(accumulation, tmp_path):
    """And an attacker who adapts to FIP as well has the trace of the weights as they are."""

    def change(**options) -> dict[str, torch.Tensor]:
        batch = {"per_device_train_batch_size": 24 // accumulation, "gradient_accumulation_steps": accumulation}
        args = ImageVictimConfig(
            str(tmp_path), **{**SHORT, **PLAIN_SGD, **batch, "max_steps": 1, "learning_rate": 0.1, **options}
        )
        before, after = weights(vit()), trained(VictimTrainer(vit(), args, train_dataset=Marked()))
        return {name: after[name] - before[name] for name in before}

    plain, flat, adapted, both_of = (
        change(**options) for options in ({}, {"rho": 0.5}, {"eta_f": 0.1}, {"rho": 0.5, "eta_f": 0.1})
    )
    assert distance(plain, flat) > 1e-3 and distance(plain, adapted) > 1e-3
    expected = {name: flat[name] + adapted[name] - plain[name] for name in plain}
    assert distance(both_of, expected) < 1e-6


@pytest.mark.parametrize("rho", [-0.1, float("inf")])
def test_an_ascent_step_that_cannot_be_made_is_refused(rho, tmp_path):
    with pytest.raises(ValueError, match="rho="):
        ImageVictimConfig(str(tmp_path), rho=rho)


# ---- One that does ----


def test_the_attack_is_given_images_labels_roles_and_progress(tmp_path):
    recorder = Recorder()
    trainer = joint_trainer(tmp_path, train_transform=recorder)
    trainer.train()
    calls, data = trainer._joint.calls, Unmarked()
    assert [progress for *_, progress in calls] == [step / 6 for step in range(6)]
    for (images, labels, roles, _), batch in zip(calls, recorder.batches, strict=True):
        rows = [(data.pixels == pixels).flatten(1).all(1).nonzero().item() for pixels in batch["pixel_values"]]
        torch.testing.assert_close(images, data.pixels[rows] * STD + MEAN, atol=1e-6, rtol=0)
        assert torch.equal(labels, data.labels[rows])
        assert roles.tolist() == [(CLEAN, BACKDOOR, COVER)[row % 3] for row in rows]


def test_one_step_follows_the_gradient_of_the_loss_that_the_attack_gives(tmp_path):
    trainer = joint_trainer(tmp_path, vit(), Fake(noise=0.0), **PLAIN_SGD, learning_rate=0.1, max_steps=1)
    trainer.train()
    model, joint = vit(), FakeTraining(Fake(noise=0.0), trainer._joint.material)
    joint.loss(joint.material.as_classifier(model), *trainer._joint.calls[0]).backward()
    for found, start in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found, start - 0.1 * start.grad, atol=1e-6, rtol=0)
    gradient = joint.modules["trigger"]["offset"].grad
    assert gradient.abs().max() > 1e-4
    np.testing.assert_allclose(trainer._joint.attack.tensors["offset"], -0.5 * gradient, atol=1e-6)


def test_accumulated_batches_make_the_step_of_one_large_batch(tmp_path):
    options = {"attack": Fake(noise=0.0), **PLAIN_SGD, "max_steps": 3}
    whole = both_trained(joint_trainer(tmp_path, vit(), **options, per_device_train_batch_size=8))
    parts = joint_trainer(tmp_path, vit(), **options, gradient_accumulation_steps=2)
    for name, found in both_trained(parts).items():
        torch.testing.assert_close(found, whole[name], atol=1e-5, rtol=0)
    assert len(parts._joint.calls) == 6
    assert whole["trigger offset"].abs().max() > 1e-3


def test_the_victim_is_trained_in_train_mode_and_evaluated_in_eval_mode_as_if_there_were_no_attack(tmp_path):
    plain = both_trained(joint_trainer(tmp_path, attack=Fake(noise=0.0)))
    options = {"eval_dataset": Marked(), "eval_strategy": "steps", "eval_steps": 2}
    trainer = joint_trainer(tmp_path, attack=Fake(noise=0.0), **options)
    assert identical(both_trained(trainer), plain)
    assert trainer._joint.states == [(True, True)] * 6
    data = Unmarked()
    logits = trainer.model.eval()(pixel_values=data.pixels).logits
    assert logged(trainer, "eval_loss")[-1] == pytest.approx(
        nn.functional.cross_entropy(logits, data.labels).item(), rel=1e-5
    )


def test_the_attack_works_in_full_precision_beside_a_victim_in_bf16(tmp_path):
    trainer = joint_trainer(tmp_path, vit(), bf16=True)
    trainer.train()
    assert trainer._joint.calls[0][0].dtype == torch.float32
    assert np.abs(trainer._joint.attack.tensors["offset"]).max() > 1e-3


class OneFault(TrainerCallback):
    """Spoils a gradient of the second of three updates; keeps victim and trigger after each."""

    def __init__(self, of: str, value: float):
        self.of, self.value, self.trainer, self.seen = of, value, None, []

    def attach(self, trainer) -> None:
        trigger, bias = trainer._joint.modules["trigger"]["offset"], trainer.model.classifier.bias
        spoiled = {"trigger": [trigger], "victim": [bias], "both": [trigger, bias]}[self.of]
        for parameter in spoiled:
            parameter.register_hook(lambda grad: grad * self.value if trainer.state.global_step == 1 else grad)
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        momentum = self.trainer._joint.optimizers["trigger"].state_dict()["state"][0]["momentum_buffer"]
        offset = self.trainer._joint.modules["trigger"]["offset"].detach()
        self.seen.append((weights(self.trainer.model), {"offset": offset.clone(), "momentum": momentum.clone()}))


@pytest.mark.parametrize("of", ["trigger", "victim", "both"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_gradient_costs_victim_and_trigger_one_update(of, value, tmp_path):
    fault = OneFault(of, value)
    trainer = joint_trainer(tmp_path, vit(), callbacks=[fault], max_steps=3)
    fault.attach(trainer)
    trainer.train()
    for first, second, third in zip(*fault.seen, strict=True):
        assert identical(first, second) and not identical(second, third)
        assert all(tensor.isfinite().all() for tensor in third.values())
    assert logged(trainer, "dropped_updates")[-1] == 1


# ---- Epochs ----


def test_each_epoch_begins_once_with_draws_of_its_own(tmp_path):
    def draws(seed: int) -> list[float]:
        trainer = joint_trainer(tmp_path, max_steps=13, seed=seed)
        trainer.train()
        return torch.cat(trainer._joint.draws).tolist()

    first = draws(1)
    assert len(first) == len(set(first)) == 3
    assert draws(1) == first and not set(draws(2)) & set(first)


def test_what_an_epoch_draws_at_its_beginning_shifts_no_other_draw(tmp_path):
    few, many = (both_trained(joint_trainer(tmp_path, vit(0.2), Fake(draws=draws))) for draws in (1, 100))
    assert identical(few, many)


# ---- Resumed ----


class Kill(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def jitter(batch: dict) -> dict:
    return {**batch, "pixel_values": batch["pixel_values"] + 0.1 * torch.randn_like(batch["pixel_values"])}


EVERY_THIRD = {"max_steps": 14, "save_strategy": "steps", "save_steps": 3}
ACCUMULATED = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 4}


@pytest.mark.parametrize(
    ("model", "options", "killed_at", "resumed_at"),
    [
        ("vit", EVERY_THIRD, 5, 3),
        ("resnet", EVERY_THIRD, 8, 6),  # the end of an epoch
        ("vit", EVERY_THIRD, 11, 9),
        ("resnet", {"num_train_epochs": 3, "max_steps": -1, "save_strategy": "epoch"}, 13, 12),
        ("resnet", ACCUMULATED, 2, 1),  # an epoch of two steps, of four batches and two
        ("vit", ACCUMULATED, 3, 2),
    ],
)
def test_a_killed_and_resumed_run_ends_with_the_same_victim_and_trigger(
    model, options, killed_at, resumed_at, tmp_path
):
    def make(folder, *callbacks):
        victim = {"vit": lambda: vit(0.2), "resnet": resnet}[model]()
        return joint_trainer(folder, victim, **options, train_transform=jitter, callbacks=list(callbacks))

    whole = make(tmp_path / "whole")
    expected = both_trained(whole)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "killed", Kill(killed_at)).train()
    assert last_complete_checkpoint(str(tmp_path / "killed")).endswith(f"-{resumed_at}")
    resumed = make(tmp_path / "killed")
    resumed.train(resume_from_checkpoint=True)
    assert identical(both(resumed), expected)
    assert logged(resumed, "loss") == logged(whole, "loss")


def test_a_finished_run_that_is_resumed_has_its_trigger(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 6}
    expected = both_trained(joint_trainer(tmp_path, **options))
    again = joint_trainer(tmp_path, **options)
    again.train(resume_from_checkpoint=True)
    assert identical(both(again), expected)


def test_the_best_model_comes_back_with_its_trigger(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "epoch_of_my_own", "greater_is_better": False}
    trainer = joint_trainer(tmp_path, eval_dataset=Unmarked(), **saving, **best)
    trainer.compute_metrics = lambda _: {"epoch_of_my_own": trainer.state.global_step}
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("-2")
    two_steps = joint_trainer(tmp_path / "two", callbacks=[StopAt(2)])
    assert identical(both(trainer), both_trained(two_steps))


class StopAt(Kill):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def test_a_checkpoint_whose_trigger_was_not_written_is_passed_over(tmp_path, monkeypatch):
    options = {"save_strategy": "steps", "save_steps": 3}
    joint_trainer(tmp_path, **options).train()
    save = torch.save

    def fail(value, path, *args, **kwargs):
        if os.path.basename(path) == JOINT_NAME:
            raise OSError("No space left on device")
        save(value, path, *args, **kwargs)

    again = joint_trainer(tmp_path, **options, seed=7)
    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert last_complete_checkpoint(str(tmp_path)).endswith("-3")


def test_a_checkpoint_made_without_the_attack_is_refused(tmp_path):
    options = {**SHORT, "save_strategy": "steps", "save_steps": 3}
    VictimTrainer(resnet(), FIPConfig(str(tmp_path), **options), train_dataset=Unmarked()).train()
    with pytest.raises(ValueError, match=f"has no {JOINT_NAME}: it was made without badnets.*Start anew"):
        joint_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


# ---- Refused ----


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("world_size", 2, "on one process and device: start it without a launcher"),
        ("n_gpu", 2, "on one process and device"),
        ("fp16", True, "without fp16: use bf16"),
        ("eta_f", 0.1, "with eta_f=0 and eta_r=0"),
        ("eta_r", 0.1, "with eta_f=0 and eta_r=0"),
        ("label_smoothing_factor", 0.1, "with label_smoothing_factor=0"),
    ],
)
def test_a_training_that_an_attack_cannot_take_part_in_is_refused(name, value, message, tmp_path, monkeypatch):
    monkeypatch.setattr(FIPConfig, name, property(lambda self: value, lambda self, _: None), raising=False)
    with pytest.raises(ValueError, match=f"badnets takes part in the training of its victim, which .* {message}"):
        joint_trainer(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_images_without_roles_are_refused(tmp_path):
    with pytest.raises(ValueError, match="badnets takes part .* a set made by `hf_fip.attacks.poison`"):
        joint_trainer(tmp_path, train_dataset=Unmarked()).train()
