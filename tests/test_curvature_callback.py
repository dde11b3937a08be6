"""The curvature along a training: what is recorded, and that training does not notice."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader
from trainer_cases import (
    Images,
    PlainNet,
    Sentences,
    Snapshots,
    identical,
    image_trainer,
    logged,
    marian,
    text_trainer,
    trained,
    vit,
)

from hf_fip.curvature import measure_curvature
from hf_fip.curvature.callback import CurvatureCallback
from hf_fip.processes import share

BATCHES = [{"pixel_values": data.pixels, "labels": data.labels} for data in (Images(6, 1), Images(3, 2))]
QUICK = {"probes": 2, "max_steps": 5}


@pytest.mark.parametrize(
    "make", [lambda: PlainNet(dropout=0.2), lambda: vit(dropout=0.2)], ids=["BatchNorm and dropout", "ViT"]
)
def test_training_with_the_callback_is_bit_for_bit_the_training_without(tmp_path, make):
    with_it, without = Snapshots(), Snapshots()
    watched = image_trainer(tmp_path, make(), callbacks=[CurvatureCallback(BATCHES, every=1, **QUICK), with_it])
    found = trained(watched)
    plain = image_trainer(tmp_path, make(), callbacks=[without])
    assert identical(found, trained(plain))
    for one, other in zip(with_it.random_states, without.random_states, strict=True):
        assert torch.equal(one, other)
    assert logged(watched, "loss") == logged(plain, "loss")


def test_it_records_the_start_every_so_many_steps_and_the_end(tmp_path):
    trainer = image_trainer(tmp_path, vit(), callbacks=[CurvatureCallback(BATCHES, every=2, **QUICK)])
    before = measure_curvature(trainer.model, BATCHES, **QUICK)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "curvature_trace" in row]
    assert [row["step"] for row in rows] == [0, 2, 3]
    assert rows[0]["curvature_lambda_max"] == before.lambda_max and rows[0]["curvature_loss"] == before.loss
    after = measure_curvature(trainer.model, BATCHES, **QUICK)
    assert rows[2]["curvature_trace"] == after.trace != before.trace
    assert rows[2]["curvature_trace_error"] == after.trace_error


def test_a_resumed_training_has_the_record_of_a_whole_one(tmp_path):
    def make(steps):
        callback = CurvatureCallback(BATCHES, every=2, **QUICK)
        saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": steps, "lr_scheduler_type": "constant"}
        return image_trainer(tmp_path / str(steps), vit(), callbacks=[callback], eta_f_schedule="constant", **saving)

    whole, first = make(4), make(2)
    whole.train()
    first.train()
    resumed = make(4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "2" / "checkpoint-2"))
    assert logged(resumed, "curvature_trace") == pytest.approx(logged(whole, "curvature_trace"), rel=1e-6)
    assert len(logged(resumed, "curvature_trace")) == 3


def test_a_data_loader_is_read_once_and_its_shuffling_draws_nothing():
    state = torch.get_rng_state()
    callback = CurvatureCallback(DataLoader(Images(5), batch_size=2, shuffle=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert [len(batch["labels"]) for batch in callback.batches] == [2, 2, 1]


def test_models_that_generate_text_have_it_too(tmp_path):
    data = Sentences(4)
    batches = [{"input_ids": data.tokens, "labels": data.labels}]
    trainer = text_trainer(tmp_path, marian(), callbacks=[CurvatureCallback(batches, every=3, **QUICK)])
    trainer.train()
    losses = logged(trainer, "curvature_loss")
    assert len(losses) == 2 and losses[0] > 0


def test_an_interval_below_one_and_too_few_batches_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="every=0"):
        CurvatureCallback(BATCHES, every=0)
    three = SimpleNamespace(num_processes=3, process_index=0)
    monkeypatch.setattr("hf_fip.processes.PartialState", lambda: three)
    with pytest.raises(ValueError, match="2 batches for 3 processes"):
        share(BATCHES)
