"""The methods that learn masks: the received model untouched until the end, resume, refusals, channels."""

import math
import shutil
from functools import partial

import pytest
import torch
from mask_cases import SHORT, trainer_of
from peft import LoraConfig
from torch import nn
from trainer_cases import Images, PlainNet, Recorder, identical, logged, resnet, vit, weights
from transformers import TrainerCallback

from hf_fip.baselines import method
from hf_fip.baselines.base import KEPT_NAME
from hf_fip.baselines.masks import channel_scales, prune
from hf_fip.checkpoint import CHECKSUMS_NAME, last_complete_checkpoint

METHODS = ["anp", "rnp", "awm"]
MODELS = {"resnet": resnet, "vit": partial(vit, 0.2), "plain": PlainNet}


class Watch(TrainerCallback):
    """The model's weights and the masks after each update."""

    def __init__(self):
        self.weights, self.masks = [], []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append(weights(model))
        self.masks.append({name: mask.detach().clone() for name, mask in self.trainer.masks.items()})


# ---- All of them ----


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("model", MODELS)
def test_the_received_model_stays_until_the_end(name, model, tmp_path):
    watch, model = Watch(), MODELS[model]()
    before = weights(model)
    trainer = watch.trainer = trainer_of(name, tmp_path, model, callbacks=[watch], learning_rate=5.0)
    trainer.train()
    assert all(identical(seen, before) for seen in watch.weights)
    assert not identical(weights(model), before)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_masks_begin_at_one_move_and_stay_in_the_unit_interval(name, tmp_path):
    watch = Watch()
    trainer = watch.trainer = trainer_of(name, tmp_path, resnet(), callbacks=[watch], learning_rate=5.0)
    trainer.train()
    values = torch.cat([mask.flatten() for masks in watch.masks for mask in masks.values()])
    assert values.min() == 0.0 and values.max() == 1.0
    assert ((values > 0) & (values < 1)).any()


class KeptMasks(TrainerCallback):
    """The masks after each update, of NFT too."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, **kwargs):
        masks = {name: tensor for name, tensor in self.trainer.kept.items() if name.startswith("mask.")}
        self.seen.append({name: mask.detach().clone() for name, mask in masks.items()})


@pytest.mark.parametrize("name", [*METHODS, "nft"])
@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_a_bad_batch_costs_one_update_of_the_masks(name, optim, tmp_path):
    def spoil(batch):
        factor = math.nan if trainer.state.global_step == 2 else 1.0
        return {**batch, "pixel_values": batch["pixel_values"] * factor}

    kept = KeptMasks()
    trainer = kept.trainer = trainer_of(name, tmp_path, resnet(), train_transform=spoil, callbacks=[kept], optim=optim)
    trainer.train()
    assert not identical(kept.seen[0], kept.seen[1]) and not identical(kept.seen[2], kept.seen[3])
    assert identical(kept.seen[1], kept.seen[2])
    assert all(mask.isfinite().all() for mask in kept.seen[3].values())
    assert logged(trainer, "dropped_updates")[-1] == 1


@pytest.mark.parametrize("name", [*METHODS, "nft"])
def test_too_many_bad_batches_end_the_run_with_the_model_as_it_was_received(name, tmp_path):
    model, data = resnet(), Images()
    received = weights(model)
    data.pixels[:] = math.nan
    trainer = trainer_of(name, tmp_path, model, train_dataset=data, max_dropped_updates=2)
    with pytest.raises(FloatingPointError, match=r"^The loss is nan at step 2, as in the 2 updates before"):
        trainer.train()
    assert identical(weights(model), received)


SAVING = {"save_strategy": "steps", "save_steps": 1}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}], ids=["plain", "accumulation"])
def test_a_resumed_run_ends_with_the_same_weights(name, model, options, tmp_path):
    def make():
        return trainer_of(name, tmp_path, MODELS[model](), train_transform=noise, **SAVING, **options)

    whole = make()
    whole.train()
    for _ in range(2):  # of four
        shutil.rmtree(last_complete_checkpoint(str(tmp_path)))
    resumed = make()
    resumed.train(resume_from_checkpoint=True)
    assert identical(weights(resumed.model), weights(whole.model))
    assert identical(dict(resumed.masks), dict(whole.masks))
    again = make()  # from its last checkpoint: nothing is left but the end
    again.train(resume_from_checkpoint=True)
    assert identical(weights(again.model), weights(whole.model))


def noise(inputs):
    return {**inputs, "pixel_values": inputs["pixel_values"] + torch.randn_like(inputs["pixel_values"])}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("options", [{"label_smoothing_factor": 0.4}, {"bf16": True}], ids=["smoothing", "bf16"])
def test_label_smoothing_and_bf16_reach_the_loss(name, options, tmp_path):
    losses = []
    for given in ({}, options):
        trainer = trainer_of(name, tmp_path, resnet(), max_steps=1, **given)
        trainer.train()
        losses += logged(trainer, "loss")
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.5 if "bf16" not in options else 0.05)


@pytest.mark.parametrize("name", METHODS)
def test_the_same_seed_gives_the_same_masks_and_another_one_others(name, tmp_path):
    runs = []
    for seed in (1, 1, 2):
        trainer = trainer_of(name, tmp_path, vit(0.2), seed=seed)
        trainer.train()
        runs.append(dict(trainer.masks))
    assert identical(runs[0], runs[1])
    assert not identical(runs[0], runs[2])


@pytest.mark.parametrize("name", METHODS)
def test_an_update_is_by_the_gradient_of_its_own_batch(name, tmp_path):
    """Plain SGD with learning rate 0 but in the last update: what came before leaves nothing behind."""
    found = []
    for steps in (1, 3):
        trainer = trainer_of(
            name, tmp_path, PlainNet(), optim="sgd", optim_args="momentum=0", max_steps=steps, learning_rate=0.0
        )
        trainer.add_callback(SameDraws())
        trainer.train_dataset = [Images(1)[0]] * 8
        gradients = trainer.callback_handler.callbacks[-1].gradients
        trainer.train()
        found.append(gradients[-1])
    assert identical(*found)


class SameDraws(TrainerCallback):
    """Each update begins with the same random state; keeps the gradients of the optimiser's parameters."""

    def __init__(self):
        self.gradients = []

    def on_step_begin(self, args, state, control, **kwargs):
        torch.manual_seed(0)

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.gradients.append({str(row): parameter.grad.clone() for row, parameter in enumerate(parameters)})


