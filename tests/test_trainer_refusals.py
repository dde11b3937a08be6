"""What cannot work is refused when the trainer is built, with the way out, and leaves no output folder."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import IterableDataset
from trainer_cases import (
    CLASSES,
    PlainNet,
    eager_vit,
    identical,
    image_trainer,
    marian,
    resnet,
    uncompiled,  # noqa: F401
    vit,
    weights,
)
from transformers import AutoConfig, TrainingArguments

from hf_fip import FIPConfig, FIPTrainer, SingularValueConfig

DOUBLE = {"trace_gradient": "double_backward"}
REENTRANT = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}


class Stream(IterableDataset):
    """Training data without a length."""

    def __iter__(self):
        while True:
            yield {"pixel_values": torch.zeros(1, 8, 8), "labels": torch.tensor(0)}


class MixedAttention(nn.Module):
    """A model of two parts, only one of which has a second derivative."""

    def __init__(self):
        super().__init__()
        self.first, self.second = eager_vit(), vit()

    def forward(self, pixel_values, labels=None):
        return self.second(pixel_values, labels=labels)


def spread_over_devices():
    model = vit()
    model.hf_device_map = {"vit": 0, "classifier": 1}
    return model


def adapted():
    return get_peft_model(vit(), LoraConfig(target_modules=["q_proj"]))


def adapted_by_transformers():
    model = vit()
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    return model


def frozen():
    return vit().requires_grad_(False)


REFUSED = [
    (vit, DOUBLE, "attn_implementation='eager'.*trace_gradient='finite_difference'"),
    (marian, {**DOUBLE, "trace_interval": 2}, "'sdpa'.*attn_implementation='eager'"),
    (MixedAttention, DOUBLE, "attn_implementation='eager'"),
    (adapted, DOUBLE, "attn_implementation='eager'"),
    (eager_vit, {**DOUBLE, "torch_compile": True}, "trace_gradient='finite_difference', or torch_compile=False"),
    (vit, REENTRANT, r"activation_checkpointing_kwargs=\{'use_reentrant': False\}"),
    (vit, {"ddp_static_graph": True}, "ddp_static_graph.*False"),
    (vit, {"use_liger_kernel": True}, "use_liger_kernel=False"),
    (lambda: vit().bfloat16(), {}, "float32.*bf16=True"),
    (lambda: vit().half(), {}, "float32"),
    (lambda: vit(problem_type="regression"), {}, "likelihood="),
    (lambda: vit(problem_type="regression"), {"eta_f": 0.0, "eta_r": 1.0}, "likelihood="),
    (frozen, {}, "requires_grad_"),
    (frozen, {"eta_f": 0.0, "eta_r": 1.0}, "requires_grad_"),
    (spread_over_devices, {}, "several devices.*DDP"),
    (spread_over_devices, {"eta_f": 0.0, "eta_r": 1.0}, "several devices"),
    (vit, {"optim": "lomo"}, "optim='lomo'.*backward pass"),
    (vit, {"optim": "galore_adamw_layerwise", "optim_target_modules": ["dense"]}, "optim='galore_adamw_layerwise'"),
    (vit, {"eta_r": 1.0, "train_dataset": Stream()}, "length.*eta_r=0"),
    (adapted_by_transformers, {}, "add_adapter.*get_peft_model.*`peft_config`"),
    (adapted_by_transformers, {"eta_f": 0.0}, "add_adapter.*get_peft_model"),
    (PlainNet, {"label_smoothing_factor": 0.1}, "PlainNet has none.*label_smoothing_factor=0"),
]


@pytest.mark.parametrize(("model", "options", "message"), REFUSED)
@pytest.mark.parametrize("how", ["model", "model_init"])
@pytest.mark.usefixtures("uncompiled")
def test_refused_at_construction(model, options, message, how, tmp_path):
    given = {"model": model()} if how == "model" else {"model": None, "model_init": lambda: model()}
    with pytest.raises(ValueError, match=message) as raised:
        image_trainer(tmp_path / "out", **given, **options)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("ACCELERATE_USE_FSDP", "FSDP1.*fsdp_version"),  # what Accelerate takes when none is named
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed.*Use FSDP2 or DDP"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "parallelism.*use DDP"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"eta_f": 0.0, "eta_r": 1.0}], ids=["trace", "drift"])
def test_launchers_that_cannot_give_the_gradient_are_refused(variable, message, options, tmp_path, monkeypatch):
    args = FIPConfig(str(tmp_path / "out"), use_cpu=True, **options)
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ValueError, match=message):
        FIPTrainer(vit(), args)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"torch_compile": True}, "torch_compile together with FSDP"),
        ({"fp16": True, "eta_r": 1.0}, "fp16 with FSDP.*bf16"),
        ({"fsdp": True, "fsdp_config": {"version": 1}}, "FSDP1.*fsdp_version"),
        ({"fsdp": True, "fsdp_config": {"cpu_ram_efficient_loading": True}}, "cpu_ram_efficient_loading.*to false"),
    ],
)
def test_what_cannot_be_sharded_is_refused(options, message, tmp_path, monkeypatch):
    args = FIPConfig(str(tmp_path / "out"), use_cpu=True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    for name, value in options.items():
        setattr(args, name, value)
    with pytest.raises(ValueError, match=message):
        FIPTrainer(vit(), args)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("deepspeed", "config.json", "DeepSpeed"),
        ("parallelism_config", object(), "parallelism"),
        ("_n_gpu", 2, "accelerate launch.*CUDA_VISIBLE_DEVICES"),
        ("trace_form", "log", "trace_form='log'"),
    ],
)
def test_what_needs_hardware_this_machine_lacks_is_refused(attribute, value, message, tmp_path):
    args = FIPConfig(str(tmp_path / "out"), use_cpu=True)
    args.n_gpu  # noqa: B018  (sets the devices up, once)
    setattr(args, attribute, value)
    with pytest.raises(ValueError, match=message):
        FIPTrainer(vit(), args)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (vit, {**DOUBLE, "trace_estimator": "exact"}),
        (eager_vit, DOUBLE),
        (resnet, DOUBLE),
        (PlainNet, DOUBLE),
        (lambda: eager_vit().bfloat16(), DOUBLE),
        (vit, {"activation_checkpointing": True}),
        (vit, {"torch_compile": True}),
        (lambda: vit().bfloat16(), {"eta_f": 0.0, "eta_r": 1.0}),
        (lambda: vit(problem_type="regression"), {"eta_f": 0.0}),
        (vit, {**REENTRANT, "eta_f": 0.0}),
        (vit, {"train_dataset": Stream()}),
    ],
)
@pytest.mark.usefixtures("uncompiled")
def test_what_does_work_is_not_refused(model, options, tmp_path):
    image_trainer(tmp_path, model(), **options)


def test_other_training_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="TrainingArguments; FIPTrainer needs a FIPConfig"):
        FIPTrainer(vit(), TrainingArguments(str(tmp_path / "out")))


def test_an_adapter_needs_a_model(tmp_path):
    with pytest.raises(ValueError, match="peft_config.*model_init"):
        image_trainer(tmp_path / "out", None, model_init=vit, peft_config=LoraConfig(target_modules=["q_proj"]))
    assert not (tmp_path / "out").exists()


def test_an_adapter_around_another_one_is_refused(tmp_path):
    with pytest.raises(ValueError, match="adapter already.*merge_and_unload.*leave `peft_config` out"):
        image_trainer(tmp_path / "out", adapted(), peft_config=SingularValueConfig())
    assert not (tmp_path / "out").exists()


# ---- A model by its path ----


@pytest.mark.parametrize("model", [vit, resnet, marian], ids=lambda model: model.__name__)
def test_a_model_is_loaded_from_its_folder(model, tmp_path):
    model().save_pretrained(tmp_path / "model")
    for place in (str(tmp_path / "model"), tmp_path / "model"):
        trainer = image_trainer(tmp_path / "out", place)
        assert type(trainer.model) is type(model())
        assert identical(weights(trainer.model), weights(model()))


def only_a_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def one_weight_less(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["classifier.bias"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def architecture(name):
    def rename(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "architectures": name and [name]}))

    return rename


def remote_code(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("raise SystemExit('code of the model was run')")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (only_a_pickle, "has no file named model.safetensors: weights are read from safetensors only"),
        (one_weight_less, "lacks 1 weights, among them classifier.bias"),
        (architecture("ViTForMindReading"), "'ViTForMindReading', which transformers does not have"),
        (architecture("AutoTokenizer"), "'AutoTokenizer', which transformers does not have"),
        (architecture(None), "'none'"),
        (remote_code, "No model at"),
        (shutil.rmtree, "No model at"),
    ],
    ids=["pickle", "incomplete", "unknown-class", "no-model-class", "no-class", "remote-code", "missing"],
)
def test_a_folder_that_is_no_whole_and_safe_model_is_refused(spoil, message, tmp_path):
    vit().save_pretrained(tmp_path / "model")
    assert AutoConfig.from_pretrained(tmp_path / "model").num_labels == CLASSES
    spoil(tmp_path / "model")
    with pytest.raises(ValueError, match=message) as raised:
        image_trainer(tmp_path / "out", str(tmp_path / "model"))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()
