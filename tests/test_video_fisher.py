"""Tr F of classifiers of clips: VideoMAE, TimeSformer, ViViT and the CNN-LSTM; their training with the defaults."""

import copy

import pytest
import torch
from test_fisher_models import assert_same_gradient, estimate, looped_scores
from torch.nn.attention import SDPBackend, sdpa_kernel
from trainer_cases import QUIET, weights
from video_cases import CLASSES, MODELS, batch, clips_of, cnn_lstm, processor, settled

from hf_fip import FIPConfig, FIPTrainer, SingularValueConfig
from hf_fip.fisher import Categorical, fisher_trace, infer_likelihood
from hf_fip.tasks.video_classification import ClipDataset, collate_clips


@pytest.fixture(params=MODELS)
def make(request):
    return MODELS[request.param]


def test_the_likelihood_is_softmax(make):
    model, data = settled(make()), batch()
    likelihood = infer_likelihood(model)
    assert isinstance(likelihood, Categorical)
    logits = model(data["pixel_values"]).logits.double()
    expected = logits[torch.arange(4), data["labels"]] - logits.exp().sum(1).log()
    torch.testing.assert_close(likelihood.log_prob(logits, data["labels"]), expected)


def test_the_trace_of_the_classifiers_bias_has_its_closed_form(make):
    """Its score is e_y − p."""
    model, data = settled(make()), batch()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "classifier.bias")
    p = model(data["pixel_values"]).logits.softmax(-1)
    scores = torch.eye(CLASSES)[data["labels"]] - p
    expected = scores.square().sum(-1).mean().item()
    assert fisher_trace(model, data, labels="empirical") == pytest.approx(expected, rel=1e-5)


def test_the_trace_is_that_of_per_sample_autograd(make):
    model, data = settled(make()), batch()
    scores = looped_scores(model, data, data["labels"])
    expected = torch.stack([score.square().sum() for score in scores]).mean().item()
    assert expected > 0
    assert fisher_trace(model, data, labels="empirical") == pytest.approx(expected, rel=1e-4)


def test_finite_differences_meet_double_backward(make):
    data = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in batch().items()}
    options = {"estimator": "signed_sum", "labels": "empirical", "epsilon": 1e-7}
    model = settled(make()).double()
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        (_, found), (_, expected) = (
            estimate(copy.deepcopy(model), [data], gradient=gradient, **options)
            for gradient in ("finite_difference", "double_backward")
        )
    assert_same_gradient(found, expected)


def test_the_cnn_lstm_has_a_second_derivative_in_training_too():
    data = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in batch().items()}
    model = cnn_lstm(lstm_layers=2).double().train()
    options = {"estimator": "signed_sum", "labels": "empirical", "epsilon": 1e-7}
    (_, found), (_, expected) = (
        estimate(copy.deepcopy(model), [data], gradient=gradient, **options)
        for gradient in ("finite_difference", "double_backward")
    )
    assert_same_gradient(found, expected)


@pytest.mark.parametrize("adapter", [None, SingularValueConfig()], ids=["FIP", "Fast FIP"])
def test_training_runs_with_the_defaults(make, adapter, tmp_path):
    settings = {"max_steps": 2, "per_device_train_batch_size": 4, "trace_interval": 1, "logging_steps": 1}
    dataset = ClipDataset(clips_of(8), processor())
    run = FIPTrainer(
        make(),
        FIPConfig(str(tmp_path), **settings, **QUIET),
        data_collator=collate_clips,
        train_dataset=dataset,
        peft_config=copy.deepcopy(adapter),
    )
    before = weights(run.model)
    run.train()
    after = weights(run.model)
    trained = [name for name, parameter in run.model.named_parameters() if parameter.requires_grad]
    assert sum(not torch.equal(before[name], after[name]) for name in trained) > 0.5 * len(trained)
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert any("fisher_trace" in row for row in run.state.log_history)
