"""The LSTM and the convolutional encoder-decoder: generation, files, derivatives, Fast FIP, and what they refuse."""

import pytest
import torch
import torch.nn.functional as F
from text_cases import MODELS, OWN, VOCABULARY, bart, batch, conv, lstm
from torch import nn
from trainer_cases import identical, text_trainer, trained, weights
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from hf_fip import SingularValueConfig
from hf_fip.fisher import TokenSequence, TraceEstimator, fisher_diagonal, fisher_trace, infer_likelihood
from hf_fip.hub.load import load_model
from hf_fip.models import ConvSeq2SeqForConditionalGeneration, LSTMSeq2SeqForConditionalGeneration

NEW = 9  # tokens generated
OWN_TYPES = (LSTMSeq2SeqForConditionalGeneration, ConvSeq2SeqForConditionalGeneration)


@pytest.fixture(params=OWN)
def model(request) -> nn.Module:
    return OWN[request.param]()


@pytest.fixture(params=MODELS)
def any_model(request) -> nn.Module:
    return MODELS[request.param]()


def source() -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in batch().items() if name != "labels"}


# ---- Generation ----


def test_generation_is_greedy_decoding_step_by_step(model):
    written = torch.zeros(4, 1, dtype=torch.long)
    with torch.no_grad():
        for _ in range(NEW):
            logits = model(**source(), decoder_input_ids=written, use_cache=False).logits
            written = torch.cat([written, logits[:, -1:].argmax(-1)], dim=1)
    found = model.generate(**source(), max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    assert torch.equal(found, written)
    assert len(set(written[:, 1:].flatten().tolist())) > 1  # or any decoder would pass


def test_beam_search_gives_the_same_with_and_without_a_cache(model):
    options = {"max_new_tokens": NEW, "num_beams": 3, "eos_token_id": None}
    cached = model.generate(**source(), **options)
    assert cached.shape == (4, NEW + 1)
    assert torch.equal(cached, model.generate(**source(), **options, use_cache=False))


def test_generation_stops_at_the_end_token(model):
    model.lm_head.bias.data[1] = 100.0
    assert model.generate(**source(), max_new_tokens=NEW).tolist() == [[0, 1]] * 4


def test_a_row_does_not_depend_on_the_padding_beside_it(model):
    together = model(**batch()).logits
    alone = model(input_ids=batch()["input_ids"][1:2, :3], labels=batch()["labels"][1:2]).logits
    torch.testing.assert_close(together[1:2], alone)


def test_a_token_depends_on_no_later_token(model):
    changed = batch()
    changed["labels"][:, 3] = 3 + (changed["labels"][:, 3] - 2) % (VOCABULARY - 3)
    before, after = model(**batch()).logits, model(**changed).logits
    torch.testing.assert_close(before[1:, :4], after[1:, :4])
    assert (before[1:, 4] - after[1:, 4]).abs().max() > 1e-4


def test_a_source_without_a_token_gives_finite_logits(model):
    empty = {"input_ids": torch.zeros(2, 3, dtype=torch.long), "attention_mask": torch.zeros(2, 3, dtype=torch.long)}
    assert torch.isfinite(model(**empty, decoder_input_ids=torch.zeros(2, 2, dtype=torch.long)).logits).all()
    assert model.generate(**empty, max_new_tokens=3).shape[0] == 2


def test_the_loss_is_the_mean_over_the_tokens_that_are_not_masked(model):
    outputs, labels = model(**batch()), batch()["labels"]
    log_probs = F.log_softmax(outputs.logits, dim=-1)
    kept = [(row, place) for row in range(4) for place in range(5) if labels[row, place] != -100]
    expected = -sum(log_probs[row, place, labels[row, place]] for row, place in kept) / len(kept)
    torch.testing.assert_close(outputs.loss, expected)


# ---- Files ----


def test_a_saved_model_is_the_same_model_and_the_auto_class_knows_it(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is model.config_class
    for loaded in (AutoModelForSeq2SeqLM.from_pretrained(tmp_path), load_model(tmp_path)):
        assert type(loaded) is type(model) and identical(weights(loaded), weights(model))
        assert torch.equal(loaded.eval()(**batch()).logits, model(**batch()).logits)


def test_a_resumed_run_ends_as_one_that_was_not_stopped(model, tmp_path):
    model.config.dropout = 0.1
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eta_f": 0.1, "eta_r": 0.1}
    start = weights(model)
    whole = trained(text_trainer(tmp_path / "a", model, **saving))
    model.load_state_dict(start)
    resumed = text_trainer(tmp_path / "a", model, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert identical(whole, weights(resumed.model)) and not identical(whole, start)


# ---- Derivatives ----


def looped_trace(model: nn.Module) -> float:
    """Tr F of the clean labels by one autograd call a sentence, without the library's code."""
    total = 0.0
    for row in range(4):
        one = {name: tensor[row : row + 1] for name, tensor in batch().items()}
        log_probs, labels = F.log_softmax(model(**one).logits, dim=-1)[0], one["labels"][0]
        log_prob = sum(log_probs[place, token] for place, token in enumerate(labels) if token != -100)
        parameters = [p for p in model.parameters() if p.requires_grad]
        score = torch.autograd.grad(log_prob, parameters, allow_unused=True)
        total += sum(float(s.double().square().sum()) for s in score if s is not None)
    return total / 4


def test_the_trace_is_that_of_per_sample_autograd(any_model):
    assert repr(infer_likelihood(any_model)) == "TokenSequence(shift=False)"
    found = fisher_trace(any_model, batch(), labels="empirical")
    assert found == pytest.approx(looped_trace(any_model), rel=1e-4)


def test_the_diagonal_sums_to_the_trace(any_model):
    diagonal = fisher_diagonal(any_model, [batch()], labels="empirical")
    assert sum(float(part.sum()) for part in diagonal.values()) == pytest.approx(looped_trace(any_model), rel=1e-4)


def test_finite_differences_and_double_backward_agree(any_model):
    found = []
    for gradient in ("finite_difference", "double_backward"):
        estimator = TraceEstimator(any_model.double(), gradient=gradient, epsilon=1e-5)
        estimator.observe(batch(), torch.Generator().manual_seed(0))
        found.append(torch.cat([part.flatten() for part in estimator.estimate()[1]]))
    # Where BART and Marian tie an embedding, the row of the padding token, which begins each target, has a gradient as
    # an output and none as an input: no function has that gradient, and the two ways differ by a percent, at any step.
    assert F.cosine_similarity(*found, dim=0) > 0.999
    assert found[0].norm() / found[1].norm() == pytest.approx(1, abs=1e-3 if type(any_model) in OWN_TYPES else 0.02)


def test_a_target_of_padding_alone_has_a_log_likelihood_of_zero(model):
    labels = torch.full((4, 5), -100)
    logits = model(**source(), labels=torch.ones(4, 5, dtype=torch.long)).logits
    assert TokenSequence().log_prob(logits, labels).tolist() == [0.0] * 4


# ---- Fast FIP ----


def test_fast_fip_adapts_every_matrix(model):
    from peft import get_peft_model

    matrices = [name for name, parameter in model.named_parameters() if parameter.ndim > 1]
    before = model(**batch()).logits
    adapted = get_peft_model(model, SingularValueConfig())
    deltas = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert len(deltas) == len(matrices)
    torch.testing.assert_close(adapted(**batch()).logits, before)


def test_fast_fip_leaves_tied_embeddings_out():
    from peft import get_peft_model

    adapted = get_peft_model(bart(), SingularValueConfig())
    names = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert names and not any("shared" in name or "embed_tokens" in name or "lm_head" in name for name in names)


def test_fast_fip_trains_and_generates(model, tmp_path):
    trainer = text_trainer(tmp_path, model, peft_config=SingularValueConfig(), eta_f=0.1, learning_rate=0.1)
    start = weights(trainer.model)
    assert not identical(trained(trainer), start)
    assert trainer.model.generate(**source(), max_new_tokens=3).shape == (4, 4)


# ---- Refusals ----

REFUSED = {
    "an odd width": (lambda: lstm(hidden_size=7), ValueError, "hidden_size=7 has to be even"),
    "an even kernel": (lambda: conv(kernel_size=4), ValueError, "kernel_size=4 has to be odd"),
    "a long source": (
        lambda: conv()(input_ids=torch.ones(1, 33, dtype=torch.long), labels=torch.ones(1, 2, dtype=torch.long)),
        ValueError,
        "33 tokens is longer than max_position_embeddings=32",
    ),
    "no source": (lambda: lstm()(labels=torch.ones(1, 2, dtype=torch.long)), ValueError, "needs a source"),
    "no target": (lambda: lstm()(input_ids=torch.ones(1, 2, dtype=torch.long)), ValueError, "needs a target"),
    "another vocabulary": (lambda: conv().resize_token_embeddings(50), NotImplementedError, "vocabulary for good"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused(case):
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call()
