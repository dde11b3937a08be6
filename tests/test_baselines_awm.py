"""AWM: which weights have a mask, the perturbation of the images, and the loss of both, by hand."""

import pytest
import torch
from mask_cases import batch, trainer_of
from torch import nn
from torch.nn.functional import cross_entropy
from trainer_cases import QUIET, PlainNet, Recorder, identical, resnet, vit, weights

from hf_fip.baselines import method


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
