"""Measuring leaves no mark, fits in memory, and takes finite differences where there is no second derivative."""

import warnings

import pytest
import torch
from test_fisher_models import linear, make_batch, resnet, vit
from torch import nn
from trainer_cases import Images, PlainNet, identical, weights

from hf_fip.curvature import Hessian, loss_landscape, measure_curvature


def signs(hessian: Hessian, seed: int = 0) -> torch.Tensor:
    return hessian.random_signs(torch.Generator().manual_seed(seed))


def images(rows: int = 6) -> dict[str, torch.Tensor]:
    data = Images(rows)
    return {"pixel_values": data.pixels, "labels": data.labels}


def test_a_training_model_is_left_as_it_was():
    model, batch = PlainNet(dropout=0.5).train(), images()
    model.norm.eval()
    model(**batch)["loss"].backward()
    before, modes = weights(model), [module.training for module in model.modules()]
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    state = torch.get_rng_state()
    with torch.no_grad():
        found = measure_curvature(model, [batch], probes=2, density_runs=1, density_steps=3)
        loss_landscape(model, {"clean": [batch]}, points=2)
        again = measure_curvature(model, [batch], probes=2)
    assert identical(weights(model), before) and torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert again.trace == found.trace  # without a dropout mask


def test_batchnorm_uses_its_running_statistics():
    model, batch = resnet().train(), make_batch("resnet")
    expected = resnet().eval()(**batch).loss.item()
    assert Hessian(model, [batch]).value() == pytest.approx(expected, rel=1e-6)
    assert model(**batch).loss.item() != pytest.approx(expected, rel=1e-2)


# Memory

OUT_OF_MEMORY = {
    "accelerator": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB"),
    "CPU": RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"),
    "CPU, Windows": RuntimeError(
        "[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"
    ),
}


class Small(nn.Module):
    """Raises when more than `rows` rows come at once, or at its n-th call."""

    def __init__(self, error: Exception, rows: int = 100, call: int = 0):
        super().__init__()
        self.inner, self.error, self.rows, self.call = linear(), error, rows, call
        self.seen = []

    def forward(self, x):
        self.seen.append(len(x))
        if len(x) > self.rows or len(self.seen) == self.call:
            raise self.error
        return self.inner(x)


@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_what_does_not_fit_is_halved_until_it_does(kind):
    batches = [make_batch("linear", rows) for rows in (7, 7, 2)]
    expected = Hessian(linear(), batches)
    model = Small(OUT_OF_MEMORY[kind], rows=2)
    hessian = Hessian(model, batches, graph_bytes=0)
    vector = signs(hessian)
    torch.testing.assert_close(hessian.product(vector), expected.product(vector))
    assert hessian.samples == 16
    model.seen.clear()
    hessian.product(vector)
    assert sum(model.seen) == 16 and max(model.seen) == 2  # it remembers what fits


def test_graphs_that_were_kept_go_before_batches_are_halved():
    batches = [make_batch("linear", 4, seed) for seed in (0, 1)]
    expected = Hessian(linear(), batches)
    model = Small(OUT_OF_MEMORY["CPU"], call=3)  # one row to weigh the graph, the first batch, the second
    hessian = Hessian(model, batches)
    vector = signs(hessian)
    torch.testing.assert_close(hessian.product(vector), expected.product(vector))
    assert model.seen == [1, 4, 4, 4]
    hessian.product(vector)
    assert model.seen == [1, 4, 4, 4, 4, 4]  # none is kept any more


def test_one_sample_that_does_not_fit_is_the_end_and_other_errors_are_not_taken_for_memory():
    with pytest.raises(torch.OutOfMemoryError, match="One sample does not fit in memory: CUDA"):
        Hessian(Small(OUT_OF_MEMORY["accelerator"], rows=0), [make_batch("linear")]).value()
    model = Small(RuntimeError("shapes do not match"), rows=3)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        Hessian(model, [make_batch("linear")]).value()
    assert model.seen == [4]


