"""The baselines that train: each does what its paper's formula says, and resumes to the same weights."""

import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import nn
from torch.func import functional_call
from trainer_cases import (
    QUIET,
    Images,
    PlainNet,
    Recorder,
    Snapshots,
    distance,
    identical,
    logged,
    resnet,
    trained,
    vit,
    weights,
)
from transformers import SwinConfig, SwinForImageClassification

from hf_fip.baselines import method, nft
from hf_fip.baselines.base import KEPT_NAME, head_of
from hf_fip.baselines.nad import attention_map, outputs_of, stages_of
from hf_fip.checkpoint import CHECKSUMS_NAME, last_complete_checkpoint

METHODS = ["ft", "ft_sam", "nad", "fst", "nft"]
SHORT = {"max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1, **QUIET}
WHOLE = {"per_device_train_batch_size": 24, "max_steps": 1, "learning_rate": 0.1, "lr_scheduler_type": "constant"}
PLAIN_SGD = {"optim_args": "momentum=0"}
MODELS = {"vit": vit, "resnet": resnet}


def trainer_of(name, folder, model, **options):
    trainer_class, config_class = method(name)
    of_trainer = ("train_transform", "callbacks", "peft_config", "compute_loss_func", "train_dataset", "optimizers")
    given = {key: options.pop(key) for key in of_trainer if key in options}
    fields = {"teacher_epochs": 1.0} if name == "nad" else {}
    args = config_class(str(folder), **{**SHORT, **fields, **options})
    return trainer_class(model, args, **{"train_dataset": Images(), **given})


def task_gradients(model, batch, **loss):
    """The gradient of the mean cross-entropy, by parameter name, in train mode."""
    model.train()
    value = F.cross_entropy(model(batch["pixel_values"]).logits, batch["labels"], **loss)
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    return dict(zip(names, torch.autograd.grad(value, parameters), strict=True))


def whole_batch():
    data = Images()
    return {"pixel_values": data.pixels, "labels": data.labels}


def parameters_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


# ---- All of them ----


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("model", [lambda: vit(0.2), resnet], ids=["vit", "resnet"])
def test_a_resumed_run_ends_with_the_same_weights(name, model, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2}
    options["train_transform"] = lambda batch: {
        **batch,
        "pixel_values": batch["pixel_values"] + 0.1 * torch.randn_like(batch["pixel_values"]),
    }
    expected = trained(trainer_of(name, tmp_path, model(), **options))
    for _ in range(2):
        shutil.rmtree(last_complete_checkpoint(str(tmp_path)))
    resumed = trainer_of(name, tmp_path, model(), **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert identical(weights(resumed.model), expected)


@pytest.mark.parametrize("name", ["nad", "fst", "nft"])
def test_a_checkpoint_without_what_the_method_keeps_is_refused(name, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    trainer_of(name, tmp_path, vit(), **options).train()
    for file in (KEPT_NAME, CHECKSUMS_NAME):  # as of another method
        (tmp_path / "checkpoint-4" / file).unlink()
    with pytest.raises(ValueError, match="Start anew"):
        trainer_of(name, tmp_path, vit(), **options).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_second_run_repeats_the_first(name, model, tmp_path):
    first, second = (trained(trainer_of(name, tmp_path, model())) for _ in range(2))
    assert identical(first, second)
    assert not identical(first, weights(model()))


@pytest.mark.parametrize("name", METHODS)
def test_a_loss_scale_cancels(name, tmp_path):
    runs = []
    for scale in (None, 2.0**12):
        trainer = trainer_of(name, tmp_path, vit(0.1), gradient_accumulation_steps=2)
        if scale:  # what `fp16=True` gives it on an accelerator
            trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        runs.append(trained(trainer))
    assert trainer.accelerator.scaler.get_scale() == scale
    assert distance(*runs) < 1e-5


@pytest.mark.parametrize(
    ("name", "defaults"),
    [
        ("ft", {"learning_rate": 0.01, "weight_decay": 5e-4, "num_train_epochs": 100}),
        ("ft_sam", {"learning_rate": 0.01, "weight_decay": 5e-4, "rho": 2.0, "label_smoothing_factor": 0.1}),
        ("nad", {"learning_rate": 0.01, "weight_decay": 1e-4, "beta_low": 500, "beta_high": 1000}),
        ("fst", {"learning_rate": 0.01, "weight_decay": 0.0, "num_train_epochs": 10, "alpha": 0.2}),
        ("nft", {"learning_rate": 0.05, "optim_args": "momentum=0.95", "max_steps": 1000}),
    ],
)
def test_the_defaults_are_the_published_ones(name, defaults, tmp_path):
    args = method(name)[1](str(tmp_path))
    assert args.optim == "sgd" and args.max_grad_norm == 0 and args.eta_f == args.eta_r == 0
    assert args.optim_args == defaults.get("optim_args", "momentum=0.9")
    assert {field: getattr(args, field) for field in defaults} == defaults


def test_the_learning_rate_of_nft_falls_to_its_floor(tmp_path):
    trainer = trainer_of("nft", tmp_path, vit())
    trainer.train()
    rates = logged(trainer, "learning_rate")
    assert rates[0] == 0.05 and rates[2] == pytest.approx(0.035)
    assert trainer.lr_scheduler.get_last_lr() == [pytest.approx(0.02)]


@pytest.mark.parametrize("name", METHODS)
def test_an_adapter_is_refused_before_the_folder_is_made(name, tmp_path):
    with pytest.raises(ValueError, match="merge_and_unload"):
        trainer_of(name, tmp_path / "out", vit(), peft_config=LoraConfig(r=2, target_modules=["q_proj"]))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ft", {"eta_f": 0.5}, "eta_f"),
        ("ft_sam", {"rho": 0.0}, "rho"),
        ("nad", {"beta_low": -1.0}, "beta_low"),
        ("nad", {"attention_power": 0.0}, "attention_power"),
        ("nad", {"teacher_epochs": 0.0}, "teacher_epochs"),
        ("fst", {"alpha": math.inf}, "alpha"),
        ("nft", {"max_grad_norm": 1.0}, "max_grad_norm"),
        ("nft", {"mixup_alpha": 0.0}, "mixup_alpha"),
        ("nft", {"mask_regularizer": -1.0}, "mask_regularizer"),
        ("nft", {"floor_scale": 1.5}, "floor_scale"),
        ("nad", {"compute_loss_func": lambda *_, **__: None}, "compute_loss_func"),
        ("nft", {"compute_loss_func": lambda *_, **__: None}, "compute_loss_func"),
        ("nft", {"optimizers": (torch.optim.SGD([torch.zeros(1)], 0.1), None)}, "optimizers"),
    ],
)
def test_what_cannot_work_is_refused(name, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer_of(name, tmp_path, vit(), **options)


def frozen_head():
    model = vit()
    model.classifier.requires_grad_(False)
    return model


def frozen_norms():
    model = resnet()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("name", "model", "message"),
    [
        ("nad", PlainNet(), "ModuleList"),
        ("fst", nn.Conv2d(1, 3, 3), "end in an nn.Linear"),
        ("fst", frozen_head(), "unfreeze"),
        ("nft", nn.Conv2d(1, 3, 3), "end in an nn.Linear"),
        ("nft", frozen_norms(), "no trainable layer"),
    ],
    ids=["no stages", "no head", "frozen head", "no head to spare", "no neurons"],
)
def test_a_model_without_the_parts_of_a_method_is_refused(name, model, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer_of(name, tmp_path / "out", model)
    assert not (tmp_path / "out").exists()


def test_the_head_is_the_last_linear_layer_with_a_number_a_class():
    model = vit()
    assert head_of(model) is model.classifier
    model = resnet()
    assert head_of(model) is model.classifier[1]
    model.classifier = nn.Sequential(nn.Flatten(), nn.Linear(16, 5))
    with pytest.raises(ValueError, match="one number a class"):
        head_of(model)


# ---- Plain fine-tuning ----


def test_fine_tuning_is_sgd_whose_decay_takes_every_parameter(tmp_path):
    model = vit()
    start = parameters_of(model)
    slope = task_gradients(vit(), whole_batch())
    trainer_of("ft", tmp_path, model, **WHOLE, **PLAIN_SGD, weight_decay=0.01).train()
    expected = {name: start[name] - 0.1 * (slope[name] + 0.01 * start[name]) for name in start}
    assert distance(parameters_of(model), expected) < 1e-6


# ---- FT-SAM ----


@pytest.mark.parametrize("accumulation", [1, 2])
def test_ft_sam_follows_the_gradient_at_the_perturbed_weights(accumulation, tmp_path):
    model, batch, smoothing = vit(), whole_batch(), {"label_smoothing": 0.1}
    start = parameters_of(model)
    slope = task_gradients(model, batch, **smoothing)
    norm = torch.cat([(start[name] * slope[name]).flatten() for name in start]).norm()
    perturbed = vit()
    perturbed.load_state_dict({name: w + 0.5 * w**2 * slope[name] / norm for name, w in start.items()})
    slope = task_gradients(perturbed, batch, **smoothing)
    expected = {name: w - 0.1 * (slope[name] + 5e-4 * w) for name, w in start.items()}
    options = WHOLE | {"per_device_train_batch_size": 24 // accumulation, "gradient_accumulation_steps": accumulation}
    trainer = trainer_of("ft_sam", tmp_path, model, **options, **PLAIN_SGD, rho=0.5)
    trainer.train()
    assert distance(parameters_of(model), expected) < 1e-6
    loss = F.cross_entropy(perturbed(batch["pixel_values"]).logits, batch["labels"], **smoothing)
    assert logged(trainer, "perturbed_loss") == pytest.approx([loss.item()], rel=1e-5)
    assert logged(trainer, "task_loss")[0] < loss


def test_ft_sam_moves_the_statistics_of_batchnorm_once(tmp_path):
    runs = [trained(trainer_of(name, tmp_path, resnet(), **WHOLE)) for name in ("ft", "ft_sam")]
    moved = [name for name in runs[0] if "running" in name or "num_batches" in name]
    assert moved and all(torch.equal(runs[0][name], runs[1][name]) for name in moved)
    assert not identical(*runs)


def test_ft_sam_stops_at_a_loss_that_is_not_finite(tmp_path):
    with pytest.raises(FloatingPointError, match="lower rho"):
        trainer_of("ft_sam", tmp_path, vit(), rho=1e38).train()


# ---- NAD ----


def test_an_attention_map_is_the_summed_power_of_the_channels_at_norm_one():
    activation = torch.randn(2, 3, 4, 5)
    expected = torch.stack([sum(image[c].abs() ** 3 for c in range(3)).flatten() for image in activation])
    expected = F.normalize(expected)
    torch.testing.assert_close(attention_map(activation, 3.0), expected, atol=1e-5, rtol=0)
    tokens = activation.flatten(2).transpose(1, 2)  # (B, T, C)
    torch.testing.assert_close(attention_map(tokens, 3.0), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("depth", "ends"), [(1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (4, [1, 2, 3]), (12, [3, 7, 11])])
def test_the_stages_end_the_thirds_of_the_depth(depth, ends):
    model = vit(num_hidden_layers=depth)
    stack = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    assert len(stack) == depth
    assert [list(stack).index(stage) for stage in stages_of(model)] == ends


def swin():
    sizes = {"image_size": 8, "patch_size": 2, "num_channels": 1, "embed_dim": 8, "window_size": 2, "num_labels": 3}
    return SwinForImageClassification(SwinConfig(**sizes, depths=[1, 1], num_heads=[1, 2]))


@pytest.mark.parametrize("model", [vit, resnet, swin], ids=lambda model: model.__name__)
def test_the_output_of_a_stage_is_its_activation(model):
    model = model().eval()
    with outputs_of(stages_of(model)) as found:
        states = model(torch.randn(2, 1, 8, 8), output_hidden_states=True).hidden_states
    assert len(found) == 2
    assert all(output.ndim in (3, 4) and len(output) == 2 for output in found)
    if not isinstance(model, SwinForImageClassification):
        assert all(torch.equal(output, state) for output, state in zip(found, states[-2:], strict=True))


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_nad_pulls_the_attention_to_that_of_its_fine_tuned_copy(model, tmp_path):
    options = WHOLE | {"weight_decay": 1e-4}
    teacher = trainer_of("ft", tmp_path, model(), **options | {"max_steps": -1, "num_train_epochs": 2.0})
    teacher.train()
    student, batch = model(), whole_batch()
    trainer = trainer_of("nad", tmp_path, student, **options, teacher_epochs=2.0)
    start = parameters_of(student)
    trainer.train()
    assert distance(trainer.kept, weights(teacher.model)) < 1e-5

    expected = model().train()
    copy = model().eval()
    copy.load_state_dict(trainer.kept)
    with torch.no_grad(), outputs_of(stages_of(copy)) as wanted:
        copy(batch["pixel_values"])
    with outputs_of(stages_of(expected)) as found:
        task = F.cross_entropy(expected(batch["pixel_values"]).logits, batch["labels"])
    pairs = zip(found, wanted, strict=True)
    low, high = (F.mse_loss(attention_map(s, 2), attention_map(t, 2)) for s, t in pairs)
    total = 1000 * low + 1000 * high  # of two stages: the middle and the high one
    parameters = [p for _, p in expected.named_parameters()]
    slopes = torch.autograd.grad(task + total, parameters)
    wanted = {n: start[n] - 0.1 * (g + 1e-4 * start[n]) for n, g in zip(start, slopes, strict=True)}
    assert total > 1e-4
    assert logged(trainer, "attention_distance") == pytest.approx([total.item()], rel=1e-3)
    assert distance(parameters_of(student), wanted) < 1e-5


def test_the_teacher_of_nad_stays_as_it_was_fine_tuned(tmp_path):
    trainer = trainer_of("nad", tmp_path, resnet())
    trainer.train()
    assert identical(weights(trainer._teacher), trainer.kept)
    assert not any(parameter.requires_grad for parameter in trainer._teacher.parameters())
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())


# ---- FST ----


def test_fst_draws_a_new_head_and_pushes_it_from_the_received_one(tmp_path):
    model, batch = vit(), whole_batch()
    received = parameters_of(model)
    trainer = trainer_of("fst", tmp_path, model, **WHOLE, **PLAIN_SGD, alpha=0.3)
    trainer.begin()
    start = parameters_of(model)
    drawn = {name for name in start if not torch.equal(start[name], received[name])}
    assert drawn == {"classifier.weight", "classifier.bias"}
    assert all(start[name].abs().max() <= 1 / math.sqrt(16) for name in drawn)

    slope = task_gradients(model, batch)
    expected = {name: start[name] - 0.1 * slope[name] for name in start}
    head = expected["classifier.weight"] - 0.1 * 0.3 * received["classifier.weight"]
    expected["classifier.weight"] = head * received["classifier.weight"].norm() / head.norm()
    other = vit()
    trainer = trainer_of("fst", tmp_path, other, **WHOLE, **PLAIN_SGD, alpha=0.3)
    trainer.train()
    assert distance(parameters_of(other), expected) < 1e-6
    shift = 0.3 * (start["classifier.weight"] * received["classifier.weight"]).sum()
    assert logged(trainer, "feature_shift") == pytest.approx([shift.item()], rel=1e-5)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_fst_keeps_the_norm_of_the_head(model, tmp_path):
    snapshots, model = Snapshots(), model()
    name = next(name for name, p in model.named_parameters() if p is head_of(model).weight)
    norm = head_of(model).weight.norm().item()
    trainer_of("fst", tmp_path, model, callbacks=[snapshots]).train()
    assert len(snapshots.weights) == 4
    for state in snapshots.weights:
        assert state[name].norm().item() == pytest.approx(norm, rel=1e-5)


def test_accumulation_does_not_change_the_shift_of_fst(tmp_path):
    runs = []
    for accumulation in (1, 4):
        sizes = {"per_device_train_batch_size": 24 // accumulation, "gradient_accumulation_steps": accumulation}
        runs.append(trained(trainer_of("fst", tmp_path, vit(), **WHOLE | sizes, alpha=5.0)))
    assert distance(*runs) < 1e-5


# ---- NFT ----


class Share:
    """Always 0.3."""

    def __init__(self, *_):
        pass

    def sample(self):
        return torch.tensor(0.3)


@pytest.mark.parametrize(
    ("model", "neurons"),
    [
        (vit, lambda n, m: isinstance(m, (nn.Linear, nn.Conv2d)) and n != "classifier"),
        (resnet, lambda n, m: isinstance(m, nn.BatchNorm2d)),
    ],
    ids=["vit", "resnet"],
)
def test_nft_descends_on_masks_that_multiply_the_received_rows(model, neurons, tmp_path, monkeypatch):
    monkeypatch.setattr(nft, "Beta", Share)
    monkeypatch.setattr(torch, "randperm", lambda count, **_: torch.arange(count).roll(1))
    recorder, found = Recorder(), model()
    options = WHOLE | {"max_steps": 2, "learning_rate": 0.5}
    options |= {"train_transform": recorder, "mask_regularizer": 0.08}
    trainer_of("nft", tmp_path, found, **options, **PLAIN_SGD).train()

    by_hand = model().train()
    received = parameters_of(by_hand)
    masked = [f"{n}.weight" for n, m in by_hand.named_modules() if neurons(n, m)]
    masks = {name: torch.ones(len(received[name]), requires_grad=True) for name in masked}

    def product(name):
        return (received[name].transpose(0, -1) * masks[name]).transpose(0, -1)

    for batch in recorder.batches:
        images, labels = batch["pixel_values"], batch["labels"]
        mixed = 0.3 * images + 0.7 * images.roll(1, 0)
        logits = functional_call(by_hand, {name: product(name) for name in masked}, mixed).logits
        loss = 0.3 * F.cross_entropy(logits, labels) + 0.7 * F.cross_entropy(logits, labels.roll(1, 0))
        loss = loss + 0.08 / (24 / 3) * sum((1 - mask).abs().sum() for mask in masks.values())
        slopes = torch.autograd.grad(loss, list(masks.values()))
        for layer, (name, slope) in enumerate(zip(masked, slopes, strict=True), start=1):
            floor = 0.8 * math.exp(-0.5 * layer)
            masks[name] = (masks[name] - 0.5 * slope).detach().clamp(floor, 1.0).requires_grad_()
    expected = received | {name: product(name).detach() for name in masked}
    assert all((mask < 1).any() for mask in masks.values())
    assert distance(parameters_of(found), expected) < 1e-5


def test_nft_clips_its_masks_between_the_floor_and_one(tmp_path):
    trainer = trainer_of("nft", tmp_path, resnet(), learning_rate=1e4)
    trainer.train()
    masks = [mask for _, mask, _ in trainer.masks()]
    for layer, mask in enumerate(masks, start=1):
        floor = 0.8 * math.exp(-0.5 * layer)
        assert all(value in (pytest.approx(floor), 1.0) for value in mask.tolist())
    values = torch.cat(masks)
    assert (values == 1).any() and (values < 1).any()


def test_nft_trains_nothing_but_its_masks(tmp_path):
    model = resnet()
    before = parameters_of(model)
    trainer_of("nft", tmp_path, model).train()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    norms = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert changed == norms


def test_nft_learns_from_clean_images_without_labels_not_at_all(tmp_path):
    class Unlabelled(Images):
        def __getitem__(self, row):
            return {"pixel_values": self.pixels[row]}

    with pytest.raises(ValueError, match="labels"):
        trainer_of("nft", tmp_path, vit(), train_dataset=Unlabelled()).train()
