"""The estimators of Tr F: unbiased, indifferent to the split of a batch, and with the right gradient."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from test_fisher_models import (
    CLASSES,
    MODELS,
    Scripted,
    assert_same_gradient,
    estimate,
    flat,
    linear,
    looped_scores,
    make_batch,
    script_signs,
    select,
    vit,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_fip.fisher import TraceEstimator, fisher_diagonal

CLOSE = {"rtol": 1e-4, "atol": 1e-6}


# ---- Unbiased: every draw there is, weighed by its probability ----


@pytest.mark.parametrize("name", ["linear", "vit", "resnet"])
def test_the_mean_over_all_signs_is_the_exact_trace_and_gradient(monkeypatch, name):
    model, batch = MODELS[name](), make_batch(name, rows=4)
    values, gradients = [], []
    for signs in itertools.product([-1, 1], repeat=4):
        with monkeypatch.context() as patch:
            script_signs(patch, torch.tensor(signs))
            options = {"estimator": "signed_sum", "labels": "empirical", "gradient": "double_backward"}
            value, gradient = estimate(model, [batch], **options)
        values.append(value)
        gradients.append(gradient)
    exact = estimate(model, [batch], estimator="exact", labels="empirical", gradient="double_backward")
    torch.testing.assert_close(torch.stack(values).mean(), exact[0], **CLOSE)
    assert_same_gradient(torch.stack(gradients).mean(0), exact[1])
    assert torch.stack(values).std() > 0.1 * exact[0]  # one draw alone is not the mean


@pytest.mark.parametrize("name", ["linear", "vit", "resnet"])
def test_the_mean_over_all_labels_of_the_model_is_the_exact_trace_and_gradient(name):
    """At weights that are not a stationary point: only with labels y ~ p_θ do the cross terms vanish."""
    model, batch = MODELS[name](), make_batch(name, rows=3)
    inputs = {key: tensor for key, tensor in batch.items() if key != "labels"}
    p = torch.softmax(model(**inputs).logits.detach(), dim=-1)
    mean = {kind: [0.0, 0.0] for kind in ("sampled_sum", "exact")}
    for labels in itertools.product(range(CLASSES), repeat=3):
        weight = torch.stack([p[row, label] for row, label in enumerate(labels)]).prod()
        for kind, (value, gradient) in mean.items():
            options = {"likelihood": Scripted(torch.tensor(labels)), "estimator": kind, "gradient": "double_backward"}
            one = estimate(model, [batch], **options)
            mean[kind] = [value + weight * one[0], gradient + weight * one[1]]
    torch.testing.assert_close(mean["sampled_sum"][0], mean["exact"][0], **CLOSE)
    size = one[1].norm().item()  # of one draw: in the linear model the mean is zero
    torch.testing.assert_close(mean["sampled_sum"][1], mean["exact"][1], rtol=1e-4, atol=1e-5 * size)


def test_with_labels_held_fixed_the_gradient_of_tr_f_lacks_the_move_of_their_distribution():
    """∇ Tr F = E[∇T] + E[T s] over y ~ p_θ. The estimate has the first term, which is 0 for a linear softmax model."""
    model, batch = linear(), make_batch("linear", rows=1)
    logits = model(batch["x"]).logits
    p, norm = torch.softmax(logits, dim=-1)[0], batch["x"].square().sum() + 1
    trace = sum(p[k] * (F.one_hot(torch.tensor(k), CLASSES) - p).square().sum() * norm for k in range(CLASSES))
    expected = flat(torch.autograd.grad(trace, list(model.parameters()), retain_graph=True))
    of_estimate, of_distribution = 0.0, 0.0
    for k in range(CLASSES):
        value, gradient = estimate(
            model, [batch], likelihood=Scripted(torch.tensor([k])), estimator="exact", gradient="double_backward"
        )
        of_estimate += p[k].item() * gradient
        of_distribution += p[k].item() * value * looped_scores(model, batch, [k])[0].double()
    assert of_estimate.norm() < 1e-5 * gradient.norm()
    torch.testing.assert_close(of_estimate + of_distribution, expected, **CLOSE)


@pytest.mark.parametrize(
    ("estimator", "labels"), [("sampled_sum", "sampled"), ("signed_sum", "sampled"), ("signed_sum", "empirical")]
)
def test_the_mean_over_many_draws_is_the_exact_trace_within_its_standard_error(estimator, labels):
    model, batch, draws = linear(), make_batch("linear", rows=8), 3000
    model.linear.weight.data *= 2  # far from any stationary point
    batch["labels"] = torch.zeros(8, dtype=torch.long)  # empirical scores that add up
    options = {"estimator": estimator, "labels": labels, "gradient": None}
    values = torch.stack([estimate(model, [batch], seed, **options)[0] for seed in range(draws)])
    standard_error = values.std() / draws**0.5

    per_class = torch.stack(
        [torch.stack([s.square().sum() for s in looped_scores(model, batch, [k] * 8)]) for k in range(CLASSES)], dim=1
    )
    p = torch.softmax(model(batch["x"]).logits.detach(), dim=-1)
    exact = (per_class * p).sum(1).mean() if labels == "sampled" else per_class[:, 0].mean()
    assert standard_error < 0.03 * exact
    assert abs(values.mean() - exact) < 4 * standard_error

    # The negative control: clean labels without signs keep their cross terms.
    unsigned = torch.stack(looped_scores(model, batch, batch["labels"])).sum(0).square().sum() / 8
    assert abs(unsigned - exact) > 20 * standard_error


def test_the_trace_of_a_large_model_keeps_its_digits():
    """A linear model of four million weights, where a plain running sum in float32 loses the fourth digit."""
    torch.manual_seed(0)
    model = torch.nn.Linear(2_000_000, 2, bias=False)
    batch = {"input": torch.randn(1, 2_000_000), "labels": torch.tensor([0])}
    error = 1 - torch.softmax(model(batch["input"]).double(), dim=-1)[0, 0]
    expected = 2 * error**2 * batch["input"].double().square().sum()
    for estimator in ("signed_sum", "exact"):
        value, _ = estimate(model, [batch], estimator=estimator, labels="empirical", gradient=None)
        torch.testing.assert_close(value.double(), expected.detach(), rtol=1e-5, atol=0)


# ---- The split of a batch ----

SPLITS = {"8": [8], "4 + 4": [4, 4], "2 + 2 + 2 + 2": [2] * 4, "5 + 3": [5, 3]}
KINDS = {
    "exact": {"estimator": "exact", "gradient": "double_backward"},
    "sampled_sum": {"estimator": "sampled_sum", "gradient": "double_backward"},
    "signed_sum": {"estimator": "signed_sum", "gradient": "double_backward"},
    "sampled_sum, finite difference": {"estimator": "sampled_sum", "gradient": "finite_difference"},
}
LABELS = torch.tensor([0, 2, 1, 1, 0, 2, 2, 0])
SIGNS = torch.tensor([1, -1, -1, 1, 1, 1, -1, 1])

every_kind = pytest.mark.parametrize("kind", KINDS)


def parts_of(batch, sizes):
    stops = list(itertools.accumulate(sizes))
    return [select(batch, slice(stop - size, stop)) for stop, size in zip(stops, sizes, strict=True)]


@every_kind
@pytest.mark.parametrize("split", [split for split in SPLITS if split != "8"])
def test_the_split_into_micro_batches_changes_neither_trace_nor_gradient(monkeypatch, kind, split):
    model, batch = vit(), make_batch("vit", rows=8)
    found = []
    for sizes in (SPLITS["8"], SPLITS[split]):
        script_signs(monkeypatch, SIGNS)
        found.append(estimate(model, parts_of(batch, sizes), likelihood=Scripted(LABELS), **KINDS[kind]))
    (whole, whole_gradient), (split_up, split_gradient) = found
    torch.testing.assert_close(split_up, whole, rtol=1e-5, atol=0)
    assert_same_gradient(split_gradient, whole_gradient)
    single = estimate(model, [select(batch, slice(0, 4))], likelihood=Scripted(LABELS), **KINDS[kind])[0]
    assert abs(single - whole) > 0.01 * whole  # half the batch is another number


class Meeting:
    """Sums tensors over threads, as torch.distributed's all_reduce does over processes."""

    def __init__(self, size: int):
        self.barrier, self.tensors = threading.Barrier(size, timeout=60), [None] * size

    def member(self, rank: int):
        def reduce(tensor):
            self.tensors[rank] = tensor.clone()
            self.barrier.wait()
            total = torch.stack(self.tensors).sum(0)
            self.barrier.wait()
            tensor.copy_(total)

        return reduce


