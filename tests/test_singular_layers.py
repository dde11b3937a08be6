"""Every kind of layer, by both ways to compute: output, gradients and second derivatives of the naive formula."""

import copy

import pytest
import torch
import torch.nn.functional as F
from singular_cases import Holder, adapt, force_path, layers, move_shifts, only_layer, reference, shifts
from torch import nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.pytorch_utils import Conv1D


class OwnForward(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.flip(0), self.bias).relu()


class OwnLookUp(nn.Embedding):
    def forward(self, x):
        return super().forward(x + 1)


def conv(kind, *args, **options):
    return lambda: kind(*args, **options)


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


TOKENS = torch.tensor([[0, 1, 5], [3, 0, 1]])
KINDS = {  # the layer, its input, whether it can be computed on the activations
    "linear": (lambda: nn.Linear(7, 5), numbers(4, 7), True),
    "linear, tall, no bias": (lambda: nn.Linear(3, 8, bias=False), numbers(2, 3, 3), True),
    "linear, one row": (lambda: nn.Linear(5, 1), numbers(5), True),
    "linear, own forward": (lambda: OwnForward(7, 5), numbers(4, 7), False),
    "transformers' Conv1D": (lambda: Conv1D(5, 7), numbers(2, 3, 7), True),
    "conv1d": (conv(nn.Conv1d, 3, 4, 3, padding="same", dilation=2), numbers(2, 3, 9), True),
    "conv1d, stride": (conv(nn.Conv1d, 3, 9, 2, stride=2, padding=1), numbers(2, 3, 9), True),
    "conv2d": (conv(nn.Conv2d, 3, 4, 3, stride=2, padding=1), numbers(2, 3, 6, 6), True),
    "conv2d, unbatched": (conv(nn.Conv2d, 3, 4, 3), numbers(3, 6, 6), True),
    "conv2d, no bias": (conv(nn.Conv2d, 3, 4, (1, 3), padding="valid", bias=False), numbers(2, 3, 6, 6), True),
    "conv2d, circular": (conv(nn.Conv2d, 3, 4, 3, padding=1, padding_mode="circular"), numbers(2, 3, 6, 6), True),
    "conv2d, same, reflect": (
        conv(nn.Conv2d, 3, 4, (3, 2), padding="same", padding_mode="reflect"),
        numbers(2, 3, 6, 6),
        True,
    ),
    "conv2d, groups": (conv(nn.Conv2d, 4, 6, 3, groups=2, dilation=2, padding=2), numbers(2, 4, 6, 6), False),
    "conv2d, depthwise": (conv(nn.Conv2d, 4, 4, 3, groups=4, padding=1), numbers(2, 4, 6, 6), False),
    "conv2d, channels last": (
        lambda: nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last),
        numbers(2, 3, 6, 6),
        True,
    ),
    "conv3d": (conv(nn.Conv3d, 2, 3, 2, stride=(1, 2, 1), padding=1), numbers(2, 2, 4, 4, 4), True),
    "embedding": (lambda: nn.Embedding(6, 4), TOKENS, True),
    "embedding, padding": (lambda: normal_rows(nn.Embedding(6, 4, padding_idx=1)), TOKENS, True),
    "embedding, by frequency": (lambda: nn.Embedding(6, 4, scale_grad_by_freq=True), TOKENS, False),
    "embedding, scaled": (lambda: BartScaledWordEmbedding(6, 4, None, embed_scale=2.5), TOKENS, True),
    "embedding, own forward": (lambda: OwnLookUp(7, 4), TOKENS, False),
    "attention": (lambda: nn.MultiheadAttention(8, 2, batch_first=True), (numbers(2, 3, 8),) * 3, False),
    "attention, no bias": (lambda: nn.MultiheadAttention(8, 2, bias=False), (numbers(3, 2, 8),) * 3, False),
}
every_kind = pytest.mark.parametrize("case", KINDS)
both_paths = pytest.mark.parametrize("by_activations", [True, False], ids=["activations", "weight"])


def normal_rows(embedding: nn.Embedding) -> nn.Embedding:
    nn.init.normal_(embedding.weight)  # the padding row is zero otherwise
    return embedding


def make(case: str) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    layer, inputs, _ = KINDS[case]
    torch.manual_seed(0)
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    inputs = tuple(x.clone().requires_grad_(x.is_floating_point()) for x in inputs)
    return Holder(layer()).requires_grad_(False), inputs


def derivatives(output: torch.Tensor, model: nn.Module, inputs) -> list[torch.Tensor]:
    """The gradients of a function of the output, and those of their square."""
    wanted = [*shifts(model).values(), *(x for x in inputs if x.requires_grad)]
    weights = numbers(*output.shape)
    first = torch.autograd.grad((output * weights).sum() + output.pow(3).sum(), wanted, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), wanted)
    return [*first, *second]


def close(found, expected, tolerance: float = 1e-4) -> bool:
    return bool((found - expected).abs().max() <= tolerance * (1e-3 + expected.abs().max()))


@both_paths
@every_kind
def test_an_adapted_layer_starts_as_the_received_one(case, by_activations, monkeypatch):
    force_path(monkeypatch, by_activations)
    received, inputs = make(case)
    for options in ({}, {"rank": 1}):
        found, expected = adapt(received, target_modules=["layer"], **options)(*inputs), received(*inputs)
        assert found.shape == expected.shape and found.dtype == expected.dtype
        assert (found - expected).abs().max() <= 1e-6 * max(1.0, expected.abs().max().item())


