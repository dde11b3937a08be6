"""The baselines that train: each resumes to the same weights, has the published defaults, refuses what cannot work."""

import math
import shutil

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.utils.data import IterableDataset
from trainer_cases import Images, PlainNet, distance, identical, logged, marian, resnet, trained, vit, weights
from training_cases import MODELS, trainer_of

from hf_fip.baselines import method
from hf_fip.baselines.base import KEPT_NAME, head_of
from hf_fip.checkpoint import CHECKSUMS_NAME, last_complete_checkpoint

METHODS = ["ft", "ft_sam", "nad", "fst", "nft"]


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
        ("nad", {"learning_rate": 0.01, "weight_decay": 5e-4, "beta_low": 500, "beta_high": 1000}),
        ("nad", {"lr_scheduler_type": "constant", "num_train_epochs": 10, "teacher_epochs": 10}),
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
        ("nad", PlainNet(), "PlainNet has none"),
        ("fst", nn.Conv2d(1, 3, 3), "end in an nn.Linear"),
        ("fst", frozen_head(), "unfreeze"),
        ("nft", nn.Conv2d(1, 3, 3), "end in an nn.Linear"),
        ("nft", frozen_norms(), "no trainable layer"),
        ("nft", marian(), "MarianMTModel takes input_ids.*another method"),
    ],
    ids=["no stages", "no head", "frozen head", "no head to spare", "no neurons", "no images"],
)
def test_a_model_without_the_parts_of_a_method_is_refused(name, model, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer_of(name, tmp_path / "out", model)
    assert not (tmp_path / "out").exists()


class Stream(IterableDataset):
    def __iter__(self):
        return iter(Images())


@pytest.mark.parametrize("name", ["nad", "nft"])
def test_data_without_a_length_are_refused_where_epochs_or_images_are_counted(name, tmp_path):
    with pytest.raises(ValueError, match="pass a dataset with a length"):
        trainer_of(name, tmp_path, vit(), train_dataset=Stream()).train()


def test_the_head_is_the_last_linear_layer_with_a_number_a_class():
    model = vit()
    assert head_of(model) is model.classifier
    model = resnet()
    assert head_of(model) is model.classifier[1]
    model.classifier = nn.Sequential(nn.Flatten(), nn.Linear(16, 5))
    with pytest.raises(ValueError, match="one number a class"):
        head_of(model)
