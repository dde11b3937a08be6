"""The gradient of Tr F: finite differences, double backward and plain autograd agree, in every precision offered."""

import pytest
import torch
import torch.nn.functional as F
from test_fisher_models import (
    CLASSES,
    MODELS,
    Scripted,
    assert_same_gradient,
    cosine,
    estimate,
    flat,
    linear,
    looped_scores,
    make_batch,
    marian,
    resnet,
    script_signs,
    vit,
)
from torch import nn

from hf_fip.fisher import Likelihood, TraceEstimator, fisher_diagonal, fisher_trace

CLOSE = {"rtol": 1e-4, "atol": 1e-6}
SUMS = [("sampled_sum", "sampled"), ("signed_sum", "sampled"), ("signed_sum", "empirical")]

every_sum = pytest.mark.parametrize(("estimator", "labels"), SUMS, ids=[" ".join(pair) for pair in SUMS])


def gradient_of(value: torch.Tensor, model: nn.Module) -> torch.Tensor:
    gradients = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
    return flat(torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), gradients, strict=True))


# ---- Finite differences against double backward; the first has the kernels that the second cannot use ----

LARGER_VIT = {"hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 64, "initializer_range": 0.1}
LARGER_MARIAN = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "init_std": 0.1}
SMOOTH = {
    "linear": (linear, linear, "linear"),
    "vit": (lambda: vit("sdpa"), lambda: vit("eager"), "vit"),
    "larger vit": (lambda: vit("sdpa", **LARGER_VIT), lambda: vit("eager", **LARGER_VIT), "vit"),
    "smooth cnn": (lambda: resnet(smooth=True), lambda: resnet(smooth=True), "resnet"),
    "smooth cnn, batch statistics": (
        lambda: resnet(smooth=True).train(),
        lambda: resnet(smooth=True).train(),
        "resnet",
    ),
    "marian": (lambda: marian("sdpa", **LARGER_MARIAN), lambda: marian("eager", **LARGER_MARIAN), "marian"),
}


@every_sum
@pytest.mark.parametrize("case", SMOOTH)
def test_finite_difference_meets_double_backward_in_float32_at_the_default_step(case, estimator, labels):
    first, second, name = SMOOTH[case]
    batch = make_batch(name, rows=8)
    options = {"estimator": estimator, "labels": labels}
    value, found = estimate(first(), [batch], gradient="finite_difference", **options)
    same_value, expected = estimate(second(), [batch], gradient="double_backward", **options)
    assert value > 0 and expected.norm() > 0
    torch.testing.assert_close(value, same_value, **CLOSE)
    assert_same_gradient(found, expected)


def test_on_a_relu_network_the_two_meet_only_within_the_kinks():
    """A finite step crosses kinks, which second derivatives do not see; a tiny one, in float64, crosses none."""
    model, batch = resnet().double(), make_batch("resnet", rows=8)
    batch["pixel_values"] = batch["pixel_values"].double()
    options = {"estimator": "signed_sum", "labels": "empirical"}
    _, expected = estimate(model, [batch], gradient="double_backward", **options)
    _, within = estimate(model, [batch], epsilon=1e-7, **options)
    _, across = estimate(model, [batch], epsilon=1e-1, **options)
    assert_same_gradient(within, expected)
    assert cosine(across, expected) < 0.99


def test_a_log_likelihood_that_is_linear_in_the_weights_has_no_gradient_of_the_trace():
    class Linear(Likelihood):
        def log_prob(self, logits, labels):
            return logits[:, 0]

        def sample(self, logits, labels, generator=None):
            return labels

    for gradient in ("finite_difference", "double_backward"):
        value, found = estimate(linear(), [make_batch("linear")], likelihood=Linear(), gradient=gradient)
        assert value > 1 and found.norm() < 1e-2 * value


# ---- Against autograd of the formula itself ----


