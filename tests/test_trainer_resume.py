"""A run that was killed and resumed ends as one that was not."""

import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from trainer_cases import (
    PlainNet,
    Snapshots,
    eager_vit,
    identical,
    image_trainer,
    logged,
    marian,
    resnet,
    text_trainer,
    trained,
    vit,
    weights,
)
from transformers import Trainer, TrainerCallback, TrainingArguments

import hf_fip.trainer
from hf_fip import SingularValueConfig
from hf_fip.anchor import ANCHOR_NAME
from hf_fip.checkpoint import last_complete_checkpoint

BOTH = {"eta_f": 0.05, "eta_r": 1.0}
SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}


# ---- Resumed ----


LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])


class Whole(nn.Module):
    """A module of the user's own around a model of transformers."""

    def __init__(self):
        super().__init__()
        self.inner = vit(0.2)

    def forward(self, pixel_values, labels=None):
        return self.inner(pixel_values, labels=labels)


def two_adapters() -> nn.Module:
    """A model with two adapters, both of which are trained."""
    model = get_peft_model(vit(0.2), SingularValueConfig(), adapter_name="first")
    model.add_adapter("default", SingularValueConfig(rank=4))
    model.base_model.set_adapter(["first", "default"])
    return model


def images(model, **fixed):
    return lambda folder, **options: image_trainer(folder, model(), **{**options, **fixed})


RUNS = {
    "vit": images(lambda: vit(0.2)),
    "vit-adamw-bf16": images(lambda: eager_vit(0.2), optim="adamw_torch", bf16=True),
    "resnet-accumulation": images(resnet, gradient_accumulation_steps=2),
    "resnet-epochs": images(resnet, max_steps=-1, num_train_epochs=2, per_device_train_batch_size=8),
    "resnet-at-epochs": images(resnet, max_steps=-1, num_train_epochs=3, save_strategy="epoch"),
    "plain-module": images(lambda: PlainNet(0.2)),
    "module-around-a-vit": images(Whole),
    "signed": images(lambda: vit(0.2), trace_estimator="signed_sum"),
    "seq2seq": lambda folder, **options: text_trainer(folder, marian(0.2), **options),
    "adapter": images(lambda: vit(0.2), peft_config=LORA),
    "singular": images(lambda: vit(0.2), peft_config=SingularValueConfig()),
    "singular-norms": images(resnet, peft_config=SingularValueConfig(train_norms=True), optim="adamw_torch"),
    "singular-two": images(two_adapters),
    "singular-few": images(lambda: PlainNet(0.2), peft_config=SingularValueConfig(rank=2)),
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("dropped", [1, 2])
def test_a_resumed_run_ends_with_the_same_weights(name, dropped, tmp_path, monkeypatch):
    calls = []
    real = hf_fip.trainer.fisher_diagonal
    monkeypatch.setattr(
        hf_fip.trainer, "fisher_diagonal", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs)
    )
    whole = RUNS[name](tmp_path, **BOTH, **SAVING, trace_interval=3)
    expected = trained(whole)
    assert len(calls) == 1
    for _ in range(dropped):  # of three
        shutil.rmtree(last_complete_checkpoint(str(tmp_path)))
    resumed = RUNS[name](tmp_path, **BOTH, **SAVING, trace_interval=3)
    resumed.train(resume_from_checkpoint=True)
    assert identical(weights(resumed.model), expected)
    assert len(calls) == 1  # diag F̄ came from the checkpoint
    assert identical(resumed._anchor.received, whole._anchor.received)
    assert identical(resumed._anchor.diagonal, whole._anchor.diagonal)
    for key in ("loss", "task_loss", "fisher_trace", "drift"):
        assert logged(resumed, key) == logged(whole, key)


@pytest.mark.parametrize("model", [vit, PlainNet], ids=lambda model: model.__name__)
def test_a_checkpoint_of_the_plain_trainer_is_resumed(model, tmp_path):
    options = {"disable_tqdm": True, "use_cpu": True, "per_device_train_batch_size": 4, "dataloader_pin_memory": False}
    optimizer = {"optim": "sgd", "optim_args": "momentum=0.9", "lr_scheduler_type": "cosine", "learning_rate": 0.05}
    args = TrainingArguments(str(tmp_path / "out"), **SAVING, **options, **optimizer)
    data = image_trainer(tmp_path / "other", model()).train_dataset
    plain = Trainer(model(0.2), args, train_dataset=data)
    expected = trained(plain)
    shutil.rmtree(tmp_path / "out" / "checkpoint-6")
    fip = image_trainer(tmp_path / "out", model(0.2), eta_f=0, eta_r=0, **SAVING)
    fip.train(resume_from_checkpoint=True)
    assert identical(weights(fip.model), expected)


