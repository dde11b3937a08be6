"""A last batch of one sample: what BatchNorm makes of it, and that every trainer goes through it."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from trainer_cases import QUIET, Images, PlainNet, identical, image_trainer, trained, weights

from hf_fip.baselines import method
from hf_fip.evaluation.relearning import RelearningConfig, relearning_trainer
from hf_fip.lone_sample import lone_sample
from hf_fip.tasks.image_architectures import ARCHITECTURES


class Pooled(PlainNet):
    """What a user may bring: a BatchNorm1d of one value a channel and sample."""

    def __init__(self):
        super().__init__()
        self.head = nn.Sequential(nn.Linear(36, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))


def small(architecture: str) -> nn.Module:
    torch.manual_seed(1)
    return ARCHITECTURES[architecture](["a", "b", "c"], 8, 1)[0]


MODELS = {name: lambda name=name: small(name) for name in ("resnet", "preactresnet18", "wideresnet")}
MODELS["a module of one's own"] = Pooled


@pytest.mark.parametrize("options", [{}, {"eta_f": 0.05, "eta_r": 1.0}], ids=["plain", "FIP"])
@pytest.mark.parametrize("case", MODELS)
def test_a_last_batch_of_one_is_trained_on(case, options, tmp_path):
    trainer = image_trainer(tmp_path, MODELS[case](), train_dataset=Images(5), **{**options, "max_steps": 4})
    assert all(tensor.isfinite().all() for tensor in trained(trainer).values())
    assert trainer.state.global_step == 4 and trainer.state.epoch == 2
    assert all(module.training and not module._forward_hooks for module in trainer.model.modules())


def test_one_value_a_channel_is_normed_by_the_running_statistics_which_stay():
    model, alone = Pooled().train(), torch.randn(1, 1, 8, 8)
    norm = model.head[1]
    norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 1.5)
    expected, before = copy.deepcopy(model), weights(norm)
    expected.head[1].eval()
    with lone_sample(model, {"pixel_values": alone}):
        found = model(alone)["logits"]
    assert torch.equal(found, expected(alone)["logits"])
    assert identical(weights(norm), before) and norm.training
    assert identical(weights(model.norm), weights(expected.norm))  # of a larger map: it moves as ever


@pytest.mark.parametrize("rows", [1, 2])
def test_nothing_changes_where_batchnorm_has_several_values(rows):
    model, images = PlainNet().train(), torch.randn(rows, 1, 8, 8)
    other = copy.deepcopy(model)
    with lone_sample(model, {"pixel_values": images}):
        assert torch.equal(model(images)["logits"], other(images)["logits"])
    assert identical(weights(model), weights(other))


def test_layers_are_in_train_mode_again_after_an_error():
    model = nn.Sequential(nn.BatchNorm1d(3)).train()
    with pytest.raises(RuntimeError), lone_sample(model, {"x": torch.zeros(1, 3)}):
        model(torch.zeros(1, 3, dtype=torch.int64))
    assert model[0].training and not model[0]._forward_hooks and not model[0]._forward_pre_hooks


def test_rnp_unlearns_a_last_batch_of_one(tmp_path):
    trainer_class, config_class = method("rnp")[:2]
    args = config_class(str(tmp_path), per_device_train_batch_size=4, unlearning_epochs=1, max_steps=2, **QUIET)
    trainer = trainer_class(Pooled(), args, train_dataset=Images(5))
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_last_batch_of_one_is_relearned(tmp_path):
    images = [{**image, "labels": int(image["labels"])} for image in map(Images(25).__getitem__, range(25))]
    args = RelearningConfig(str(tmp_path), num_train_epochs=1, report_to="none", **QUIET)
    trainer = relearning_trainer(Pooled(), images[:20], images[20:], np.zeros(5, dtype=int), args)
    trainer.train()
    assert trainer.state.global_step == 7  # of 4 images, and one more
