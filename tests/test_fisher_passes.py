"""An estimate leaves no mark: weights, buffers, random state, modes and `.grad`, however it ends."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_fisher_models import (
    CLASSES,
    Scripted,
    assert_same_gradient,
    estimate,
    flat,
    make_batch,
    resnet,
    select,
    vit,
)
from torch import nn

from hf_fip.fisher import TraceEstimator, fisher_diagonal
from hf_fip.fisher.passes import RandomState


class Reassigning(nn.Module):
    """A layer that puts a new tensor in its buffer's place, and another one in its empty buffer's."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, CLASSES)
        self.register_buffer("mean", torch.zeros(CLASSES))
        self.register_buffer("last", None)

    def forward(self, x):
        logits = self.linear(x)
        self.last = logits.detach().mean(0)
        self.mean = 0.9 * self.mean + self.last
        return logits


def mixed_modes() -> nn.Module:
    """A ResNet in training whose first BatchNorm is frozen in eval mode."""
    model = resnet().train()
    next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d)).eval()
    return model


MODELS = {
    "resnet, train": (lambda: resnet().train(), "resnet"),
    "resnet, mixed modes": (mixed_modes, "resnet"),
    "resnet, eval": (resnet, "resnet"),
    "vit with dropout": (lambda: vit(hidden_dropout_prob=0.3).train(), "vit"),
    "reassigned buffers": (lambda: Reassigning().train(), "linear"),
}
USES = {
    "sampled_sum, finite difference": {"estimator": "sampled_sum", "gradient": "finite_difference"},
    "sampled_sum, double backward": {"estimator": "sampled_sum", "gradient": "double_backward"},
    "signed_sum, finite difference": {"estimator": "signed_sum", "gradient": "finite_difference"},
    "exact, double backward": {"estimator": "exact", "gradient": "double_backward"},
    "diagonal": None,
}


def use(model, batches, options) -> None:
    if options is None:
        fisher_diagonal(model, batches, generator=torch.Generator().manual_seed(0))
    else:
        estimate(model, batches, **options)


def marks(model: nn.Module) -> dict:
    """All that an estimate could change, weights by place in memory as well as by value."""
    places = {name: module._buffers for name, module in model.named_modules()}
    return {
        "weights": {name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()},
        "buffers": {
            f"{place}.{name}": None if buffer is None else (id(buffer), buffer.data_ptr(), buffer.clone())
            for place, buffers in places.items()
            for name, buffer in buffers.items()
        },
        "modes": [module.training for module in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grad": [None if p.grad is None else (id(p.grad), p.grad.clone()) for p in model.parameters()],
    }


def assert_unmarked(model: nn.Module, before: dict) -> None:
    torch.testing.assert_close(marks(model), before, rtol=0, atol=0)


every_model = pytest.mark.parametrize("case", MODELS)
every_use = pytest.mark.parametrize("how", USES)


@every_model
@every_use
@pytest.mark.parametrize("graded", [True, False], ids=["with .grad", "without .grad"])
def test_an_estimate_leaves_no_mark_on_the_model(case, how, graded):
    make, name = MODELS[case]
    model, batch = make(), make_batch(name)
    for parameter in model.parameters() if graded else ():
        parameter.grad = torch.randn_like(parameter)
    before = marks(model)
    use(model, [batch, batch], USES[how])
    assert_unmarked(model, before)


@every_model
@pytest.mark.parametrize("how", [how for how, options in USES.items() if options and "exact" not in how])
def test_the_second_pass_leaves_no_mark_after_a_forward_pass_of_the_caller(case, how):
    """As in training: the task's own forward pass moves BatchNorm and the random state, and the estimate neither."""
    make, name = MODELS[case]
    model, batch = make(), make_batch(name)
    inputs = {key: tensor for key, tensor in batch.items() if key != "labels"}
    found = RandomState.capture()
    outputs = model(**inputs)
    moved, drawn = marks(model), torch.get_rng_state()
    estimator = TraceEstimator(model, **USES[how])
    estimator.observe(batch, torch.Generator().manual_seed(0), outputs=outputs, random_state=found)
    estimator.estimate()
    assert_unmarked(model, moved)
    assert torch.equal(torch.get_rng_state(), drawn)
    (outputs if isinstance(outputs, torch.Tensor) else outputs.logits).sum().backward()  # its graph is still there


@every_model
@pytest.mark.parametrize("how", [how for how in USES if how != "diagonal"])
def test_estimate_leaves_torch_s_random_state_as_it_found_it(case, how):
    make, name = MODELS[case]
    estimator = TraceEstimator(make(), **USES[how])
    estimator.observe(make_batch(name), torch.Generator().manual_seed(0))
    torch.rand(3)
    found = torch.get_rng_state()
    estimator.estimate()
    assert torch.equal(torch.get_rng_state(), found)


# ---- The same function in both passes ----


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "activation checkpointing"])
@pytest.mark.parametrize("gradient", ["finite_difference", "double_backward"])
def test_both_passes_see_the_same_dropout_mask(gradient, checkpointing):
    """Against plain autograd with that mask. Another mask in the second pass would add a jump / ε to the gradient."""
    model, batch = vit(hidden_dropout_prob=0.3).train(), make_batch("vit", rows=8)
    labels = batch["labels"]
    torch.manual_seed(7)
    log_prob = F.log_softmax(model(batch["pixel_values"]).logits, dim=-1)[torch.arange(8), labels].sum()
    score = torch.autograd.grad(log_prob, list(model.parameters()), create_graph=True)
    trace = sum(s.square().sum() for s in score) / 8
    expected = flat(torch.autograd.grad(trace, list(model.parameters())))

    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for epsilon in (1e-3, 1e-4):
        torch.manual_seed(7)
        value, found = estimate(model, [batch], likelihood=Scripted(labels), gradient=gradient, epsilon=epsilon)
        torch.testing.assert_close(value, trace.detach(), rtol=1e-4, atol=0)
        assert_same_gradient(found, expected)
    _, other_mask = estimate(model, [batch], likelihood=Scripted(labels), gradient=gradient)
    assert not torch.allclose(other_mask, expected, rtol=0.1)


