"""Tr F of classifiers of clips: VideoMAE, TimeSformer, ViViT and the CNN-LSTM; their training with the defaults."""

import copy

import pytest
import torch
from model_cases import (
    assert_finite_differences_meet_double_backward,
    assert_likelihood_is_softmax,
    assert_trace_is_that_of_autograd,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from trainer_cases import QUIET, weights
from video_cases import CLASSES, MODELS, batch, clips_of, cnn_lstm, processor, settled

from hf_fip import FIPConfig, FIPTrainer, SingularValueConfig
from hf_fip.fisher import fisher_trace
from hf_fip.tasks.video_classification import ClipDataset, collate_clips


@pytest.fixture(params=MODELS)
def make(request):
    return MODELS[request.param]


def test_the_likelihood_is_softmax(make):
    data = batch()
    assert_likelihood_is_softmax(settled(make()), data["pixel_values"], data["labels"])


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
    assert_trace_is_that_of_autograd(settled(make()), batch())


def test_finite_differences_meet_double_backward(make):
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        assert_finite_differences_meet_double_backward(settled(make()), batch())


def test_the_cnn_lstm_has_a_second_derivative_in_training_too():
    assert_finite_differences_meet_double_backward(cnn_lstm(lstm_layers=2).train(), batch())


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