SHIFTED = {
    "all": {},
    "leading": {"rank": 3},
    "scaled": {"scale": 2.0},
    "absolute": {"relative": False},
    "absolute, scaled": {"relative": False, "scale": 2.0},
}


@both_paths
@pytest.mark.parametrize("options", SHIFTED.values(), ids=SHIFTED)
@every_kind
def test_output_gradients_and_second_derivatives_are_those_of_the_naive_formula(
    case, options, by_activations, monkeypatch
):
    taken = force_path(monkeypatch, by_activations)
    received, inputs = make(case)
    if case == "linear, one row" and "rank" in options:
        options = {"rank": 1}
    model = adapt(received, target_modules=["layer"], **options)
    move_shifts(model, size=0.5)
    assert only_layer(model).scale == {"default": options.get("scale", 1.0)}
    found, expected = model(*inputs), reference(received, model, *inputs)
    assert taken == {"activations" if by_activations and KINDS[case][2] else "weight": 1}
    assert close(found, expected)
    assert not close(found, received(*inputs), 1e-2)
    for ours, naive in zip(derivatives(found, model, inputs), derivatives(expected, model, inputs), strict=True):
        assert close(ours, naive)
    assert all(p.grad is None and not p.requires_grad for p in received.parameters())


@both_paths
@every_kind
def test_the_shifts_of_several_active_adapters_add_up(case, by_activations, monkeypatch):
    taken = force_path(monkeypatch, by_activations)
    received, inputs = make(case)
    model = adapt(received, target_modules=["layer"], rank=1)
    config = copy.deepcopy(model.peft_config["default"])
    config.scale, config.rank, config.relative = 0.5, 3 if case != "linear, one row" else 1, False
    model.add_adapter("other", config)
    model.base_model.set_adapter(["default", "other"])
    move_shifts(model, size=0.5)
    found, expected = model(*inputs), reference(received, model, *inputs, names=("default", "other"))
    assert taken == {"activations" if by_activations and KINDS[case][2] else "weight": 1}
    assert close(found, expected)
    assert len(shifts(model)) == 2
    for ours, naive in zip(derivatives(found, model, inputs), derivatives(expected, model, inputs), strict=True):
        assert close(ours, naive)


@both_paths
@pytest.mark.parametrize("relative", [True, False])
def test_a_singular_value_does_not_fall_below_zero_and_has_no_gradient_there(relative, by_activations, monkeypatch):
    force_path(monkeypatch, by_activations)
    received, (x,) = make("linear")
    model = adapt(received, scale=2.0, relative=relative)
    layer = only_layer(model)
    delta, basis = layer.singular_delta["default"], layer.basis["default"]
    delta.data[1] = -1.0 if relative else -basis.sigma[1]  # at scale 2: to −σ
    output = model(x)
    values = basis.sigma.clone()
    values[1] = 0.0
    weight = (basis.u * values) @ basis.vt
    torch.testing.assert_close(output, F.linear(x, weight, received.layer.bias))
    output.square().sum().backward()
    assert delta.grad[1] == 0 and (delta.grad[[0, 2, 3, 4]] != 0).all()


@both_paths
def test_a_sparse_embedding_gets_the_gradient_of_a_dense_one(by_activations, monkeypatch):
    force_path(monkeypatch, by_activations)
    gradients = []
    for sparse in (True, False):
        torch.manual_seed(0)
        model = adapt(Holder(nn.Embedding(6, 4, sparse=sparse)))
        model(TOKENS).square().sum().backward()
        gradients.append(only_layer(model).singular_delta["default"].grad)
    torch.testing.assert_close(*gradients)


@both_paths
def test_the_hooks_and_the_replaced_forward_of_a_received_layer_still_run(by_activations, monkeypatch):
    force_path(monkeypatch, by_activations)
    received, (x,) = make("linear")
    received.layer.register_forward_hook(lambda module, args, output: 2 * output)
    received.layer.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    model = adapt(received)
    move_shifts(model)
    torch.testing.assert_close(model(x), reference(received, model, x))
    received, (x,) = make("linear")
    model = adapt(received)
    base_layer = only_layer(model).base_layer
    base_layer.forward = lambda x: F.linear(x, base_layer.weight).exp()
    torch.testing.assert_close(model(x), F.linear(x, received.layer.weight).exp())


# ---- Attention inside torch's encoder layers, whose fast path reads the weights themselves ----


@pytest.mark.parametrize("targets", ["all", ["linear1", "linear2"], ["self_attn"]])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_the_fast_path_of_an_encoder_does_not_bypass_the_adapter(targets, padded, grad):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    received = nn.TransformerEncoder(layer, 2).eval().requires_grad_(False)
    model = adapt(received, target_modules=targets)
    x = numbers(2, 4, 8)
    mask = {"src_key_padding_mask": torch.tensor([[False] * 4, [False, False, True, True]])} if padded else {}
    kept = ~mask["src_key_padding_mask"] if padded else torch.ones(2, 4, dtype=torch.bool)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(model(x, **mask)[kept], received(x, **mask)[kept], rtol=1e-5, atol=1e-5)
        move_shifts(model)
        expected = reference(copy.deepcopy(received).train(), model, x, **mask)  # in train mode: torch's slow path
        torch.testing.assert_close(model(x, **mask)[kept], expected[kept], rtol=1e-5, atol=1e-5)
        assert (expected - received(x)).abs().max() > 1e-2
    assert set(layers(model)) == {
        f"layers.{i}.{name}"
        for i in range(2)
        for name in (["self_attn", "linear1", "linear2"] if targets == "all" else targets)
    }
