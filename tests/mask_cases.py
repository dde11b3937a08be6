"""Short runs of the baselines that learn masks, shared by their tests."""

from __future__ import annotations

from torch.nn.functional import cross_entropy
from trainer_cases import QUIET, Images

from hf_fip.baselines import method

SHORT = {"max_steps": 4, "per_device_train_batch_size": 8, "logging_steps": 1, **QUIET}


def trainer_of(name, folder, model, train_dataset=None, train_transform=None, callbacks=None, **options):
    Trainer, Config = method(name)
    args = Config(str(folder), **{**SHORT, **options})
    dataset = Images() if train_dataset is None else train_dataset
    return Trainer(model, args, train_dataset=dataset, train_transform=train_transform, callbacks=callbacks)


def batch(count=8):
    images = Images(count)
    return {"pixel_values": images.pixels, "labels": images.labels}


def by_hand(net, data, scale, shift):
    """The loss of PlainNet on a batch, in train mode, with another scale and shift of its BatchNorm."""
    hidden = net.conv(data["pixel_values"])
    hidden = (hidden - hidden.mean((0, 2, 3), keepdim=True)) / (
        hidden.var((0, 2, 3), keepdim=True, unbiased=False) + net.norm.eps
    ).sqrt()
    hidden = (hidden * scale[:, None, None] + shift[:, None, None]).relu()
    return cross_entropy(net.head(hidden.flatten(1)), data["labels"])
