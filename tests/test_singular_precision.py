"""Half precision, autocast, checkpointing, compilation and `torch.func` around the adapted layers."""

import copy

import pytest
import torch
from singular_cases import (
    Holder,
    adapt,
    dense_weights,
    force_path,
    layers,
    move_shifts,
    only_layer,
    reference,
    shifts,
    trainable,
)
from test_fisher_models import assert_same_gradient, estimate, flat, make_batch, marian, resnet, vit
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_fip.fisher import Categorical, fisher_trace, per_sample_scores

both_paths = pytest.mark.parametrize("by_activations", [True, False], ids=["activations", "weight"])
half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


@pytest.fixture(params=[True, False], ids=["activations", "weight"])
def forced(request, monkeypatch):
    return force_path(monkeypatch, request.param)


def linear(*shape: int) -> Holder:
    torch.manual_seed(0)
    return Holder(nn.Linear(*shape)).requires_grad_(False)


# ---- Half precision ----


@half
def test_a_model_in_half_precision_starts_exactly_as_received_and_keeps_its_factors_in_full(dtype, forced):
    received, x = linear(24, 16).to(dtype), torch.randn(5, 24).to(dtype)
    model = adapt(received)
    layer = only_layer(model)
    assert layer.singular_delta["default"].dtype == layer.basis["default"].u.dtype == torch.float32
    assert torch.equal(model(x), received(x))


@half
def test_a_model_that_goes_to_half_precision_later_starts_exactly_as_received(dtype, forced):
    received, x = linear(24, 16), torch.randn(5, 24).to(dtype)
    model = adapt(received).to(dtype)
    assert torch.equal(model(x), received.to(dtype)(x))


@half
def test_a_small_shift_of_a_model_in_half_precision_is_not_lost(dtype, forced):
    """What rounding takes from single outputs is right on average; smaller updates gather in δ, in float32."""
    received, x = linear(64, 64).to(dtype), torch.randn(512, 64).to(dtype)
    model = adapt(received)
    delta = only_layer(model).singular_delta["default"]
    for _ in range(100):
        delta.data.add_(1e-4)
    change = (x.double() @ received.layer.weight.double().T) * 1e-2
    found = model(x).double() - received(x).double()
    assert ((found * change).sum() / change.square().sum()).item() == pytest.approx(1.0, abs=0.1)
    model(x).float().square().mean().backward()
    assert delta.grad.dtype == torch.float32 and (delta.grad != 0).all()


def test_under_autocast_shifts_stay_in_full_precision_and_outputs_are_those_of_a_dense_layer(forced):
    received, x = linear(24, 16), torch.randn(5, 24)
    model = adapt(received)
    move_shifts(model)
    expected = reference(received, model, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02)
    found.float().square().sum().backward()
    (naive,) = torch.autograd.grad(expected.square().sum(), list(shifts(model).values()))
    gradient = only_layer(model).singular_delta["default"].grad
    assert gradient.dtype == torch.float32
    assert (gradient - naive).norm() <= 0.03 * naive.norm()


def test_a_model_in_float64_is_adapted_in_float64(forced):
    received, x = linear(7, 5).double(), torch.randn(4, 7, dtype=torch.float64)
    model = adapt(received, init_weights=False)
    assert only_layer(model).singular_delta["default"].dtype == torch.float64
    torch.testing.assert_close(model(x), reference(received, model, x), rtol=1e-12, atol=1e-12)
    assert (model(x) - received(x)).abs().max() > 1e-3


# ---- Checkpointing, compilation ----


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(use_reentrant, forced):
    torch.manual_seed(0)
    model = adapt(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)))
    move_shifts(model)
    x, gradients = torch.randn(4, 6, requires_grad=True), []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant), model):
        model.zero_grad()
        run(x).square().sum().backward()
        gradients.append(torch.cat([delta.grad for delta in shifts(model).values()]))
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0])


