"""FIPTrainer with a singular-value adapter: Fast FIP."""

import copy

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import nn
from trainer_cases import (
    Images,
    PlainNet,
    Snapshots,
    eager_vit,
    identical,
    image_trainer,
    logged,
    resnet,
    trained,
    vit,
    weights,
)

from hf_fip import SingularValueConfig
from hf_fip.fisher import fisher_diagonal, fisher_trace, per_sample_scores
from hf_fip.fisher.likelihood import Categorical
from hf_fip.singular import SingularValueLayer

BOTH = {"eta_f": 0.1, "eta_r": 1.0}
MODELS = {"vit": vit, "resnet": resnet, "plain": PlainNet}


def layers_of(model: nn.Module) -> dict[str, SingularValueLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SingularValueLayer)}


@pytest.mark.parametrize("relative", [True, False])
def test_the_fisher_of_the_shifts_is_the_projected_fisher_of_the_weights(relative, tmp_path):
    # At δ = 0 the score of a shift is u_iᵀ S v_i, with S the score of the weight; of a relative one, that times σ_i.
    images = Images(6)
    batch = {"pixel_values": images.pixels, "labels": images.labels}
    received = eager_vit().eval()
    adapter = SingularValueConfig(relative=relative)
    adapted = image_trainer(tmp_path, eager_vit(), peft_config=adapter).model.eval()
    names = [name for name, _ in received.named_parameters()]
    scores = {name: [] for name in names}
    for chunk in per_sample_scores(received, Categorical(), {"pixel_values": images.pixels}, images.labels):
        for name, score in zip(names, chunk, strict=True):
            scores[name].append(score)
    diagonal = fisher_diagonal(adapted, [batch], labels="empirical")
    trace = 0.0
    for name, layer in layers_of(adapted).items():
        basis = layer.basis["default"]
        weight = torch.cat(scores[f"{name.removeprefix('base_model.model.')}.weight"]).flatten(2)
        expected = torch.einsum("mr,bmn,rn->br", basis.u, weight, basis.vt).square().mean(0)
        expected *= basis.sigma.square() if relative else 1.0
        found = diagonal[f"{name}.singular_delta.default"]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * expected.max().item())
        trace += expected.sum().item()
    estimate = fisher_trace(adapted, batch, estimator="exact", labels="empirical")
    assert estimate == pytest.approx(trace, rel=1e-4)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("norms", [False, True])