@every_kind
def test_two_processes_estimate_what_one_does(monkeypatch, kind):
    batch, meeting, models = make_batch("vit", rows=8), Meeting(2), [vit(), vit()]
    script_signs(monkeypatch, torch.ones(16))  # whichever process draws first
    whole, whole_gradient = estimate(vit(), [batch], likelihood=Scripted(LABELS), **KINDS[kind])

    def process(rank: int):
        rows = [slice(0, 5), slice(5, 8)][rank]
        estimator = TraceEstimator(models[rank], Scripted(LABELS[rows]), reduce=meeting.member(rank), **KINDS[kind])
        estimator.observe(select(batch, rows))
        return estimator.estimate()

    # `exact` selects an attention kernel for the whole of this process: two threads would not put it back in turn.
    with sdpa_kernel(SDPBackend.MATH), ThreadPoolExecutor(2) as pool:
        results = list(pool.map(process, range(2)))
    for value, gradient in results:
        torch.testing.assert_close(value, whole, rtol=1e-5, atol=0)
        assert_same_gradient(flat(gradient), whole_gradient)
    assert torch.equal(flat(results[0][1]), flat(results[1][1]))


def test_the_diagonal_does_not_depend_on_the_split_over_batches_and_processes():
    batch, meeting = make_batch("vit", rows=8), Meeting(2)
    whole = flat(fisher_diagonal(vit(), [batch], labels="empirical").values())
    for sizes in SPLITS.values():
        split_up = fisher_diagonal(vit(), parts_of(batch, sizes), labels="empirical")
        torch.testing.assert_close(flat(split_up.values()), whole, rtol=1e-4, atol=1e-6 * whole.max().item())
    shares, models = [parts_of(batch, [5]), parts_of(select(batch, slice(5, 8)), [2, 1])], [vit(), vit()]
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(fisher_diagonal, models[rank], shares[rank], labels="empirical", reduce=meeting.member(rank))
            for rank in range(2)
        ]
        for job in jobs:
            torch.testing.assert_close(flat(job.result().values()), whole, rtol=1e-4, atol=1e-6 * whole.max().item())
