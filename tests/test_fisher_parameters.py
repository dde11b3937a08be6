"""Which parameters count, which models and data are taken, and what is refused, with the way out."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_fisher_models import (
    CLASSES,
    MODELS,
    TEXT_MODELS,
    estimate,
    flat,
    gpt2,
    linear,
    make_batch,
    marian,
    select,
    t5,
    vit,
)
from torch import nn

from hf_fip.fisher import Categorical, TraceEstimator, fisher_diagonal, fisher_trace
from hf_fip.fisher.trace import check_choice

CLOSE = {"rtol": 1e-4, "atol": 1e-7}
SUM = {"estimator": "signed_sum", "labels": "empirical"}

every_gradient = pytest.mark.parametrize(
    "options",
    [
        {"estimator": "exact", "gradient": "double_backward"},
        {"estimator": "signed_sum", "gradient": "double_backward"},
        {"estimator": "signed_sum", "gradient": "finite_difference"},
    ],
    ids=lambda options: " ".join(options.values()),
)


# ---- Frozen, tied, unused ----


def frozen_but_head() -> nn.Module:
    model = vit().requires_grad_(False)
    model.classifier.requires_grad_(True)
    return model


@every_gradient
def test_frozen_parameters_are_left_out(options):
    model, batch = frozen_but_head(), make_batch("vit")
    whole = fisher_diagonal(vit(), [batch], labels="empirical")
    head = {name: values for name, values in whole.items() if name.startswith("classifier")}
    diagonal = fisher_diagonal(model, [batch], labels="empirical")
    assert list(diagonal) == ["classifier.weight", "classifier.bias"]
    torch.testing.assert_close(diagonal, head, **CLOSE)

    estimator = TraceEstimator(model, labels="empirical", **options)
    estimator.observe(batch)
    value, gradient = estimator.estimate()
    assert [tensor.shape for tensor in gradient] == [p.shape for p in model.classifier.parameters()]
    assert value > 0 and all(tensor.any() for tensor in gradient)
    if options["estimator"] == "exact":
        torch.testing.assert_close(value, flat(head.values()).sum().float(), **CLOSE)


class Tied(nn.Module):
    """W is used twice, under two names: logits = W tanh(W x)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x):
        return SimpleNamespace(logits=self.second(torch.tanh(self.first(x))))


def test_a_tied_parameter_counts_once_with_the_sum_of_both_uses_as_its_score():
    model, batch = Tied(), make_batch("linear")
    x, w = batch["x"], model.first.weight.detach()
    hidden = torch.tanh(x @ w.T)
    error = F.one_hot(batch["labels"], 5) - torch.softmax(hidden @ w.T, dim=-1)
    of_second = error[:, :, None] * hidden[:, None, :]
    of_first = ((error @ w) * (1 - hidden**2))[:, :, None] * x[:, None, :]
    score = of_first + of_second
    diagonal = fisher_diagonal(model, [batch], labels="empirical")
    assert list(diagonal) == ["first.weight"]
    torch.testing.assert_close(diagonal["first.weight"], score.square().mean(0), **CLOSE)
    trace = torch.tensor(fisher_trace(model, batch, labels="empirical"))
    torch.testing.assert_close(trace, score.square().sum((1, 2)).mean(), **CLOSE)


@pytest.mark.parametrize("make", [t5, marian, gpt2])
def test_the_tied_embeddings_of_a_language_model_count_once(make):
    model = make()
    ids = {id(p) for p in model.parameters() if p.requires_grad}
    diagonal = fisher_diagonal(model, [make_batch(make.__name__)], labels="empirical")
    assert len(diagonal) == len(ids) < len([p for _, p in model.named_parameters(remove_duplicate=False)])


class PartlyUsed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.unused, self.linear = nn.Linear(2, 2), nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.linear(x)


