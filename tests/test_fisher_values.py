"""Tr F, diag F̄ and per-sample scores are right: by closed form, by a plain loop, and by an independent library."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from hessian_eigenthings.operators import EmpiricalFisherOperator, GGNOperator
from test_fisher_models import CLASSES, MODELS, TEXT_MODELS, flat, linear, make_batch, resnet, select, vit
from torch import nn

import hf_fip.fisher.scores as scores_module
from hf_fip.fisher import Categorical, fisher_diagonal, fisher_trace, infer_likelihood, per_sample_scores
from hf_fip.fisher.scores import split_batch

CLOSE = {"rtol": 1e-4, "atol": 1e-7}

every_model = pytest.mark.parametrize("name", MODELS)


class Recorded(Categorical):
    """Remembers the labels it drew."""

    def sample(self, logits, labels=None, generator=None):
        self.drawn = super().sample(logits, labels, generator)
        return self.drawn


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def trace_of(model, batch, **options) -> torch.Tensor:
    return torch.tensor(fisher_trace(model, batch, **options))


# ---- Closed form of the linear softmax model: s_W = (e_y − p) xᵀ, s_b = e_y − p ----


def closed_form_scores(model, batch, labels) -> dict[str, torch.Tensor]:
    x = batch["x"].double()
    p = torch.softmax(x @ model.linear.weight.double().T + model.linear.bias.double(), dim=-1).detach()
    error = F.one_hot(labels, CLASSES) - p
    return {"linear.weight": error[:, :, None] * x[:, None, :], "linear.bias": error}


@pytest.mark.parametrize("bare", [False, True], ids=["output.logits", "a tensor"])
@pytest.mark.parametrize("labels", ["empirical", "sampled"])
def test_trace_and_diagonal_equal_the_closed_form_on_a_linear_softmax_model(labels, bare):
    model, batch, likelihood = linear(bare), make_batch("linear", rows=7), Recorded()
    trace = trace_of(model, batch, likelihood=likelihood, labels=labels, generator=seeded())
    used = batch["labels"] if labels == "empirical" else likelihood.drawn
    expected = closed_form_scores(model, batch, used)
    squared_norms = (1 + batch["x"].double().square().sum(1)) * expected["linear.bias"].square().sum(1)
    torch.testing.assert_close(trace, squared_norms.mean().float(), **CLOSE)

    diagonal = fisher_diagonal(model, [batch], likelihood=likelihood, labels=labels, generator=seeded())
    assert diagonal.keys() == expected.keys()
    used = batch["labels"] if labels == "empirical" else likelihood.drawn
    for name, score in closed_form_scores(model, batch, used).items():
        torch.testing.assert_close(diagonal[name], score.square().mean(0).float(), **CLOSE)


def test_expected_trace_over_the_model_s_own_labels_equals_the_closed_form():
    model, batch = linear(), make_batch("linear", rows=7)
    x = batch["x"].double()
    p = torch.softmax(model(batch["x"]).logits.double(), dim=-1).detach()
    errors = (torch.eye(CLASSES) - p[:, None]).square().sum(-1)  # ‖e_k − p‖² for each sample and class
    expected = ((p * errors).sum(1) * (1 + x.square().sum(1))).mean()
    torch.testing.assert_close(enumerated(model, batch)[0].double(), expected, **CLOSE)

    draws = torch.stack([trace_of(model, batch, generator=seeded(seed)) for seed in range(400)]).double()
    assert abs(draws.mean() - expected) < 4 * draws.std() / len(draws) ** 0.5
    assert draws.std() > 0.01 * expected  # or the draws were no draws


def enumerated(model, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Tr F and diag F̄ of the true Fisher: every class of every sample, weighed by the model's own probability."""
    inputs, labels = split_batch(model, batch)
    p = torch.softmax(model(**inputs).logits.detach(), dim=-1)
    trace, diagonal, rows = 0.0, {}, len(labels)
    for row in range(rows):
        for label in range(CLASSES):
            one = select(batch, slice(row, row + 1)) | {"labels": torch.tensor([label])}
            weight = p[row, label] / rows
            trace = trace + weight * fisher_trace(model, one, labels="empirical")
            for name, values in fisher_diagonal(model, [one], labels="empirical").items():
                diagonal[name] = diagonal.get(name, 0) + weight * values
    return trace, diagonal


# ---- An independent library ----


def library_matrix(operator) -> torch.Tensor:
    return torch.stack([operator.matvec(basis) for basis in torch.eye(operator.size)])