def test_both_terms_act_on_what_the_adapter_trains_and_on_nothing_else(name, norms, tmp_path):
    trainer = image_trainer(tmp_path, MODELS[name](), peft_config=SingularValueConfig(train_norms=norms), **BOTH)
    before = weights(trainer.model)
    after = trained(trainer)
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert any("singular_delta" in key for key in moved)
    assert {key for key in moved if "singular_delta" not in key and "modules_to_save" not in key} == set()
    assert any("modules_to_save" in key for key in moved) == norms
    trainable = {key for key, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trainer._anchor.received.keys() == trainable
    assert len(trainer._trace.parameters) == len(trainable)
    assert len(logged(trainer, "fisher_trace")) == len(logged(trainer, "drift")) == 3


@pytest.mark.parametrize("name", MODELS)
def test_switched_off_after_training_it_is_the_received_model_bit_for_bit(name, tmp_path):
    received, pixels = MODELS[name]().eval(), Images(5).pixels
    expected = received(pixels)["logits"]
    adapter = SingularValueConfig(train_norms=True)
    trainer = image_trainer(tmp_path, MODELS[name](), peft_config=adapter, learning_rate=1.0, **BOTH)
    trainer.train()
    model = trainer.model.eval()
    assert not torch.allclose(model(pixels)["logits"], expected, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(model(pixels)["logits"], expected)


def test_shifts_do_not_decay(tmp_path):
    runs = []
    for decay in (0.0, 0.5):
        trainer = image_trainer(tmp_path, vit(), peft_config=SingularValueConfig(), weight_decay=decay, **BOTH)
        runs.append(trained(trainer))
    assert identical(*runs)


def test_a_large_pull_holds_the_shifts_at_zero(tmp_path):
    sizes = []
    for eta_r in (0.0, 1e3):
        options = {"eta_f": 0.0, "eta_r": eta_r, "max_steps": 20, "learning_rate": 1e-3}
        trainer = image_trainer(tmp_path, vit(), peft_config=SingularValueConfig(), **options)
        after = trained(trainer)
        diagonal = trainer._anchor.diagonal if trainer._anchor else diagonal_of(tmp_path)
        sizes.append(sum((diagonal[key] * after[key].square()).sum().item() for key in diagonal))
    assert sizes[1] < 0.5 * sizes[0]


def diagonal_of(folder) -> dict:
    trainer = image_trainer(folder, vit(), peft_config=SingularValueConfig(), eta_f=0.0, eta_r=1.0, max_steps=1)
    trainer.train()
    return trainer._anchor.diagonal


def test_the_config_given_is_left_as_it_was(tmp_path):
    adapter = SingularValueConfig(train_norms=True)
    given = copy.deepcopy(adapter)
    for model in (vit(), resnet()):
        image_trainer(tmp_path, model, peft_config=adapter)
    assert adapter == given


def test_the_log_of_a_constant_models_trace_is_left_alone(tmp_path):
    model = vit()
    nn.init.zeros_(model.classifier.weight)
    model.classifier.bias.data.copy_(torch.tensor([200.0, 0.0, 0.0]))
    trainer = image_trainer(tmp_path, model, eta_f=2.0, learning_rate=1e-8)
    trainer.train()
    assert logged(trainer, "fisher_trace") == [0.0] * 3


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_no_singular_value_falls_below_its_floor(floor, relative, tmp_path):
    adapter = SingularValueConfig(floor=floor, scale=2.0, relative=relative)
    options = {"eta_f": 0.0, "learning_rate": 30.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    trainer = image_trainer(tmp_path, vit(), peft_config=adapter, **options)
    trainer.train()
    below = 0
    for layer in layers_of(trainer.model).values():
        sigma, delta = layer.basis["default"].sigma, layer.singular_delta["default"]
        unit = 2.0 * sigma if relative else 2.0
        below += (sigma + unit * delta < floor * sigma - 1e-5).sum().item()
    assert (below > 0) == (floor == 0.0)


def test_updates_whose_task_loss_has_risen_too_far_go_without_the_trace(tmp_path):
    same = {"eta_f": 1e-4, "learning_rate": 30.0, "lr_scheduler_type": "constant"}
    free, never, always = (image_trainer(tmp_path, vit(), max_loss_rise=rise, **same) for rise in (None, 1e-6, 1e6))
    expected = trained(free)
    losses = logged(free, "task_loss")
    assert min(losses[1:]) > losses[0]
    assert identical(trained(always), expected) and logged(always, "trace_left_out") == [0.0] * 3
    assert not identical(trained(never), expected) and logged(never, "trace_left_out") == [0.0, 1.0, 1.0]
    assert len(logged(never, "fisher_trace")) == 1 and logged(free, "trace_left_out") == []


@pytest.mark.parametrize("names", [["default"], ["fip"], ["fip", "default"]], ids=" and ".join)
def test_the_best_adapter_is_loaded_at_the_end_whatever_its_name(names, tmp_path):
    model, snapshots = get_peft_model(vit(), SingularValueConfig(), adapter_name=names[0]), Snapshots()
    for name in names[1:]:
        model.add_adapter(name, SingularValueConfig(rank=4))
    model.base_model.set_adapter(names)
    saved = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": False}
    data = {"eval_dataset": Images(8, seed=1), "callbacks": [snapshots]}
    trainer = image_trainer(tmp_path, model, max_steps=4, learning_rate=3.0, eta_f=0.0, **saved, **best, **data)
    after = trained(trainer)
    step = int(np.argmin(logged(trainer, "eval_loss")))
    assert step < 3  # or loading it would prove nothing
    assert identical(after, snapshots.weights[step])


def test_a_resumed_run_knows_the_task_loss_of_the_first_update(tmp_path):
    options = {"eta_f": 1e-4, "learning_rate": 30.0, "lr_scheduler_type": "constant", "max_loss_rise": 1e-6}
    whole = image_trainer(tmp_path, vit(), save_strategy="steps", save_steps=1, **options)
    expected = trained(whole)
    resumed = image_trainer(tmp_path, vit(), **options)
    resumed.train(resume_from_checkpoint=str(next(tmp_path.rglob("checkpoint-1"))))
    assert identical(resumed.model.state_dict(), expected)
    for trainer in (whole, resumed):
        assert logged(trainer, "first_task_loss") == logged(whole, "task_loss")[:1]
        assert logged(trainer, "trace_left_out") == [0.0, 1.0, 1.0]
