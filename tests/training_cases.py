"""Short runs of the baselines that train, and gradients by hand, shared by their tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from trainer_cases import QUIET, Images, resnet, vit

from hf_fip.baselines import method

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