def test_writing_over_an_old_checkpoint_is_not_taken_for_that_one(tmp_path, monkeypatch):
    trained(image_trainer(tmp_path, vit(0.2), **BOTH, **SAVING))

    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    again = image_trainer(tmp_path, vit(0.2), seed=7, **BOTH, **SAVING)
    monkeypatch.setattr(again, "_save_optimizer_and_scheduler", fail)
    with pytest.raises(OSError, match="No space left"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    shutil.rmtree(tmp_path / "checkpoint-6")
    assert last_complete_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-2")


# ---- What cannot be resumed ----


def test_resuming_without_any_complete_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Can't find a valid checkpoint"):
        image_trainer(tmp_path, vit(), **BOTH).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for prepare in (lambda: None, lambda: (tmp_path / "checkpoint-2").mkdir()):
        prepare()
        with pytest.raises(ValueError, match="No valid checkpoint found"):
            image_trainer(tmp_path, vit(), **BOTH).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"eta_r": 0.0}, {}, f"has no {ANCHOR_NAME}.*eta_r=0.*or start anew"),
        ({"save_only_model": True}, {}, f"has no {ANCHOR_NAME}.*save_only_model"),
        ({}, {"model": lambda: vit(0.2, intermediate_size=8)}, "is of another model: they differ in 6 weights"),
        ({}, {"model": lambda: vit(0.2, num_hidden_layers=3)}, "is of another model: .* vit.layers.2"),
        ({"eta_r": 0.0}, {"eta_r": 0.0, "model": resnet}, "is of another model"),
        ({"peft_config": LORA}, {}, "is of an adapter.*pass the `peft_config`"),
        ({}, {"peft_config": LORA}, "is of a whole model.*leave `peft_config` out"),
        ({"save_only_model": True, "eta_r": 0.0}, {"peft_config": LORA, "eta_r": 0.0}, "is of a whole model"),
    ],
    ids=["no-drift", "only-model", "other-size", "other-depth", "other-model", "adapter", "whole", "whole-model-only"],
)
def test_a_checkpoint_that_does_not_fit_is_refused(first, second, message, tmp_path):
    def make(model=lambda: vit(0.2), **options):
        return image_trainer(tmp_path, model(), **{**BOTH, **SAVING, **options})

    trained(make(**first))
    shutil.rmtree(tmp_path / "checkpoint-6")
    other, snapshots = make(**second), Snapshots()
    other.add_callback(snapshots)
    with pytest.raises(ValueError, match=message):
        other.train(resume_from_checkpoint=True)
    assert not snapshots.weights  # before the first update


class Unfreeze(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        model.requires_grad_(True)


def test_the_drift_of_a_weight_unfrozen_on_the_way_is_refused(tmp_path):
    model = vit()
    model.vit.requires_grad_(False)
    with pytest.raises(ValueError, match=r"received value of vit\.\S+ is not known: freeze"):
        image_trainer(tmp_path, model, eta_f=0.0, eta_r=1.0, callbacks=[Unfreeze()]).train()


def test_weights_are_not_rounded_to_a_type_that_the_config_claims(tmp_path):
    model = vit(0.2)
    expected = trained(image_trainer(tmp_path, model, eta_f=0.05, **SAVING))
    shutil.rmtree(tmp_path / "checkpoint-6")
    loaded = vit(0.2)
    loaded.config.dtype = torch.bfloat16  # as after `from_pretrained(…, dtype="bfloat16").float()`
    resumed = image_trainer(tmp_path, loaded, eta_f=0.05, **SAVING)
    resumed.train(resume_from_checkpoint=True)
    assert identical(weights(resumed.model), expected)


def test_a_finished_run_makes_no_further_update(tmp_path):
    options = {**BOTH, "save_strategy": "steps", "save_steps": 4, "max_steps": 4}  # amid an epoch of six
    expected = trained(image_trainer(tmp_path, vit(0.2), **options))
    again = image_trainer(tmp_path, vit(0.2), **options)
    again.train(resume_from_checkpoint=True)
    assert identical(weights(again.model), expected)
    assert again.state.global_step == 4


def test_a_run_without_drift_resumes_from_a_checkpoint_with_it(tmp_path):
    trained(image_trainer(tmp_path, vit(0.2), **BOTH, **SAVING))
    shutil.rmtree(tmp_path / "checkpoint-6")
    resumed = image_trainer(tmp_path, vit(0.2), eta_f=0.05, **SAVING)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(logged(resumed, "loss")) == 6 and len(logged(resumed, "drift")) == 2