@pytest.mark.parametrize("name", ["linear", "vit", "resnet"])
def test_the_gradient_of_exact_is_autograd_of_a_loop_over_samples(name):
    model, batch = MODELS[name](), make_batch(name)
    scores = looped_scores(model, batch, batch["labels"], create_graph=True)
    trace = torch.stack([score.square().sum() for score in scores]).mean()
    value, found = estimate(model, [batch], estimator="exact", labels="empirical", gradient="double_backward")
    expected = gradient_of(trace, model)
    torch.testing.assert_close(value, trace.detach(), **CLOSE)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_the_gradient_of_exact_is_autograd_of_the_closed_form():
    model, batch = linear(), make_batch("linear")
    error = F.one_hot(batch["labels"], CLASSES) - torch.softmax(model(batch["x"]).logits, dim=-1)
    trace = (error.square().sum(1) * (1 + batch["x"].square().sum(1))).mean()
    value, found = estimate(model, [batch], estimator="exact", labels="empirical", gradient="double_backward")
    torch.testing.assert_close(value, trace.detach(), **CLOSE)
    torch.testing.assert_close(found, gradient_of(trace, model), **CLOSE)


@pytest.mark.parametrize("gradient", ["double_backward", "finite_difference"])
@pytest.mark.parametrize("name", ["linear", "vit"])
def test_the_gradient_of_signed_sum_is_autograd_of_its_formula(monkeypatch, name, gradient):
    model, batch, signs = MODELS[name](), make_batch(name), torch.tensor([1.0, -1.0, -1.0, 1.0])
    script_signs(monkeypatch, signs)
    scores = torch.stack(looped_scores(model, batch, batch["labels"], create_graph=True))
    trace = (signs[:, None] * scores).sum(0).square().sum() / 4
    value, found = estimate(model, [batch], estimator="signed_sum", labels="empirical", gradient=gradient)
    torch.testing.assert_close(value, trace.detach(), **CLOSE)
    assert_same_gradient(found, gradient_of(trace, model))