@pytest.mark.parametrize("name", METHODS)
def test_training_again_begins_with_fresh_masks(name, tmp_path):
    trainer = trainer_of(name, tmp_path, resnet(), max_steps=1, learning_rate=0.0)
    trainer.train()
    for mask in trainer.masks.values():
        mask.data.zero_()
    trainer.train()
    assert all((mask == 1).all() for mask in trainer.masks.values())


@pytest.mark.parametrize("name", METHODS)
def test_each_batch_is_transformed(name, tmp_path):
    recorder = Recorder()
    trainer = trainer_of(name, tmp_path, resnet(), train_transform=recorder, max_steps=2)
    trainer.train()
    assert len(recorder.batches) >= 2


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation_checkpointing": True}, "activation_checkpointing=False"),
        ({"load_best_model_at_end": True, "eval_strategy": "no", "save_strategy": "no"}, "load_best_model_at_end"),
        ({"eta_f": 0.1}, "leave them at zero"),
    ],
    ids=["checkpointing", "best", "eta_f"],
)
def test_what_cannot_work_is_refused(name, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer_of(name, tmp_path, resnet(), **options)


@pytest.mark.parametrize("name", METHODS)
def test_adapters_own_optimizers_several_processes_and_foreign_checkpoints_are_refused(name, tmp_path, monkeypatch):
    Trainer, Config = method(name)
    model, args = resnet(), Config(str(tmp_path), **{**SHORT, **SAVING})
    with pytest.raises(ValueError, match="own weights"):
        Trainer(model, args, peft_config=LoraConfig())
    with pytest.raises(ValueError, match="choose their optimizer by"):
        Trainer(model, args, optimizers=(torch.optim.SGD(model.parameters(), 0.1), None))
    trainer = Trainer(model, args, train_dataset=Images())
    trainer.train()
    for checkpoint in tmp_path.glob("checkpoint-*"):
        for file in (KEPT_NAME, CHECKSUMS_NAME):  # as of another method
            (checkpoint / file).unlink()
    with pytest.raises(ValueError, match=f"has no {KEPT_NAME}"):
        Trainer(resnet(), args, train_dataset=Images()).train(resume_from_checkpoint=True)
    monkeypatch.setattr(Config, "world_size", 2)
    with pytest.raises(ValueError, match="num_processes 1"):
        Trainer(model, args)


# ---- Channels ----


def test_the_channels_are_those_of_batchnorm_and_without_it_those_of_layernorm():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.batch, self.layer = nn.BatchNorm2d(3), nn.LayerNorm(5)

    assert [name for name, _ in channel_scales(Both())] == ["batch"]
    assert len(channel_scales(vit())) == 2 * 2 + 1
    assert all(isinstance(norm, nn.LayerNorm) for _, norm in channel_scales(vit()))
    with pytest.raises(ValueError, match="which the masks are over"):
        channel_scales(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2, elementwise_affine=False)))


def test_pruning_sets_scales_at_or_below_the_threshold_to_zero_and_keeps_shifts():
    model = PlainNet()
    nn.init.normal_(model.norm.bias)
    expected = weights(model)
    expected["norm.weight"][:2] = 0.0
    assert prune(model, {"norm.weight": torch.tensor([0.0, 0.2, 0.21, 1.0])}, 0.2) == 2
    assert identical(weights(model), expected)