def assert_is_diagonal_of(matrix, trace, diagonal):
    torch.testing.assert_close(trace, matrix.trace(), **CLOSE)
    expected = matrix.diagonal()
    torch.testing.assert_close(flat(diagonal.values()).float(), expected, rtol=1e-4, atol=1e-5 * expected.max().item())


@pytest.mark.parametrize("make", [vit, resnet], ids=["vit", "resnet"])
def test_an_independent_library_s_empirical_fisher_agrees(make):
    model, batch = make(), make_batch("vit")

    def loss_of_one(called, sample):
        image, label = sample
        return F.cross_entropy(called(pixel_values=image[None]).logits, label[None])

    data = [(batch["pixel_values"], batch["labels"])]
    matrix = library_matrix(EmpiricalFisherOperator(model, data, loss_of_one))
    trace = trace_of(model, batch, labels="empirical")
    assert_is_diagonal_of(matrix, trace, fisher_diagonal(model, [batch], labels="empirical"))


@pytest.mark.parametrize("make", [vit, resnet], ids=["vit", "resnet"])
def test_an_independent_library_s_gauss_newton_matrix_is_the_true_fisher(make):
    """For softmax cross-entropy J^T H J is E_y[s sᵀ]; with the mean over samples, as Tr F has it."""
    model, batch = make(), make_batch("vit", rows=2)
    operator = GGNOperator(
        model,
        [(batch["pixel_values"], batch["labels"])],
        forward_fn=lambda called, data: called(pixel_values=data[0]).logits,
        loss_of_output_fn=lambda logits, data: F.cross_entropy(logits, data[1], reduction="mean"),
    )
    assert_is_diagonal_of(library_matrix(operator), *enumerated(model, batch))


# ---- A plain loop over samples ----


def looped_scores(model, batch) -> list[list[torch.Tensor]]:
    """One backward pass a sample, through the model's own handling of `labels`."""
    likelihood, rows = infer_likelihood(model), []
    for row in range(len(batch["labels"])):
        one = select(batch, slice(row, row + 1))
        outputs = model(**(one if "x" not in one else {"x": one["x"]}))
        model.zero_grad()
        likelihood.log_prob(outputs.logits, one["labels"]).sum().backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        rows.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trained])
    model.zero_grad()
    return rows


@every_model
def test_trace_and_diagonal_equal_a_plain_loop_over_samples(name):
    model, batch = MODELS[name](), make_batch(name)
    squares = torch.stack([flat(score).square() for score in looped_scores(model, batch)])
    trace = trace_of(model, batch, labels="empirical")
    torch.testing.assert_close(trace, squares.sum(1).mean().float(), **CLOSE)
    diagonal = fisher_diagonal(model, [batch], labels="empirical")
    torch.testing.assert_close(flat(diagonal.values()), squares.mean(0), rtol=1e-4, atol=1e-6 * squares.max().item())


@every_model
@pytest.mark.parametrize("labels", ["empirical", "sampled"])
def test_trace_is_the_sum_of_the_diagonal(name, labels):
    model, batch = MODELS[name](), make_batch(name)
    diagonal = fisher_diagonal(model, [batch], labels=labels, generator=seeded())
    trace = trace_of(model, batch, labels=labels, generator=seeded())
    torch.testing.assert_close(flat(diagonal.values()).sum().float(), trace, **CLOSE)


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_the_split_batch_gives_the_logits_of_the_whole_batch(name):
    """Labels are taken out of the inputs, and a decoder still reads what the model would have made of them."""
    model, batch = MODELS[name](), make_batch(name)
    inputs, labels = split_batch(model, batch)
    assert torch.equal(model(**inputs).logits, model(**batch).logits) and labels is batch["labels"]
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_an_adapted_decoder_reads_the_same_tokens():
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(MODELS["t5"](), LoraConfig(target_modules=["q"], r=1)).eval()
    batch = make_batch("t5")
    assert torch.equal(adapted(**split_batch(adapted, batch)[0]).logits, adapted(**batch).logits)


# ---- Per-sample scores: two paths, any chunk ----


def scores_of(model, batch, **options) -> torch.Tensor:
    """All scores as one `(batch, parameters)` table."""
    inputs, labels = split_batch(model, batch)
    chunks = per_sample_scores(model, infer_likelihood(model), inputs, labels, **options)
    return torch.cat([torch.cat([score.flatten(1) for score in chunk], dim=1) for chunk in chunks])


