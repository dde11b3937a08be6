"""W' is made when something it is made of has changed, and only then; of two ways to compute the cheaper is taken."""

import copy
import pickle
from collections import Counter

import pytest
import torch
from peft import set_peft_model_state_dict
from singular_cases import (
    ConvNet,
    Holder,
    adapt,
    count_calls,
    dense_weights,
    force_path,
    images,
    layers,
    move_shifts,
    only_layer,
    reference,
    shifts,
)
from torch import nn

from hf_fip.fisher.passes import displaced
from hf_fip.singular import layer as layer_module
from hf_fip.singular.layer import cheaper_by_activations


@pytest.fixture
def made(monkeypatch) -> Counter:
    """Everything by the weight; counts how often W' is made."""
    force_path(monkeypatch, by_activations=False)
    counter = Counter()
    count_calls(monkeypatch, layer_module, "_shifted", counter, "times")
    return counter


def convnet():
    received = ConvNet().eval().requires_grad_(False)
    model = adapt(received)
    move_shifts(model)
    return received, model


def test_weights_are_made_once_for_the_same_shifts(made):
    received, model = convnet()
    for mode in (True, False):  # eval mode or not, with a graph or without
        model.train(mode)
        for grad in (True, False, True):
            with torch.set_grad_enabled(grad):
                torch.testing.assert_close(model(images()), reference(received, model, images()))
    assert made["times"] == 2  # a layer


KEPT = {
    "channels last": lambda: nn.Conv2d(2, 4, 3).to(memory_format=torch.channels_last),
    "attention": lambda: nn.MultiheadAttention(4, 2, batch_first=True),
}


@pytest.mark.parametrize("case", KEPT)
def test_a_matrix_that_is_a_copy_of_the_weight_is_kept_too_and_follows_it(case, made):
    model = adapt(Holder(KEPT[case]()))
    move_shifts(model)
    inputs = (images(),) if case == "channels last" else (torch.randn(2, 3, 4),) * 3
    first = model(*inputs)
    torch.testing.assert_close(model(*inputs), first)
    assert made["times"] == 1
    with torch.no_grad():
        next(only_layer(model).base_layer.parameters()).mul_(2)
    assert (model(*inputs) - first).abs().max() > 1e-3
    assert made["times"] == 2


def step(model):
    optimizer = torch.optim.SGD(shifts(model).values(), lr=1.0)
    model(images()).square().mean().backward()
    optimizer.step()


def write_data(model):
    for delta in shifts(model).values():
        delta.data.add_(0.1)


def load(model):
    moved = copy.deepcopy(model)
    write_data(moved)
    model.load_state_dict(moved.state_dict())


def load_adapter(model):
    state = {name.replace(".default", ""): torch.full_like(delta, 0.1) for name, delta in shifts(model).items()}
    set_peft_model_state_dict(model, state)


def add_and_set_adapter(model):
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    move_shifts(model, seed=7)
    model.set_adapter("other")


def change_scale(model):
    for layer in layers(model).values():
        layer.scale["default"] = 0.5


def change_unit(model):
    for layer in layers(model).values():
        layer.relative["default"] = False


def change_base_weights(model):
    with torch.no_grad():
        for layer in layers(model).values():
            layer.base_layer.weight.mul_(1.5)


def replace_base_weights(model):
    for layer in layers(model).values():
        layer.base_layer.weight.data = layer.base_layer.weight.data * 1.5