def test_checkpointed_transformers_train_as_before(forced):
    gradients = []
    for checkpointed in (False, True):
        model = adapt(vit())
        move_shifts(model)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        model(**make_batch("vit")).loss.backward()
        gradients.append(flat(delta.grad for delta in shifts(model).values()))
    assert_same_gradient(*gradients)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_layers_give_the_same_output_and_gradients(backend, forced):
    torch._dynamo.reset()
    torch.manual_seed(0)
    received = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 6), nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 2, 3))
    model, tokens = adapt(received), torch.tensor([1, 2, 5])
    compiled = torch.compile(model, backend=backend)
    for seed in range(2):  # the shifts move: nothing made before may stay
        move_shifts(model, seed=seed)
        results = []
        for run in (model, compiled):
            model.zero_grad()
            output = run(tokens)
            output.square().sum().backward()
            results.append(torch.cat([output.detach().flatten(), *(delta.grad for delta in shifts(model).values())]))
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(tokens), reference(received, model, tokens), rtol=1e-4, atol=1e-5)


# ---- Scores: torch.func, double backward and finite differences through whole models ----

MODELS = {"vit": vit, "resnet": resnet}


@pytest.mark.parametrize("name", MODELS)
def test_per_sample_scores_by_vmap_are_those_of_a_loop(name, forced, monkeypatch):
    model, batch = adapt(MODELS[name]()).eval(), make_batch(name)
    move_shifts(model)
    loop = []
    for row, label in enumerate(batch["labels"]):
        logits = model(pixel_values=batch["pixel_values"][row : row + 1]).logits
        loop.append(flat(torch.autograd.grad(logits.log_softmax(-1)[0, label], list(trainable(model).values()))))
    with monkeypatch.context() as patch:  # the loop that stands in where vmap fails
        patch.setattr("hf_fip.fisher.scores._vmap_is_to_blame", lambda error: False)
        inputs = {"pixel_values": batch["pixel_values"]}
        chunks = list(per_sample_scores(model, Categorical(), inputs, batch["labels"], chunk_size=3))
    found = [flat(parts) for chunk in chunks for parts in zip(*chunk, strict=True)]
    assert len(found) == 4
    for score, expected in zip(found, loop, strict=True):
        assert_same_gradient(score, expected)
    trace = fisher_trace(model, batch, estimator="exact", labels="empirical")
    assert float(trace) == pytest.approx(torch.stack([s.square().sum() for s in loop]).mean().item(), rel=1e-4)


@pytest.mark.parametrize("estimator", ["exact", "signed_sum"])
@pytest.mark.parametrize("name", ["vit", "marian"])
def test_the_gradient_of_the_trace_is_that_of_its_finite_differences(name, estimator, forced):
    received = {"vit": vit, "marian": marian}[name]().double()
    for module in received.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None  # hides what the output depends on from autograd
    model, batch = adapt(received).eval(), make_batch(name)
    batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    move_shifts(model, size=0.1)
    options = {"estimator": estimator, "labels": "empirical", "gradient": "double_backward"}
    value, gradient = estimate(model, [batch], **options)
    direction = torch.randn(len(gradient), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values, step = [], 1e-5
    for sign in (1, -1):
        moved = copy.deepcopy(model)
        start = 0
        for delta in shifts(moved).values():
            delta.data.add_(sign * step * direction[start : start + delta.numel()].view_as(delta))
            start += delta.numel()
        values.append(float(estimate(moved, [batch], **options)[0]))
    assert float(value) > 0
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(float(gradient @ direction), rel=1e-3)


def test_scores_of_shifts_are_those_of_a_model_whose_weights_are_dense(forced):
    received, batch = vit(), make_batch("vit")
    model = adapt(received)
    move_shifts(model)
    logits = torch.func.functional_call(
        received, dense_weights(received, model, ["default"]), (), {"pixel_values": batch["pixel_values"]}
    ).logits
    expected = torch.autograd.grad(logits.log_softmax(-1)[0, 1], list(shifts(model).values()))
    found = torch.autograd.grad(
        model(pixel_values=batch["pixel_values"]).logits.log_softmax(-1)[0, 1], list(shifts(model).values())
    )
    assert_same_gradient(flat(found), flat(expected))
    assert len(layers(model)) == len(expected)