def forbid(monkeypatch, name, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(scores_module, name, fail)


@pytest.mark.parametrize(
    ("name", "options"),
    [("linear", {}), ("vit", {}), ("vit", {"attention": "sdpa"}), ("resnet", {}), ("gpt2", {})],
    ids=["linear", "vit", "vit with sdpa", "resnet", "gpt2"],
)
def test_vmap_and_loop_give_the_same_scores(monkeypatch, name, options):
    model, batch = MODELS[name](**options), make_batch(name, rows=5)
    with monkeypatch.context() as without_loop:
        forbid(without_loop, "summed_score", AssertionError("the loop was used"))
        by_vmap = scores_of(model, batch)
    with monkeypatch.context() as without_vmap:
        forbid(without_vmap, "functional_call", RuntimeError("vmap cannot trace this"))
        by_loop = scores_of(model, batch)
    assert by_vmap.shape == (5, sum(p.numel() for p in model.parameters()))
    torch.testing.assert_close(by_vmap, by_loop, rtol=1e-4, atol=1e-5 * by_loop.abs().max().item())


def test_vmap_over_the_default_attention_warns_of_nothing():
    """The fused kernels have no batching rule, of which torch would warn in every run."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores_of(vit("sdpa"), make_batch("vit"))


@pytest.mark.parametrize("name", ["vit", "marian"])  # by vmap, by loop
@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_the_chunk_size_does_not_change_the_scores(name, chunk_size):
    model, batch = MODELS[name](), make_batch(name, rows=5)
    torch.testing.assert_close(scores_of(model, batch, chunk_size=chunk_size), scores_of(model, batch), **CLOSE)
    one = trace_of(model, batch, labels="empirical", chunk_size=chunk_size)
    torch.testing.assert_close(one, trace_of(model, batch, labels="empirical"), **CLOSE)


@pytest.mark.parametrize("name", ["vit", "marian"])  # by vmap, by loop
def test_scores_are_taken_inside_no_grad_too(name):
    model, batch = MODELS[name](), make_batch(name)
    with torch.no_grad():
        inside = scores_of(model, batch)
        assert not torch.is_grad_enabled()
    assert torch.equal(inside, scores_of(model, batch))


class Scaled(nn.Module):
    """Takes more than one tensor with a row for each sample."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(5, CLASSES)

    def forward(self, x, weights, temperature, offset=None):
        logits = self.linear(x * weights) / temperature
        return logits if offset is None else logits + offset


@pytest.mark.parametrize("way", ["vmap", "loop"])
def test_inputs_that_have_no_row_for_each_sample_are_shared(monkeypatch, way):
    if way == "loop":
        forbid(monkeypatch, "functional_call", RuntimeError("vmap cannot trace this"))
    model, batch = Scaled(), make_batch("linear", rows=4)
    shared = {"weights": torch.arange(5.0), "temperature": torch.tensor(2.0), "offset": None}
    expected = torch.softmax(model(batch["x"], **shared), dim=-1) - F.one_hot(batch["labels"], CLASSES)
    found = scores_of(model, batch | shared)
    torch.testing.assert_close(found[:, -CLASSES:], -expected.detach() / 2, **CLOSE)  # the bias


class Failing(nn.Module):
    def __init__(self, error: Exception):
        super().__init__()
        self.linear, self.error, self.calls = nn.Linear(5, CLASSES), error, 0

    def forward(self, x):
        self.calls += 1
        raise self.error


@pytest.mark.parametrize(
    "error",
    [ValueError("bad image"), RuntimeError("mat1 and mat2 shapes cannot be multiplied"), KeyError("x")],
    ids=str,
)
def test_a_model_s_own_error_is_raised_at_once(error):
    model, batch = Failing(error), make_batch("linear")
    with pytest.raises(type(error)) as raised:
        fisher_diagonal(model, [batch], labels="empirical")
    assert raised.value is error and model.calls == 1


class Branching(nn.Module):
    """Looks into its input, which vmap cannot follow."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.linear(x if x.sum().item() > 0 else -x)


def test_a_model_that_vmap_cannot_trace_is_looped_over():
    torch.manual_seed(0)
    model, batch = Branching(), make_batch("linear", rows=6)
    upright = batch["x"] * batch["x"].sum(1, keepdim=True).sign()
    expected = torch.softmax(model.linear(upright), dim=-1) - F.one_hot(batch["labels"], CLASSES)
    found = scores_of(model, batch)
    torch.testing.assert_close(found[:, -CLASSES:], -expected.detach(), **CLOSE)  # the bias