CHANGES = [step, write_data, load, load_adapter, add_and_set_adapter, change_scale, change_unit]
CHANGES += [change_base_weights, replace_base_weights]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_weights_are_made_again_after_a_change(change, made):
    _, model = convnet()
    before = model(images()).detach()
    change(model)
    made.clear()
    found = model(images())
    assert made["times"] == 2
    assert (found - before).abs().max() > 1e-3
    fresh = pickle.loads(pickle.dumps(model))  # which has nothing made
    assert torch.equal(fresh(images()), found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_are_made_again_in_another_type(dtype, made):
    received, model = convnet()
    model(images())
    model.to(dtype)
    assert all(layer._made is None for layer in layers(model).values())
    found = model(images().to(dtype))
    assert found.dtype == dtype
    expected = reference(received, model, images()).to(dtype)
    torch.testing.assert_close(found, expected, rtol=0.05 if dtype == torch.bfloat16 else 1e-5, atol=0.05)


def test_base_weights_that_are_trained_too_are_followed_through_displacements(made):
    """Memory is handed out again: the weights of two displacements in a row may lie at one address."""
    received, model = convnet()
    weights = [layer.base_layer.weight for layer in layers(model).values()]
    for step_size in (0.0, 0.1, 0.2, 0.3):
        with displaced(weights, [torch.ones_like(w) for w in weights], step_size):
            # The shifts belong to the received singular vectors: W' = W + step + U diag(d) Vᵀ.
            matrices = dense_weights(received, model, ["default"])
            expected = torch.func.functional_call(
                received, {name: matrix + step_size for name, matrix in matrices.items()}, images()
            )
            torch.testing.assert_close(model(images()), expected)


def test_displaced_shifts_are_seen_and_come_back(made):
    received, model = convnet()
    before = model(images())
    values = list(shifts(model).values())
    with displaced(values, [torch.ones_like(v) for v in values], 0.1):
        inside = model(images())
        torch.testing.assert_close(inside, reference(received, model, images()))
    assert (inside - before).abs().max() > 1e-3
    assert torch.equal(model(images()), before)


@pytest.mark.parametrize("by_activations", [True, False])
def test_gradients_of_two_micro_batches_add_up(by_activations, monkeypatch):
    force_path(monkeypatch, by_activations)
    received, model = convnet()
    halves = images().split(2)
    for half in halves:
        (model(half).square().sum()).backward()
    expected = sum(reference(received, model, half).square().sum() for half in halves)
    naive = torch.autograd.grad(expected, list(shifts(model).values()))
    for delta, gradient in zip(shifts(model).values(), naive, strict=True):
        torch.testing.assert_close(delta.grad, gradient, rtol=1e-4, atol=1e-5)


def test_what_inference_mode_made_does_not_end_up_in_a_graph(made):
    _, model = convnet()
    with torch.inference_mode():
        model(images())
        model(images())
    assert made["times"] == 2
    x = images().requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None and all(delta.grad is not None for delta in shifts(model).values())


def test_what_was_made_is_in_no_copy_and_in_no_file(made):
    _, model = convnet()
    model(images())
    assert all(layer._made is not None for layer in layers(model).values())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(layer._made is None for layer in layers(other).values())
        assert torch.equal(other(images()), model(images()))


# ---- Which way costs less ----


@pytest.mark.parametrize(
    ("rows", "m", "n", "rank", "factored", "learning", "expected"),
    [
        (197, 768, 768, 768, True, True, True),  # a ViT-B with one image
        (197, 768, 768, 768, True, False, True),
        (32 * 197, 768, 768, 768, True, True, False),  # a batch: making W' is negligible
        (32 * 197, 768, 768, 768, True, False, False),
        (32 * 197, 768, 768, 16, False, True, True),  # few shifts: cheap on activations, and no gradient of W'
        (197, 3072, 768, 768, True, True, True),
        (32 * 197, 3072, 768, 768, True, True, True),  # a wide layer, m + n against m · n
        (32 * 32 * 128, 64, 64 * 9, 64, True, True, True),  # convolutions of a ResNet-18 with a batch of 128
        (4 * 4 * 128, 512, 512 * 9, 512, True, True, True),
        (32 * 32 * 128, 64, 64 * 9, 64, True, False, False),
        (32 * 32 * 32, 64, 3 * 49, 64, True, True, False),  # its first one: as good as equal, and keeps less
        (1, 10, 512, 10, True, True, True),
    ],
)
def test_the_cheaper_way_is_taken(rows, m, n, rank, factored, learning, expected):
    assert cheaper_by_activations(rows, m, n, rank, factored, learning) == expected


def test_a_layer_counts_the_rows_it_is_applied_to(monkeypatch):
    seen = []
    monkeypatch.setattr(layer_module, "cheaper_by_activations", lambda rows, *rest: seen.append((rows, *rest)) or True)
    cases = [
        (nn.Linear(4, 6), torch.randn(2, 5, 4), 10, 6, 4),
        (nn.Conv2d(3, 4, 3, stride=2, padding=1), torch.randn(2, 3, 9, 8), 2 * 5 * 4, 4, 27),
        (nn.Conv1d(3, 4, 3, padding="same"), torch.randn(3, 7), 7, 4, 9),
        (nn.Conv3d(1, 2, (1, 2, 3), dilation=(1, 2, 1)), torch.randn(2, 1, 4, 5, 6), 2 * 4 * 3 * 4, 2, 6),
    ]
    for layer, x, rows, m, n in cases:
        model = adapt(Holder(layer))
        output = model(x)
        assert seen.pop() == (rows, m, n, min(m, n), True, True)
        assert rows == output.numel() // m
        with torch.no_grad():
            model(x)
        assert seen.pop() == (rows, m, n, min(m, n), True, False)


def test_frozen_layers_below_the_first_tuned_one_take_no_backward_pass():
    received = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    for by_activations in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            force_path(patch, by_activations)
            model = adapt(received, target_modules=["1"])
            outputs = [torch.randn(2, 4)]
            for inner in model.base_model.model:
                outputs.append(inner(outputs[-1]))
            assert [output.requires_grad for output in outputs] == [False, False, True, True]
            outputs[-1].sum().backward()
            assert all(p.grad is None for name, p in model.named_parameters() if "singular_delta" not in name)


def test_an_adapted_convolution_keeps_its_input_and_its_projection_for_backward_and_no_copy_of_either(monkeypatch):
    force_path(monkeypatch, by_activations=True)
    model = adapt(Holder(nn.Conv2d(3, 4, 3, bias=True)))
    own = {tensor.data_ptr() for tensor in model.parameters()}
    x, kept = torch.randn(2, 3, 9, 9, requires_grad=True), {}

    def keep(tensor):
        if tensor.data_ptr() not in own and tensor.numel() > 4:  # more than the singular values
            kept[tensor.data_ptr()] = tensor.shape
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(x)
    assert sorted(kept.values()) == [(2, 3, 9, 9), (2, 4, 7, 7)]


@pytest.mark.parametrize("by_activations", [True, False])
def test_the_bias_of_an_adapted_convolution_can_be_trained_too(by_activations, monkeypatch):
    force_path(monkeypatch, by_activations)
    received = Holder(nn.Conv2d(2, 4, 3))
    model = adapt(received)
    bias = only_layer(model).base_layer.bias.requires_grad_()
    for run in (model, received):
        run(images()).square().sum().backward()
        run(images()[0]).square().sum().backward()  # without a dimension of samples
    torch.testing.assert_close(bias.grad, received.layer.bias.grad)
