"""The CNN-LSTM: what it computes, and that it is a model of transformers like any other."""

from functools import partial

import pytest
import torch
from model_cases import (
    assert_fast_fip_shifts_every_layer,
    assert_pushed_as_saved,
    assert_resumes_to_the_same,
    assert_same_to_every_loader,
    assert_training_moves_every_weight,
    short_run,
)
from torch import nn
from transformers import AutoModelForVideoClassification
from video_cases import CLASSES, SIDE, batch, clips_of, cnn_lstm, processor, settled

from hf_fip import FIPTrainer
from hf_fip.tasks.video_classification import ClipDataset, collate_clips


def test_it_computes_what_torchs_own_lstm_computes():
    model, pixels = settled(cnn_lstm(lstm_layers=2)), batch()["pixel_values"]
    features = torch.stack([model.backbone.frames(clip) for clip in pixels])
    torch_lstm = nn.LSTM(features.shape[-1], 6, num_layers=2, batch_first=True)
    with torch.no_grad():
        for number, layer in enumerate(model.backbone.layers):
            for name, value in (
                ("weight_ih", layer.from_input.weight),
                ("bias_ih", layer.from_input.bias),
                ("weight_hh", layer.from_hidden.weight),
                ("bias_hh", torch.zeros(24)),
            ):
                getattr(torch_lstm, f"{name}_l{number}").copy_(value)
    outputs, _ = torch_lstm(features)
    found = model.backbone(pixels)
    torch.testing.assert_close(found.last_hidden_state, outputs)
    torch.testing.assert_close(model(pixels).logits, model.classifier(outputs.mean(dim=1)))


def test_the_order_of_the_frames_and_the_place_in_the_frame_matter():
    model, pixels = settled(cnn_lstm()), batch()["pixel_values"]
    assert not torch.allclose(model(pixels.flip(1)).logits, model(pixels).logits, atol=1e-3)
    assert not torch.allclose(model(pixels.flip(3)).logits, model(pixels).logits, atol=1e-3)


@pytest.mark.parametrize("shape", [(1, 1, 3, 4, 4), (2, 7, 3, 13, 9)])
def test_it_takes_clips_of_any_length_and_size(shape):
    logits = settled(cnn_lstm())(torch.zeros(shape)).logits
    assert logits.shape == (shape[0], CLASSES) and logits.isfinite().all()


def test_one_clip_of_one_frame_can_be_trained_on():
    model = cnn_lstm().train()
    model(torch.randn(1, 1, 3, SIDE, SIDE), torch.tensor([1])).loss.backward()
    unread = {"backbone.layers.0.from_hidden.weight"}  # there is no frame before the first
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all() and (name in unread or parameter.grad.any()), name


def test_the_loss_is_cross_entropy_and_dropout_acts_in_training_only():
    model, data = cnn_lstm(dropout=0.5), batch()
    assert not torch.equal(model.train()(**data).logits, model(**data).logits)
    logits = model.eval()(**data).logits
    assert torch.equal(model(**data).loss, nn.functional.cross_entropy(logits, data["labels"]))


# ---- As a model of transformers ----


def trainer(folder, model, **options) -> FIPTrainer:
    return short_run(folder, model, ClipDataset(clips_of(12), processor()), collate_clips, **options)


def test_a_saved_model_is_the_same_to_every_loader(tmp_path):
    assert_same_to_every_loader(
        settled(cnn_lstm()), tmp_path, AutoModelForVideoClassification, batch()["pixel_values"]
    )


def test_it_is_pushed_as_it_is_saved(monkeypatch):
    assert_pushed_as_saved(cnn_lstm(), monkeypatch)


def test_training_moves_every_weight(tmp_path):
    assert_training_moves_every_weight(trainer(tmp_path, cnn_lstm()))


def test_a_resumed_run_ends_as_one_that_was_not_stopped(tmp_path):
    assert_resumes_to_the_same(lambda folder, **options: trainer(folder, cnn_lstm(), **options), tmp_path)


def test_fast_fip_trains_shifts_and_norms_alone_and_can_be_switched_off(tmp_path):
    model, kinds = settled(cnn_lstm()), (nn.Linear, nn.Conv2d)
    assert sum(isinstance(module, kinds) for module in model.modules()) == 5
    assert_fast_fip_shifts_every_layer(partial(trainer, tmp_path), model, batch()["pixel_values"], kinds)
