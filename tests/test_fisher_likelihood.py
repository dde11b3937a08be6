"""Likelihoods: their numbers against torch.distributions, and the labels they draw."""

import pytest
import torch
from torch import distributions

from hf_fip.fisher import Categorical, MultiLabel, TokenSequence

ROWS, LENGTH, CLASSES = 5, 4, 3
DRAWS = 20_000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logits_for(likelihood, dtype=torch.float32) -> torch.Tensor:
    shape = (ROWS, LENGTH, CLASSES) if isinstance(likelihood, TokenSequence) else (ROWS, CLASSES)
    return 2 * torch.randn(shape, generator=generator(), dtype=torch.float64).to(dtype)


def labels_for(likelihood) -> torch.Tensor:
    if isinstance(likelihood, MultiLabel):
        return torch.randint(0, 2, (ROWS, CLASSES), generator=generator())
    shape = (ROWS, LENGTH) if isinstance(likelihood, TokenSequence) else (ROWS,)
    return torch.randint(0, CLASSES, shape, generator=generator())


def reference(likelihood, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """log p(y|x) by torch.distributions, row by row and token by token."""
    if isinstance(likelihood, Categorical):
        return distributions.Categorical(logits=logits).log_prob(labels)
    if isinstance(likelihood, MultiLabel):
        return distributions.Independent(distributions.Bernoulli(logits=logits), 1).log_prob(labels.to(logits.dtype))
    ahead = int(likelihood.shift)
    rows = []
    for row in range(labels.shape[0]):
        total = torch.zeros((), dtype=logits.dtype)
        for position in range(ahead, labels.shape[1]):
            if labels[row, position] != -100:
                token = distributions.Categorical(logits=logits[row, position - ahead])
                total = total + token.log_prob(labels[row, position])
        rows.append(total)
    return torch.stack(rows)


every_likelihood = pytest.mark.parametrize(
    "likelihood", [Categorical(), MultiLabel(), TokenSequence(), TokenSequence(shift=True)], ids=repr
)
every_sequence = pytest.mark.parametrize("likelihood", [TokenSequence(), TokenSequence(shift=True)], ids=repr)


@every_likelihood
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_log_prob_is_that_of_torch_distributions(likelihood, dtype):
    logits, labels = logits_for(likelihood, dtype), labels_for(likelihood)
    if labels.shape == (ROWS, LENGTH):
        labels[1, 2:] = labels[2, 0] = labels[3] = -100
    log_prob = likelihood.log_prob(logits, labels)
    assert log_prob.shape == (ROWS,) and log_prob.dtype == dtype
    torch.testing.assert_close(log_prob, reference(likelihood, logits, labels))


@every_likelihood
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_logits_are_summed_in_float32(likelihood, dtype):
    logits, labels = logits_for(likelihood, dtype), labels_for(likelihood)
    torch.testing.assert_close(likelihood.log_prob(logits, labels), reference(likelihood, logits.float(), labels))


@every_sequence
def test_masked_tokens_change_neither_the_log_prob_nor_the_score(likelihood):
    logits, labels = logits_for(likelihood).requires_grad_(), labels_for(likelihood)
    labels[0, 2] = -100
    position = 2 - int(likelihood.shift)  # whose logits predict that token
    (score,) = torch.autograd.grad(likelihood.log_prob(logits, labels).sum(), logits)
    assert score[0, position].eq(0).all() and score[1, position].ne(0).all()
    changed = logits.detach().clone()
    changed[0, position] = torch.tensor([-torch.inf, 9.0, 1.0])  # even an impossible token 0, which stands in for -100
    torch.testing.assert_close(likelihood.log_prob(changed, labels), likelihood.log_prob(logits.detach(), labels))


@every_likelihood
def test_drawn_labels_have_the_model_s_probabilities(likelihood):
    logits = logits_for(likelihood)[:1]
    many = logits.expand(DRAWS, *logits.shape[1:])
    labels = labels_for(likelihood)[:1].expand(DRAWS, *labels_for(likelihood).shape[1:])
    drawn = likelihood.sample(many, labels, generator())
    assert drawn.shape == labels.shape
    if isinstance(likelihood, MultiLabel):
        expected, found = torch.sigmoid(logits[0]), drawn.mean(0)
    else:
        expected = torch.softmax(logits[0], dim=-1)
        if isinstance(likelihood, TokenSequence) and likelihood.shift:  # position t's logits, the token at t + 1
            expected, drawn = expected[:-1], drawn[:, 1:]
        found = torch.nn.functional.one_hot(drawn, CLASSES).float().mean(0)
    standard_error = (expected * (1 - expected) / DRAWS).sqrt()
    assert ((found - expected).abs() < 4 * standard_error).all()


def test_a_sample_without_a_label_has_a_log_prob_and_a_score_of_zero():
    logits, labels = logits_for(Categorical()).requires_grad_(), labels_for(Categorical())
    expected = reference(Categorical(), logits, labels)
    labels[[1, 3]] = -100
    log_prob = Categorical().log_prob(logits, labels)
    torch.testing.assert_close(log_prob, torch.where(labels == -100, 0, expected))
    log_prob.sum().backward()
    assert logits.grad[[0, 2, 4]].all() and not logits.grad[[1, 3]].any()


@every_sequence
def test_drawn_tokens_keep_the_mask(likelihood):
    logits, labels = logits_for(likelihood), labels_for(likelihood)
    labels[0, 2:] = labels[3, 1] = -100
    drawn = likelihood.sample(logits, labels, generator())
    assert torch.equal(drawn == -100, labels == -100)
    assert torch.isfinite(likelihood.log_prob(logits, drawn)).all()


def test_a_decoder_only_draw_keeps_the_first_token_which_nothing_predicts():
    labels = labels_for(TokenSequence())
    drawn = TokenSequence(shift=True).sample(logits_for(TokenSequence()), labels, generator())
    assert torch.equal(drawn[:, 0], labels[:, 0])


@every_likelihood
def test_a_draw_is_repeated_by_its_generator_and_leaves_the_global_one_alone(likelihood):
    logits, labels = logits_for(likelihood), labels_for(likelihood)
    found = torch.get_rng_state()
    first, same, other = (likelihood.sample(logits, labels, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), found)


@every_likelihood
def test_a_draw_has_no_graph(likelihood):
    assert not likelihood.sample(logits_for(likelihood).requires_grad_(), labels_for(likelihood)).requires_grad


WRONG_SHAPES = {
    "Categorical, logits of a sequence": (Categorical(), (5, 4, 3), (5,), "logits of 2 dimensions"),
    "Categorical, several labels a row": (Categorical(), (5, 3), (5, 3), r"labels of shape \(5,\)"),
    "Categorical, too few labels": (Categorical(), (5, 3), (4,), r"labels of shape \(5,\)"),
    "MultiLabel, logits of a sequence": (MultiLabel(), (5, 4, 3), (5, 3), "logits of 2 dimensions"),
    "MultiLabel, one label a row": (MultiLabel(), (5, 3), (5,), r"labels of shape \(5, 3\)"),
    "TokenSequence, logits of a class": (TokenSequence(), (5, 3), (5, 4), "logits of 3 dimensions"),
    "TokenSequence, labels too short": (TokenSequence(), (5, 4, 3), (5, 2), r"labels of shape \(5, 4\)"),
}


@pytest.mark.parametrize("case", WRONG_SHAPES)
def test_shapes_that_do_not_fit_are_refused_instead_of_broadcast(case):
    likelihood, logits_shape, labels_shape, message = WRONG_SHAPES[case]
    logits, labels = torch.zeros(logits_shape), torch.zeros(labels_shape, dtype=torch.long)
    for use in (likelihood.log_prob, likelihood.sample):
        with pytest.raises(ValueError, match=f"{message}.*pass the `likelihood=`"):
            use(logits, labels)


def test_tokens_cannot_be_drawn_without_a_mask():
    with pytest.raises(ValueError, match="needs `labels`"):
        TokenSequence().sample(torch.zeros(5, 4, 3), None)
