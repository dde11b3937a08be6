"""The CNN-LSTM: what it computes, and that it is a model of transformers like any other."""

import os
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from trainer_cases import QUIET, identical, weights
from transformers import AutoConfig, AutoModel, AutoModelForVideoClassification
from video_cases import CLASSES, SIDE, batch, clips_of, cnn_lstm, processor, settled

from hf_fip import FIPConfig, FIPTrainer, SingularValueConfig
from hf_fip.hub.load import load_model
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
    peft_config = options.pop("peft_config", None)
    settings = {"max_steps": 4, "per_device_train_batch_size": 4, "trace_interval": 1, "learning_rate": 0.01}
    config = FIPConfig(str(folder), **{**settings, **QUIET, **options})
    dataset = ClipDataset(clips_of(12), processor())
    return FIPTrainer(model, config, data_collator=collate_clips, train_dataset=dataset, peft_config=peft_config)


def test_a_saved_model_is_the_same_to_every_loader(tmp_path):
    model, pixels = settled(cnn_lstm()), batch()["pixel_values"]
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(model.config)
    for load in (type(model).from_pretrained, AutoModelForVideoClassification.from_pretrained, load_model):
        again = load(tmp_path).eval()
        assert type(again) is type(model) and torch.equal(again(pixels).logits, model(pixels).logits)
    backbone = AutoModel.from_pretrained(tmp_path).eval()
    assert torch.equal(backbone(pixels).pooler_output, model.backbone(pixels).pooler_output)


def test_it_is_pushed_as_it_is_saved(monkeypatch):
    pushed = []
    repo, card = SimpleNamespace(repo_id="a/b"), SimpleNamespace(save=lambda path: None)
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *args, **kwargs: repo)
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *args, **kwargs: card)
    model = cnn_lstm()
    monkeypatch.setattr(
        type(model), "_upload_modified_files", lambda self, folder, *args, **kwargs: pushed.extend(os.listdir(folder))
    )
    model.push_to_hub("a/b")
    assert {"config.json", "model.safetensors"} <= set(pushed)


def test_training_moves_every_weight(tmp_path):
    run = trainer(tmp_path, cnn_lstm())
    before = weights(run.model)
    run.train()
    after = weights(run.model)
    assert not [name for name in before if torch.equal(before[name], after[name])]
    assert all(tensor.isfinite().all() for tensor in after.values())


def test_a_resumed_run_ends_as_one_that_was_not_stopped(tmp_path):
    whole = trainer(tmp_path / "whole", cnn_lstm(), save_strategy="steps", save_steps=2)
    whole.train()
    resumed = trainer(tmp_path / "resumed", cnn_lstm())
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert identical(weights(resumed.model), weights(whole.model))


def test_fast_fip_trains_shifts_and_norms_alone_and_can_be_switched_off(tmp_path):
    model, pixels = settled(cnn_lstm()), batch()["pixel_values"]
    received = model(pixels).logits
    run = trainer(tmp_path, model, peft_config=SingularValueConfig(train_norms=True), learning_rate=0.1)
    run.train()
    trained = {name for name, parameter in run.model.named_parameters() if parameter.requires_grad}
    shifted = sum(isinstance(module, nn.Linear | nn.Conv2d) for module in cnn_lstm().modules())
    assert sum("singular_delta" in name for name in trained) == shifted == 5
    run.model.eval()
    assert not torch.equal(run.model(pixels).logits, received)
    with run.model.disable_adapter():
        assert torch.equal(run.model(pixels).logits, received)