class SharedMemory(nn.Module):
    """Autograd gives both biases one and the same gradient tensor, and every entry of `shift` one number."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(5, CLASSES, bias=False)
        self.first, self.second = (nn.Parameter(torch.randn(CLASSES)) for _ in range(2))
        self.shift = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return (self.linear(x) + (self.first + self.second)) * torch.tanh(self.linear.weight.sum()) * self.shift.sum()


@pytest.mark.parametrize("gradient", ["double_backward", "finite_difference"])
def test_gradients_that_autograd_returns_in_shared_memory_are_added_up_once(gradient):
    model, batch = SharedMemory(), make_batch("linear", rows=8)
    labels = torch.zeros(8, dtype=torch.long)
    logits = model(batch["x"])
    score = torch.autograd.grad(F.log_softmax(logits, dim=-1)[:, 0].sum(), list(model.parameters()), create_graph=True)
    trace = sum(s.square().sum() for s in score) / 8
    halves = [{"x": batch["x"][:4], "labels": labels[:4]}, {"x": batch["x"][4:], "labels": labels[4:]}]
    value, found = estimate(model, halves, likelihood=Scripted(labels), gradient=gradient, epsilon=1e-4)
    torch.testing.assert_close(value, trace.detach(), **CLOSE)
    assert_same_gradient(found, gradient_of(trace, model))


# ---- Precision ----


@every_sum
def test_the_loss_scale_changes_neither_trace_nor_gradient(estimator, labels):
    model, batch, found = vit(), make_batch("vit"), []
    for scale in (1.0, 1024.0):
        for gradient in ("finite_difference", "double_backward"):
            one = TraceEstimator(model, estimator=estimator, labels=labels, gradient=gradient)
            one.observe(batch, torch.Generator().manual_seed(0), scale=scale)
            found.append(one.estimate())
    for value, gradient in found[1:]:
        torch.testing.assert_close(value, found[0][0], rtol=1e-5, atol=0)
        assert_same_gradient(flat(gradient), flat(found[0][1]))


def test_a_loss_scale_keeps_small_float16_scores_in_both_passes():
    """Small inputs and confident answers: their scores are zero in float16, unless every pass scales them up."""
    model, batch = linear(), make_batch("linear")
    batch["x"] *= 1e-5
    batch["labels"] = torch.zeros_like(batch["labels"])
    model.linear.bias.requires_grad_(False).copy_(torch.tensor([10.0, 0.0, 0.0]))
    options = {"labels": "empirical", "estimator": "signed_sum", "epsilon": 1e4}
    found = {}
    for half, scale in ((False, 1.0), (True, 1.0), (True, 2.0**16)):
        with torch.autocast("cpu", torch.float16, enabled=half):
            one = TraceEstimator(model, **options)
            one.observe(batch, torch.Generator().manual_seed(0), scale=scale)
            found[half, scale] = one.estimate()
    exact, lost, kept = found.values()
    assert lost[0] < 0.5 * exact[0]
    torch.testing.assert_close(kept[0], exact[0], rtol=0.05, atol=0)
    assert cosine(flat(kept[1]), flat(exact[1])) > 0.95


@pytest.mark.parametrize(("estimator", "gradient"), [("exact", None), ("sampled_sum", None), ("signed_sum", None)])
def test_the_trace_in_bf16_autocast_is_close_to_float32(estimator, gradient):
    model, batch = vit(), make_batch("vit", rows=8)
    options = {"estimator": estimator, "labels": "sampled", "likelihood": Scripted(batch["labels"])}
    expected, _ = estimate(model, [batch], gradient=gradient, **options)
    options["likelihood"] = Scripted(batch["labels"])
    with torch.autocast("cpu", torch.bfloat16):
        value, _ = estimate(model, [batch], gradient=gradient, **options)
    assert value.dtype == torch.float32 and value != expected
    torch.testing.assert_close(value, expected, rtol=0.05, atol=0)


@pytest.mark.parametrize("gradient", ["finite_difference", "double_backward"])
def test_the_gradient_inside_one_bf16_autocast_block_is_close_to_float32(gradient):
    """The block remembers its casts of the weights: displaced ones have to be cast anew, and the old ones after."""
    model, batch = vit(), make_batch("vit", rows=8)
    options = {"estimator": "signed_sum", "labels": "empirical", "gradient": gradient, "epsilon": 0.03}
    _, expected = estimate(model, [batch, batch], **options)
    with torch.autocast("cpu", torch.bfloat16):
        before = model(batch["pixel_values"]).logits
        _, found = estimate(model, [batch, batch], **options)
        assert torch.equal(model(batch["pixel_values"]).logits, before)
    assert cosine(found, expected) > 0.95
    assert 0.8 < found.norm() / expected.norm() < 1.25


def autocast_forward(model: nn.Module) -> nn.Module:
    """As accelerate does it: bfloat16 in the forward pass alone, float32 outputs."""
    forward = model.forward

    def in_bf16(*args, **kwargs):
        with torch.autocast("cpu", torch.bfloat16):
            outputs = forward(*args, **kwargs)
        outputs.logits = outputs.logits.float()
        return outputs

    model.forward = in_bf16
    return model


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["vit", "gpt2", "marian"])
def test_scores_through_a_forward_pass_in_bf16_are_close_to_float32(name, attention):
    """By vmap (ViT, GPT-2 with eager attention) and by the loop (the others), with the fused kernel's backward too."""
    plain, half, batch = MODELS[name](attention), autocast_forward(MODELS[name](attention)), make_batch(name)
    expected, found = (fisher_trace(model, batch, labels="empirical") for model in (plain, half))
    assert found != expected and found == pytest.approx(expected, rel=0.05)
    expected, found = (flat(fisher_diagonal(model, [batch], labels="empirical").values()) for model in (plain, half))
    assert cosine(found, expected) > 0.99
    options = {"estimator": "exact", "labels": "empirical", "gradient": "double_backward"}
    expected, found = (estimate(model, [batch], **options)[1] for model in (plain, half))
    assert cosine(found, expected) > 0.95
    options = {"estimator": "signed_sum", "labels": "empirical", "epsilon": 0.03}
    expected, found = (estimate(model, [batch], **options)[1] for model in (plain, half))
    assert cosine(found, expected) > 0.9


def test_half_precision_weights_have_an_exact_trace_and_a_double_backward_gradient():
    model, batch = vit(), make_batch("vit", rows=8)
    options = {"estimator": "signed_sum", "labels": "empirical", "gradient": "double_backward"}
    expected, expected_gradient = estimate(model, [batch], **options)
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    value, gradient = estimate(model.bfloat16(), [batch], **options)
    torch.testing.assert_close(value, expected, rtol=0.05, atol=0)
    assert cosine(gradient, expected_gradient) > 0.95


def test_float64_models_have_a_float64_trace():
    model, batch = vit().double(), make_batch("vit")
    batch["pixel_values"] = batch["pixel_values"].double()
    for estimator in ("exact", "signed_sum"):
        value, _ = estimate(model, [batch], estimator=estimator, labels="empirical", gradient=None)
        assert value.dtype == torch.float64
