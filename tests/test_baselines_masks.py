"""The methods that learn masks: each formula by hand, the received model untouched until the end, resume, refusals."""

import shutil
from functools import partial

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.nn.functional import cross_entropy
from trainer_cases import QUIET, Images, PlainNet, Recorder, identical, logged, resnet, vit, weights
from transformers import TrainerCallback

from hf_fip.baselines import method
from hf_fip.baselines.base import KEPT_NAME
from hf_fip.baselines.masks import channel_scales, prune
from hf_fip.checkpoint import CHECKSUMS_NAME, last_complete_checkpoint

SHORT = {"max_steps": 4, "per_device_train_batch_size": 8, "logging_steps": 1, **QUIET}
METHODS = ["anp", "rnp", "awm"]
MODELS = {"resnet": resnet, "vit": partial(vit, 0.2), "plain": PlainNet}


def trainer_of(name, folder, model, train_dataset=None, train_transform=None, callbacks=None, **options):
    Trainer, Config = method(name)
    args = Config(str(folder), **{**SHORT, **options})
    dataset = Images() if train_dataset is None else train_dataset
    return Trainer(model, args, train_dataset=dataset, train_transform=train_transform, callbacks=callbacks)


def batch(count=8):
    images = Images(count)
    return {"pixel_values": images.pixels, "labels": images.labels}


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


# ---- ANP ----


def by_hand(net, pixels, labels, scale, shift):
    """The loss of PlainNet in train mode with another scale and shift of its BatchNorm."""
    hidden = net.conv(pixels)
    hidden = (hidden - hidden.mean((0, 2, 3), keepdim=True)) / (
        hidden.var((0, 2, 3), keepdim=True, unbiased=False) + net.norm.eps
    ).sqrt()
    hidden = (hidden * scale[:, None, None] + shift[:, None, None]).relu()
    return cross_entropy(net.head(hidden.flatten(1)), labels)


def anp_of(folder, model=None, **options):
    model = PlainNet() if model is None else model
    nn.init.normal_(model.norm.weight)
    nn.init.normal_(model.norm.bias)
    trainer = trainer_of("anp", folder, model, **options)
    trainer.begin()
    trainer.create_optimizer()
    with torch.no_grad():
        trainer.masks["norm.weight"].uniform_(0.3, 1.0)
    return trainer, model.train()


@pytest.mark.parametrize("steps", [1, 3])
def test_anp_perturbs_by_sign_steps_up_the_loss_within_its_bound(steps, tmp_path):
    trainer, net = anp_of(tmp_path, anp_steps=steps, anp_epsilon=0.3)
    data, mask = batch(), trainer.masks["norm.weight"].detach()
    state = torch.get_rng_state()
    delta, xi = trainer._perturbation(data)
    torch.set_rng_state(state)
    draws = [torch.empty(4).uniform_(-0.3, 0.3).requires_grad_() for _ in range(2)]
    for _ in range(steps):
        scale, shift = net.norm.weight.detach() * (mask + draws[0]), net.norm.bias.detach() * (1 + draws[1])
        slopes = torch.autograd.grad(by_hand(net, **rename(data), scale=scale, shift=shift), draws)
        draws = [
            (draw + 0.3 / steps * slope.sign()).clamp(-0.3, 0.3).detach().requires_grad_()
            for draw, slope in zip(draws, slopes, strict=True)
        ]
    assert torch.equal(delta["norm.weight"], draws[0]) and torch.equal(xi["norm.bias"], draws[1])
    assert max(delta["norm.weight"].abs().max(), xi["norm.bias"].abs().max()) == pytest.approx(0.3)


def rename(data):
    return {"pixels": data["pixel_values"], "labels": data["labels"]}


def test_anp_mixes_the_losses_with_and_without_perturbation(tmp_path):
    trainer, net = anp_of(tmp_path, anp_alpha=0.3)
    data, mask = batch(), trainer.masks["norm.weight"]
    state = torch.get_rng_state()
    found = trainer.masked_loss(data)
    torch.set_rng_state(state)
    delta, xi = trainer._perturbation(data)
    scale, shift = net.norm.weight.detach(), net.norm.bias.detach()
    natural = by_hand(net, **rename(data), scale=scale * mask, shift=shift)
    robust = by_hand(
        net, **rename(data), scale=scale * (mask + delta["norm.weight"]), shift=shift * (1 + xi["norm.bias"])
    )
    expected = 0.3 * natural + 0.7 * robust
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert robust > natural
    gradients = [torch.autograd.grad(loss, mask)[0] for loss in (found, expected)]
    assert torch.allclose(*gradients, atol=1e-6)