def test_a_graph_that_is_kept_saves_forward_passes_and_changes_no_figure():
    batch = make_batch("linear")
    models = {kept: Small(ValueError(), call=0) for kept in (0, 2**30)}
    products = []
    for kept, model in models.items():
        hessian = Hessian(model, [batch], graph_bytes=kept)
        products.append([hessian.product(signs(hessian, seed)) for seed in range(3)])
    for one, other in zip(*products, strict=True):
        torch.testing.assert_close(one, other)
    assert [model.seen for model in models.values()] == [[1, 4, 4, 4], [1, 4]]


def test_a_graph_of_earlier_weights_is_not_used():
    model, batch = linear(), make_batch("linear")
    hessian = Hessian(model, [batch])
    vector = signs(hessian)
    before = hessian.product(vector)
    with torch.no_grad():
        model.linear.weight.mul_(3.0)
    after = hessian.product(vector)
    torch.testing.assert_close(after, Hessian(model, [batch]).product(vector))
    assert not torch.allclose(after, before)


# No second derivative


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        context.save_for_backward(x)
        return torch.tanh(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context, gradient):
        return gradient * (1 - torch.tanh(context.saved_tensors[0]) ** 2)


class FlashAttention(nn.Module):
    """Calls a kernel that has a first derivative only."""

    def forward(self, x):
        x = x.view(1, 1, *x.shape)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(x, x, x)[0][0, 0]


class Attention(nn.Module):
    def forward(self, x):
        x = x.view(1, 1, *x.shape)
        return nn.functional.scaled_dot_product_attention(x, x, x)[0, 0]


class Tanh(nn.Module):
    def __init__(self, once: bool):
        super().__init__()
        self.once = once

    def forward(self, x):
        return OnceDifferentiable.apply(x) if self.once else torch.tanh(x)


class Net(nn.Module):
    def __init__(self, middle: nn.Module):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = nn.Linear(5, 4), middle, nn.Linear(4, 3)

    def forward(self, x):
        return self.last(self.middle(self.first(x)))


PAIRS = {
    "an own function": (lambda: Tanh(once=True), lambda: Tanh(once=False)),
    "a fused kernel": (FlashAttention, Attention),
}


@pytest.mark.parametrize("case", PAIRS)
def test_without_a_second_derivative_finite_differences_are_taken_and_said(case):
    batch = make_batch("linear", rows=8)
    once, twice = (Hessian(Net(make()), [batch]) for make in PAIRS[case])
    vector = signs(once)
    torch.testing.assert_close(once.product(vector), twice.product(vector), rtol=1e-3, atol=1e-3)
    assert (once.product_form, twice.product_form) == ("finite_difference", "double_backward")
    found = measure_curvature(once.model, [batch], probes=2)
    assert found.to_dict()["product_form"] == "finite_difference"
    with pytest.raises(ValueError, match="no second derivative.*finite_difference.*eager"):
        Hessian(once.model, [batch], product="double_backward").product(vector)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_both_forms_agree_on_a_smooth_network_whatever_the_attention_kernel(attention):
    model, batch = vit(attention), make_batch("vit")
    exact, differences = (Hessian(model, [batch], product=form) for form in ("double_backward", "finite_difference"))
    vector = signs(exact)
    one, other = exact.product(vector), differences.product(vector)
    assert (one - other).norm() < 1e-3 * one.norm()
    assert differences.product(torch.zeros_like(vector)).abs().max() == 0


HALF = linear().to(torch.bfloat16)
REFUSED = {
    "an unknown form": (lambda: Hessian(linear(), [], product="exact"), "product='exact' is not one of auto"),
    "half precision": (
        lambda: Hessian(HALF, [make_batch("linear")], product="finite_difference"),
        "rounded away.*float32",
    ),
    "no data": (lambda: Hessian(linear(), []), "the data were empty"),
    "no labels": (lambda: Hessian(linear(), [{"x": torch.zeros(2, 5)}]), "no 'labels' .it has: x"),
    "nothing to train": (lambda: Hessian(linear().requires_grad_(False), [make_batch("linear")]), "no trainable"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_measured_is_refused_with_the_way_out(case):
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        make()


def test_no_warning_is_given():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measure_curvature(vit("sdpa"), [make_batch("vit")], probes=1)
