"""ANP and RNP: the losses that their masks of channels follow, by hand, and what they prune."""

import pytest
import torch
from mask_cases import batch, by_hand, trainer_of
from torch import nn
from trainer_cases import QUIET, Images, PlainNet, Recorder, identical, weights

from hf_fip.baselines import method

# ---- ANP ----


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
        slopes = torch.autograd.grad(by_hand(net, data, scale=scale, shift=shift), draws)
        draws = [
            (draw + 0.3 / steps * slope.sign()).clamp(-0.3, 0.3).detach().requires_grad_()
            for draw, slope in zip(draws, slopes, strict=True)
        ]
    assert torch.equal(delta["norm.weight"], draws[0]) and torch.equal(xi["norm.bias"], draws[1])
    assert max(delta["norm.weight"].abs().max(), xi["norm.bias"].abs().max()) == pytest.approx(0.3)


def test_anp_mixes_the_losses_with_and_without_perturbation(tmp_path):
    trainer, net = anp_of(tmp_path, anp_alpha=0.3)
    data, mask = batch(), trainer.masks["norm.weight"]
    state = torch.get_rng_state()
    found = trainer.masked_loss(data)
    torch.set_rng_state(state)
    delta, xi = trainer._perturbation(data)
    scale, shift = net.norm.weight.detach(), net.norm.bias.detach()
    natural = by_hand(net, data, scale=scale * mask, shift=shift)
    robust = by_hand(net, data, scale=scale * (mask + delta["norm.weight"]), shift=shift * (1 + xi["norm.bias"]))
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
    expected = 0.3 * by_hand(net, batch(), scale=net.norm.weight.detach() * mask, shift=net.norm.bias.detach())
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