def test_anp_prunes_at_its_threshold(tmp_path):
    trainer, net = anp_of(tmp_path, pruning_threshold=0.5)
    expected = weights(net)
    expected["norm.weight"][trainer.masks["norm.weight"] <= 0.5] = 0.0
    trainer.finish()
    assert identical(weights(net), expected)
    assert trainer.pruned_channels == (trainer.masks["norm.weight"] <= 0.5).sum()


def test_anp_has_the_defaults_of_the_paper(tmp_path):
    args = method("anp")[1](str(tmp_path), **QUIET)
    assert (args.anp_epsilon, args.anp_steps, args.anp_alpha, args.pruning_threshold) == (0.4, 1, 0.2, 0.2)
    assert (args.learning_rate, args.optim, args.optim_args) == (0.2, "sgd", "momentum=0.9")
    assert (args.max_steps, args.per_device_train_batch_size, args.lr_scheduler_type) == (2000, 128, "constant")


@pytest.mark.parametrize("options", [{"anp_epsilon": 0}, {"anp_steps": 0}, {"anp_alpha": 1.1}])
def test_anp_refuses_numbers_out_of_range(options, tmp_path):
    with pytest.raises(ValueError, match=next(iter(options))):
        method("anp")[1](str(tmp_path), **QUIET, **options)


# ---- RNP ----


def rnp_of(folder, model=None, **options):
    return trainer_of("rnp", folder, PlainNet() if model is None else model, **options)