@every_gradient
def test_unused_parameters_have_a_fisher_and_a_gradient_of_zero(options):
    model, batch = PartlyUsed(), make_batch("linear")
    diagonal = fisher_diagonal(model, [batch], labels="empirical")
    assert not diagonal["unused.weight"].any() and diagonal["linear.weight"].all()
    estimator = TraceEstimator(model, labels="empirical", **options)
    estimator.observe(batch)
    _, gradient = estimator.estimate()
    assert not gradient[0].any() and not gradient[1].any() and gradient[2].any()


# ---- Token sequences and multi-label outputs, end to end ----


@pytest.mark.parametrize("name", TEXT_MODELS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("labels", ["sampled", "empirical"])
def test_text_models_go_through_every_estimator_with_nothing_but_labels(name, attention, labels):
    model = MODELS[name]()
    model.set_attn_implementation(attention)
    batch = make_batch(name)
    exact = fisher_trace(model, batch, labels=labels, generator=torch.Generator().manual_seed(0))
    diagonal = fisher_diagonal(model, [batch], labels=labels, generator=torch.Generator().manual_seed(0))
    assert exact == pytest.approx(flat(diagonal.values()).sum().item(), rel=1e-4) and exact > 0
    value, gradient = estimate(model, [batch], estimator="signed_sum", labels=labels)
    assert value > 0 and torch.isfinite(gradient).all() and gradient.norm() > 0


@pytest.mark.parametrize("name", ["marian", "gpt2"])
def test_the_sequences_of_a_batch_are_its_samples_whatever_their_length(name):
    """Summed over the tokens of a row, not averaged: a row of none is a sample with a score of zero."""
    model, batch = MODELS[name](), make_batch(name, rows=2)
    alone = fisher_trace(model, select(batch, slice(0, 1)), labels="empirical")
    batch["labels"][1] = -100
    together = fisher_trace(model, batch, labels="empirical")
    assert together == pytest.approx(alone / 2, rel=1e-4)


def test_the_names_of_inputs_and_labels_are_the_caller_s():
    model, batch = linear(), make_batch("linear")
    expected = fisher_diagonal(model, [batch], labels="empirical")
    renamed = {"x": batch["x"], "target": batch["labels"]}
    torch.testing.assert_close(fisher_diagonal(model, [renamed], labels="empirical", label_name="target"), expected)
    assert fisher_trace(model, renamed, labels="empirical", label_name="target") > 0
    estimator = TraceEstimator(model, **SUM, label_name="target")
    estimator.observe(renamed)
    assert estimator.pending
    with pytest.raises(ValueError, match="no 'labels'.*it has: x, target.*`label_name`, of a trainer by"):
        fisher_trace(model, renamed)


# ---- Refused ----

REFUSED = {
    "unknown estimator": (
        {"estimator": "best"},
        "trace_estimator='best' is not one of sampled_sum, signed_sum, exact",
    ),
    "unknown gradient": ({"gradient": "magic"}, "trace_gradient='magic' is not one of finite_difference, double_back"),
    "unknown labels": ({"labels": "true"}, "fisher_labels='true' is not one of sampled, empirical"),
    "exact by finite difference": (
        {"estimator": "exact", "gradient": "finite_difference"},
        "use trace_gradient='double_backward', or a ",
    ),
    "sampled_sum of clean labels": (
        {"estimator": "sampled_sum", "labels": "empirical"},
        "use trace_estimator='signed_sum' with empirical labels",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_names_that_do_not_exist_and_pairs_that_do_not_go_together_are_refused(case):
    choice, message = REFUSED[case]
    choice = {"estimator": "sampled_sum", "gradient": "finite_difference", "labels": "sampled"} | choice
    with pytest.raises(ValueError, match=message):
        check_choice(**choice)
    with pytest.raises(ValueError, match=message):
        TraceEstimator(linear(), **choice)


def test_fisher_trace_and_diagonal_refuse_unknown_labels():
    for use in (
        lambda: fisher_trace(linear(), make_batch("linear"), labels="true"),
        lambda: diagonal_of(labels="true"),
    ):
        with pytest.raises(ValueError, match="fisher_labels='true' is not one of sampled, empirical"):
            use()


def diagonal_of(model=None, batches=None, **options):
    return fisher_diagonal(model or linear(), [make_batch("linear")] if batches is None else batches, **options)


@pytest.mark.parametrize("epsilon", [0.0, -1e-3, float("nan")])
def test_a_step_that_is_not_positive_is_refused(epsilon):
    with pytest.raises(ValueError, match=f"trace_epsilon={epsilon} has to be positive"):
        TraceEstimator(linear(), epsilon=epsilon)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_finite_differences_of_half_precision_weights_are_refused(dtype):
    with pytest.raises(ValueError, match="needs float32 weights.*bf16=True or fp16=True, or.*double_backward"):
        TraceEstimator(linear().to(dtype))


@pytest.mark.parametrize("chunk_size", [0, -1])
def test_chunks_of_no_sample_are_refused(chunk_size):
    for use in (
        lambda: fisher_trace(linear(), make_batch("linear"), chunk_size=chunk_size),
        lambda: diagonal_of(chunk_size=chunk_size),
    ):
        with pytest.raises(ValueError, match=f"fisher_chunk_size={chunk_size} has to be at least 1"):
            use()


def test_a_model_without_trainable_parameters_is_refused():
    model = linear().requires_grad_(False)
    for use in (lambda: TraceEstimator(model), lambda: diagonal_of(model), lambda: fisher_trace(model, {})):
        with pytest.raises(ValueError, match="no trainable parameter.*requires_grad_"):
            use()


@pytest.mark.parametrize("batches", [[], iter(())], ids=["no batch", "an empty iterator"])
def test_the_diagonal_of_no_data_is_refused(batches):
    with pytest.raises(ValueError, match="at least one sample, and the data were empty"):
        diagonal_of(batches=batches)


def test_the_diagonal_of_one_batch_is_refused():
    with pytest.raises(ValueError, match=r"pass \[batch\]"):
        fisher_diagonal(linear(), make_batch("linear"))


def test_an_estimate_of_nothing_is_refused():
    with pytest.raises(ValueError, match="Nothing was observed"):
        TraceEstimator(linear()).estimate()


def test_outputs_without_the_random_state_before_them_are_refused():
    model, batch = linear(), make_batch("linear")
    with pytest.raises(ValueError, match="`random_state` from before their forward pass"):
        TraceEstimator(model).observe(batch, outputs=model(batch["x"]))


@pytest.mark.parametrize(
    ("estimator", "labels"),
    [("exact", "sampled"), ("exact", "empirical"), ("sampled_sum", "sampled"), ("signed_sum", "empirical")],
)
def test_a_model_without_logits_and_a_batch_without_labels_are_refused(estimator, labels):
    batch = make_batch("vit")
    with pytest.raises(ValueError, match="no `logits`.*load it with a task head"):
        fisher_trace(vit().vit, batch, estimator=estimator, labels=labels, likelihood=Categorical())
    with pytest.raises(ValueError, match="no 'labels'.*it has: pixel_values"):
        fisher_trace(vit(), {"pixel_values": batch["pixel_values"]}, estimator=estimator, labels=labels)


def test_double_backward_through_a_kernel_without_one_names_the_way_out():
    options = {"gradient": "double_backward", **SUM}
    with pytest.raises(ValueError, match="no second derivative.*attn_implementation='eager'.*finite_difference"):
        estimate(vit("sdpa"), [make_batch("vit")], **options)


def test_exact_needs_no_other_kernel():
    options = {"estimator": "exact", "labels": "empirical", "gradient": "double_backward"}
    value, gradient = estimate(vit("sdpa"), [make_batch("vit")], **options)
    same_value, same_gradient = estimate(vit("eager"), [make_batch("vit")], **options)
    torch.testing.assert_close(value, same_value, **CLOSE)
    torch.testing.assert_close(gradient, same_gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max().item())


def test_a_flat_point_has_a_trace_and_a_gradient_of_zero():
    class Constant(Categorical):
        def log_prob(self, logits, labels):
            return super().log_prob(logits, labels) * 0

    value, gradient = estimate(linear(), [make_batch("linear")], likelihood=Constant())
    assert value == 0 and not gradient.any()