class Masked(nn.Module):
    """Drops features as models of speech do: by a generator that is not torch's."""

    def __init__(self, draw):
        super().__init__()
        self.linear, self.head, self.draw = nn.Linear(5, 8), nn.Linear(8, CLASSES), draw

    def forward(self, x):
        kept = torch.tensor([self.draw() > 0.5 for _ in range(5)], dtype=x.dtype)
        return self.head(torch.tanh(self.linear(x * kept)))


@pytest.mark.parametrize("draw", [np.random.rand, random.random], ids=["NumPy", "Python"])
def test_both_passes_see_the_same_mask_whichever_generator_draws_it(draw):
    torch.manual_seed(0)
    model, batch, found = Masked(draw).train(), make_batch("linear", rows=8), []
    for epsilon in (1e-2, 1e-3):
        np.random.seed(7)
        random.seed(7)
        found.append(estimate(model, [batch], likelihood=Scripted(batch["labels"]), epsilon=epsilon)[1])
    assert_same_gradient(*found)  # another mask would add a jump / ε


def test_each_micro_batch_gets_its_own_dropout_mask_back():
    model, batch = vit(hidden_dropout_prob=0.3).train(), make_batch("vit", rows=8)
    found = []
    for gradient in ("finite_difference", "double_backward"):
        torch.manual_seed(7)
        halves = [select(batch, slice(0, 4)), select(batch, slice(4, 8))]
        options = {"likelihood": Scripted(batch["labels"]), "gradient": gradient, "epsilon": 1e-4}
        found.append(estimate(model, halves, **options)[1])
    assert_same_gradient(*found)


def test_exact_and_diagonal_are_taken_in_eval_mode():
    quiet, noisy, batch = vit(), vit(hidden_dropout_prob=0.5).train(), make_batch("vit", rows=16)
    for labels in ("empirical", "sampled"):  # the draw of the labels as well
        options = {"estimator": "exact", "labels": labels, "gradient": "double_backward"}
        assert torch.equal(estimate(quiet, [batch], **options)[1], estimate(noisy, [batch], **options)[1])
        seeded = [torch.Generator().manual_seed(0) for _ in range(2)]
        diagonals = [
            flat(fisher_diagonal(model, [batch], labels=labels, generator=generator).values())
            for model, generator in zip((quiet, noisy), seeded, strict=True)
        ]
        assert torch.equal(*diagonals)


# ---- Interrupted ----


class Fuse:
    """A forward hook that blows at the n-th call."""

    def __init__(self, error: BaseException, calls: int):
        self.error, self.calls = error, calls

    def __call__(self, *_):
        self.calls -= 1
        if self.calls == 0:
            raise self.error


ERRORS = [RuntimeError("out of memory"), KeyboardInterrupt()]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("calls", [1, 2, 3, 4])
@every_use
@pytest.mark.parametrize("case", ["resnet, train", "resnet, mixed modes", "reassigned buffers"])
def test_an_interrupted_estimate_leaves_no_mark(case, how, calls, error):
    """Passes 1 and 2 are the first ones of two micro-batches, 3 and 4 the second ones."""
    make, name = MODELS[case]
    model, batch = make(), make_batch(name)
    before = marks(model)
    list(model.modules())[-1].register_forward_hook(Fuse(error, calls))
    with pytest.raises(type(error)):
        use(model, [batch, batch], USES[how])
    assert_unmarked(model, before)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_interrupted_second_pass_gives_the_random_state_back(error):
    model = vit(hidden_dropout_prob=0.3).train()
    estimator = TraceEstimator(model)
    estimator.observe(make_batch("vit"), torch.Generator().manual_seed(0))
    torch.rand(3)
    found = torch.get_rng_state()
    model.classifier.register_forward_hook(Fuse(error, 1))
    with pytest.raises(type(error)):
        estimator.estimate()
    assert torch.equal(torch.get_rng_state(), found)
    assert not estimator.pending  # and what was observed is not counted twice


def test_an_estimator_starts_over_after_each_estimate():
    model, batch = vit(), make_batch("vit")
    estimator = TraceEstimator(model, labels="empirical", estimator="signed_sum")
    found = []
    for _ in range(2):
        estimator.observe(batch, torch.Generator().manual_seed(0))
        found.append(estimator.estimate())
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(flat(found[0][1]), flat(found[1][1]))