def test_rnp_unlearns_by_sgd_up_the_loss_and_leaves_the_model(tmp_path):
    model = PlainNet()
    before = weights(model)
    trainer = rnp_of(tmp_path, model, unlearning_epochs=3, unlearning_accuracy=0.0, unlearning_learning_rate=0.1)
    trainer.train_dataset = [Images(8)[row] for row in range(8)]  # one batch an epoch
    found = trainer.unlearn()
    assert identical(weights(model), before)
    copy, data = PlainNet().train(), batch()
    optimizer = torch.optim.SGD(copy.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for _ in range(3):
        optimizer.zero_grad()
        (-copy(**data)["loss"]).backward()
        optimizer.step()
    for name, parameter in copy.named_parameters():
        assert torch.allclose(found[name], parameter, atol=1e-5), name
    assert copy(**data)["loss"] > model.train()(**data)["loss"]


def test_rnp_stops_unlearning_at_its_accuracy(tmp_path):
    recorder = Recorder()
    options = {"unlearning_epochs": 30, "unlearning_learning_rate": 0.05, "train_transform": recorder}
    trainer = rnp_of(tmp_path, unlearning_accuracy=0.25, **options)
    trainer.unlearn()
    assert trainer.unlearned_accuracy <= 0.25
    assert 3 <= len(recorder.batches) < 3 * 30
    recorder.batches.clear()
    trainer = rnp_of(tmp_path, unlearning_accuracy=0.0, **{**options, "unlearning_epochs": 2})
    trainer.unlearn()
    assert len(recorder.batches) == 3 * 2


def test_rnp_recovers_the_unlearned_model_by_masks_of_its_scales(tmp_path):
    trainer = rnp_of(tmp_path, recovering_alpha=0.3)
    trainer.begin()
    trainer.create_optimizer()
    trainer.model.train()
    with torch.no_grad():
        trainer.masks["norm.weight"].uniform_(0.3, 1.0)
    net, mask = PlainNet(), trainer.masks["norm.weight"]
    net.load_state_dict(weights(net) | {name: trainer.kept[f"unlearned.{name}"] for name, _ in net.named_parameters()})
    found = trainer.masked_loss(batch())
    expected = 0.3 * by_hand(
        net, **rename(batch()), scale=net.norm.weight.detach() * mask, shift=net.norm.bias.detach()
    )
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = [torch.autograd.grad(loss, mask)[0] for loss in (found, expected)]
    assert torch.allclose(*gradients, atol=1e-6)


def test_rnp_prunes_the_received_model_and_not_the_unlearned_one(tmp_path):
    model = PlainNet()
    expected = weights(model)
    trainer = rnp_of(tmp_path, model, max_steps=2, pruning_threshold=1.0)
    trainer.train()
    expected["norm.weight"] = torch.zeros(4)
    assert identical(weights(model), expected)
    assert trainer.pruned_channels == 4


def test_rnp_has_the_defaults_of_the_authors(tmp_path):
    args = method("rnp")[1](str(tmp_path), **QUIET)
    assert (args.unlearning_learning_rate, args.unlearning_epochs, args.unlearning_accuracy) == (0.01, 21, 0.2)
    assert (args.learning_rate, args.optim, args.optim_args) == (0.2, "sgd", "momentum=0.9")
    assert (args.recovering_alpha, args.num_train_epochs, args.per_device_train_batch_size) == (0.2, 20, 128)


@pytest.mark.parametrize("options", [{"unlearning_epochs": 0}, {"recovering_alpha": 0.0}, {"pruning_threshold": 2.0}])
def test_rnp_refuses_numbers_out_of_range(options, tmp_path):
    with pytest.raises(ValueError, match=next(iter(options))):
        method("rnp")[1](str(tmp_path), **QUIET, **options)


# ---- AWM ----


def awm_of(folder, model=None, **options):
    trainer = trainer_of("awm", folder, PlainNet() if model is None else model, **options)
    trainer.begin()
    trainer.create_optimizer()
    with torch.no_grad():
        for mask in trainer.masks.values():
            mask.uniform_(0.3, 1.0)
    return trainer


def test_awm_masks_each_weight_of_every_layer_but_the_classifier():
    make_masks = method("awm")[0].make_masks
    masks = make_masks(None, resnet())
    assert {name: mask.shape for name, mask in masks.items()} == {
        name: parameter.shape for name, parameter in resnet().named_parameters() if parameter.ndim == 4
    }
    names = {name for name, parameter in vit().named_parameters() if name.endswith(".weight") and parameter.ndim > 1}
    assert make_masks(None, vit()).keys() == names - {"classifier.weight"}
    with pytest.raises(ValueError, match="before its classifier"):
        make_masks(None, nn.Linear(3, 3))


def test_awm_bounds_its_perturbation_and_makes_it_on_the_masked_model(tmp_path):
    trainer = awm_of(tmp_path, trigger_size=0.05)
    trainer.begin_round(seed=1)
    assert trainer.kept["perturbation"].abs().mean().item() == pytest.approx(0.05, rel=1e-5)
    free = awm_of(tmp_path, trigger_size=1e6)
    free.begin_round(seed=1)
    first = free.kept["perturbation"]
    with torch.no_grad():
        for mask in free.masks.values():
            mask.zero_()
    free.begin_round(seed=1)
    assert first.abs().max() > 0 and (free.kept["perturbation"] == 0).all()  # a constant model has no trigger


def test_awm_mixes_the_losses_of_clean_and_perturbed_images_and_the_size_of_the_masks(tmp_path):
    trainer = awm_of(tmp_path, awm_alpha=0.7, awm_gamma=0.01)
    net, data, mask = trainer.model.train(), batch(), trainer.masks["conv.weight"]
    data["pixel_values"] = data["pixel_values"].sigmoid()
    trainer.kept["perturbation"] = torch.randn(1, 1, 8, 8)
    found = trainer.masked_loss(data)
    net.eval()

    def loss(pixels):
        hidden = nn.functional.conv2d(pixels, net.conv.weight.detach() * mask, net.conv.bias, stride=2)
        return cross_entropy(net.head(net.norm(hidden).relu().flatten(1)), data["labels"])

    pixels = data["pixel_values"]
    robust = loss((pixels + trainer.kept["perturbation"]).clamp(0, 1))
    expected = 0.7 * loss(pixels) + 0.3 * robust + 0.01 * mask.sum()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = [torch.autograd.grad(value, mask)[0] for value in (found, expected)]
    assert torch.allclose(*gradients, atol=1e-6)


def test_awm_multiplies_the_weights_by_their_masks(tmp_path):
    model = PlainNet()
    expected = weights(model)
    trainer = awm_of(tmp_path, model)
    expected["conv.weight"] = expected["conv.weight"] * trainer.masks["conv.weight"].detach()
    trainer.finish()
    assert identical(weights(model), expected)


def test_awm_makes_a_perturbation_each_round_of_some_epochs_from_so_many_passes(tmp_path):
    recorder = Recorder()
    options = {"max_steps": -1, "num_train_epochs": 4, "epochs_of_round": 2, "train_transform": recorder}
    trainer = trainer_of("awm", tmp_path, PlainNet(), **options)
    rounds, begin_round = [], trainer.begin_round
    trainer.begin_round = lambda seed: (begin_round(seed), rounds.append(trainer.state.global_step))
    trainer.train()
    assert rounds == [0, 6]
    assert len(recorder.batches) == 3 * (4 + 2 * 2)


def test_awm_has_the_defaults_of_the_authors(tmp_path):
    args = method("awm")[1](str(tmp_path), **QUIET)
    assert (args.awm_alpha, args.awm_gamma, args.epochs_of_round, args.num_train_epochs) == (0.9, 1e-8, 5, 100)
    assert (args.learning_rate, args.optim, args.weight_decay) == (0.01, "adamw_torch", 0.0)
    assert args.trigger_size * 3 * 32 * 32 == pytest.approx(1000, rel=1e-3)


@pytest.mark.parametrize("options", [{"awm_alpha": -0.1}, {"epochs_of_round": 0}, {"trigger_size": 0.0}])
def test_awm_refuses_numbers_out_of_range(options, tmp_path):
    with pytest.raises(ValueError, match=next(iter(options))):
        method("awm")[1](str(tmp_path), **QUIET, **options)
