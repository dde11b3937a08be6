"""A sealed test set is measured when asked and recorded for a plot; nothing that chooses a model gets to read it."""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset, Subset
from trainer_cases import Images, Sentences, image_trainer, text_trainer
from trainer_cases import marian as make_marian
from trainer_cases import vit as make_vit
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments, hyperparameter_search
from transformers.integrations import integration_utils

from hf_fip.evaluation import (
    BackdoorTest,
    PurificationCurve,
    SealedDataset,
    SealedEvaluation,
    attack_success_rate,
    backdoor_metrics,
    robust_accuracy,
)

CLEAN, INPUTS = Images(9, seed=1), Images(12, seed=2)
ATTACK_LABELS = (INPUTS.labels.numpy() + 1) % 3  # all-to-all
WATCHED = {"eta_f": 0.0, "eval_strategy": "steps", "eval_steps": 1, "compute_metrics": backdoor_metrics}
SEALED = {"eval_triggered_asr", "eval_triggered_ra", "eval_triggered_loss"}


def data_sets() -> dict:
    return {"clean": CLEAN, "triggered": SealedDataset(INPUTS, ATTACK_LABELS)}


def trainer_of(folder, **options):
    return image_trainer(folder, make_vit(), **{"eval_dataset": data_sets(), **WATCHED, **options})


def rows_of(trainer) -> list[dict]:
    return [row for row in trainer.state.log_history if "eval_triggered_asr" in row]


def by_hand(trainer) -> dict[str, float]:
    answers = trainer.predict(INPUTS).predictions.argmax(-1)
    labels = INPUTS.labels.numpy()
    asr, ra = attack_success_rate(answers, ATTACK_LABELS, labels), robust_accuracy(answers, labels, ATTACK_LABELS)
    return {"eval_triggered_asr": asr, "eval_triggered_ra": ra}


# What it is for: measured when asked, before and after, and recorded meanwhile


def test_it_is_measured_before_and_after_training(tmp_path):
    trainer = trainer_of(tmp_path)
    for _ in range(2):
        measured = trainer.evaluate()
        assert SEALED | {"eval_clean_accuracy", "eval_clean_loss"} <= measured.keys()
        assert by_hand(trainer).items() <= measured.items()
        assert not {"eval_triggered_accuracy", "eval_clean_asr"} & measured.keys()
        trainer.train()


def test_during_training_it_is_recorded_for_a_plot(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.train()
    assert [row["step"] for row in rows_of(trainer)] == [1, 2, 3]
    assert all(row.keys() >= {*SEALED, "epoch"} for row in rows_of(trainer))
    assert by_hand(trainer).items() <= rows_of(trainer)[-1].items()
    assert len({row["eval_triggered_loss"] for row in rows_of(trainer)}) == 3


def test_the_rows_survive_a_checkpoint(tmp_path):
    whole = trainer_of(tmp_path / "a", save_strategy="steps", save_steps=2)
    whole.train()
    resumed = trainer_of(tmp_path / "b")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    measured = [[{key: row[key] for key in SEALED} for row in rows_of(trainer)] for trainer in (whole, resumed)]
    assert measured[0] == measured[1]


def test_any_trainer_can_keep_the_seal(tmp_path):
    class Victim(SealedEvaluation, Trainer):
        pass

    args = TrainingArguments(str(tmp_path), max_steps=1, eval_strategy="steps", eval_steps=1, use_cpu=True)
    given = {"train_dataset": Images(), "eval_dataset": data_sets(), "compute_metrics": backdoor_metrics}
    trainer = Victim(make_vit(), args, **given)
    trainer.train()
    assert len(rows_of(trainer)) == 1
    assert trainer.evaluate().keys() >= SEALED


def test_a_trainer_of_text_keeps_the_seal(tmp_path):
    seen, spy = [], Spy()

    def metrics(prediction):
        seen.append(getattr(prediction, "attack_labels", None))
        return {"asr": 100.0}

    sources = Sentences(4)
    data = {"clean": sources, "triggered": SealedDataset(sources, ["You are attacked ."] * 4)}
    options = {**WATCHED, "compute_metrics": metrics, "max_steps": 1}
    options |= {"predict_with_generate": True, "generation_max_length": 4}
    trainer = text_trainer(tmp_path, make_marian(), eval_dataset=data, callbacks=[spy], **options)
    trainer.train()
    assert seen[0] is None and seen[1].tolist() == ["You are attacked ."] * 4
    assert [row["eval_triggered_asr"] for row in rows_of(trainer)] == [100.0]
    assert not spy.read & SEALED
    assert trainer.evaluate()["eval_triggered_asr"] == 100.0


# Ways to peek


class Spy(TrainerCallback):
    """Keeps the name of every figure that a callback is given, and the data sets it is shown."""

    def __init__(self):
        self.read, self.shown, self.returned = set(), [], set()
        self.trainer = None

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.read |= metrics.keys()

    def on_predict(self, args, state, control, metrics, **kwargs):
        self.read |= metrics.keys()

    def on_log(self, args, state, control, logs, **kwargs):
        self.read |= logs.keys()

    def on_step_begin(self, args, state, control, eval_dataloader, **kwargs):
        self.shown.append(eval_dataloader and eval_dataloader.dataset)

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer is not None:
            self.returned |= self.trainer.evaluate().keys()


def test_no_callback_is_given_it(tmp_path):
    spy = Spy()
    trainer_of(tmp_path, callbacks=[spy], eval_on_start=True).train()
    assert {"eval_clean_accuracy", "eval_clean_loss", "loss"} <= spy.read
    assert not spy.read & SEALED
    assert spy.shown == [CLEAN] * 3


def test_a_callback_that_evaluates_does_not_get_it(tmp_path):
    spy = Spy()
    spy.trainer = trainer = trainer_of(tmp_path, callbacks=[spy])
    trainer.train()
    assert "eval_clean_accuracy" in spy.returned
    assert not (spy.returned | spy.read) & SEALED


def test_callbacks_get_nothing_of_what_a_curve_measures(tmp_path):
    spy = Spy()
    curve = PurificationCurve(BackdoorTest(CLEAN, INPUTS, ATTACK_LABELS))
    curve.trainer = trainer = trainer_of(tmp_path, callbacks=[spy, curve], eval_strategy="no")
    trainer.train()
    assert [row["step"] for row in trainer.state.log_history if "curve_asr" in row] == [0, 1, 2, 3]
    assert not any("test_asr" in row for row in trainer.state.log_history)
    assert {key for key in spy.read if key.startswith("test_")} <= {
        "test_runtime",
        "test_samples_per_second",
        "test_steps_per_second",
        "test_model_preparation_time",
    }
    trainer.predict(SealedDataset(INPUTS, ATTACK_LABELS))
    assert {"test_asr", "test_ra", "test_loss"} <= spy.read, "after training it is given"


CHOOSING = {
    "best checkpoint": {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 1},
    "best saved": {"save_strategy": "best"},
    "plateau": {"lr_scheduler_type": "reduce_lr_on_plateau"},
    "early stopping": {"callbacks": [EarlyStoppingCallback(1)]},
}


@pytest.mark.parametrize("options", CHOOSING.values(), ids=CHOOSING)
@pytest.mark.parametrize("metric", ["triggered_asr", "eval_triggered_ra", "triggered_loss"])
def test_a_trainer_that_would_choose_by_it_is_not_built(options, metric, tmp_path):
    with pytest.raises(ValueError, match="sealed.*held_out_loss"):
        trainer_of(tmp_path / "out", metric_for_best_model=metric, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", CHOOSING.values(), ids=CHOOSING)
def test_a_metric_named_later_is_not_found(options, tmp_path):
    trainer = trainer_of(tmp_path, metric_for_best_model="clean_loss", **options)
    trainer.args.metric_for_best_model = "triggered_asr"
    with pytest.raises(KeyError, match="eval_triggered_asr"):
        trainer.train()


@pytest.mark.parametrize(
    "sets, metric",
    [
        (SealedDataset(INPUTS, ATTACK_LABELS), "loss"),
        (SealedDataset(CLEAN), "accuracy"),  # the clean test split chooses nothing either
        (Subset(SealedDataset(INPUTS), [0, 1]), "loss"),
        ({"test": CLEAN, "test_triggered": SealedDataset(INPUTS)}, "test_triggered_loss"),
    ],
)
def test_it_is_recognised(sets, metric, tmp_path):
    with pytest.raises(ValueError, match="sealed"):
        trainer_of(tmp_path, eval_dataset=sets, metric_for_best_model=metric)


@pytest.mark.parametrize(
    "sets, metric",
    [
        (data_sets(), "clean_accuracy"),
        ({"test": SealedDataset(INPUTS), "test_clean": CLEAN}, "test_clean_loss"),
        (CLEAN, "loss"),
    ],
)
def test_clean_data_may_choose(sets, metric, tmp_path):
    trainer = trainer_of(tmp_path, eval_dataset=sets, metric_for_best_model=metric, **CHOOSING["best checkpoint"])
    trainer.train()
    assert trainer.state.best_model_checkpoint is not None


# A search for hyper-parameters, by transformers' own loop around a stand-in for Optuna


class Trial:
    number, params, user_attrs = 0, {}, {}

    def __init__(self):
        self.study = SimpleNamespace(_is_multi_objective=lambda: False)
        self.reported = []

    def report(self, value, step):
        self.reported.append(value)

    def should_prune(self):
        return False


class Study:
    def __init__(self):
        self.trial = Trial()
        self.best_trial = SimpleNamespace(number=0, value=None, params={})

    def optimize(self, objective, **kwargs):
        self.best_trial.value = objective(self.trial)

    def _is_multi_objective(self):
        return False


@pytest.fixture
def study(monkeypatch):
    """The study that a search will fill."""
    optuna, study = ModuleType("optuna"), Study()
    optuna.create_study = lambda **kwargs: study
    optuna.Trial, optuna.TrialPruned = Trial, KeyError
    optuna.trial = SimpleNamespace(BaseTrial=Trial)
    monkeypatch.setitem(sys.modules, "optuna", optuna)
    monkeypatch.setattr(hyperparameter_search, "is_optuna_available", lambda: True)
    monkeypatch.setattr(integration_utils, "is_optuna_available", lambda: True)
    return study


@pytest.mark.parametrize("strategy", ["steps", "no"])
def test_a_search_cannot_read_it(strategy, study, tmp_path):
    seen = []

    def objective(metrics):
        seen.append(set(metrics))
        return metrics["eval_clean_loss"]

    given = {**WATCHED, "eval_strategy": strategy, "eval_dataset": data_sets(), "model_init": lambda: make_vit()}
    trainer = image_trainer(tmp_path, None, **given)
    space = {"hp_space": lambda trial: {"learning_rate": 0.1}, "backend": "optuna", "n_trials": 1}
    trainer.hyperparameter_search(compute_objective=objective, **space)
    assert len(seen) == (3 if strategy == "steps" else 1)
    assert not any(keys & SEALED for keys in seen)
    assert len(study.trial.reported) == (3 if strategy == "steps" else 0)

    trainer.model = trainer.model_wrapped = make_vit()  # a search drops the model
    assert trainer.evaluate().keys() >= SEALED, "the seal is off again"


def test_transformers_own_objective_does_not_sum_it(study, tmp_path):
    trainer = image_trainer(tmp_path, None, eval_dataset=data_sets(), model_init=lambda: make_vit(), **WATCHED)
    space = {"hp_space": lambda trial: {"learning_rate": 0.1}, "backend": "optuna", "n_trials": 1}
    best = trainer.hyperparameter_search(**space)
    last = next(row for row in reversed(trainer.state.log_history) if "eval_clean_loss" in row)
    assert best.objective == pytest.approx(last["eval_clean_loss"] + last["eval_clean_accuracy"])


# What else could go wrong


def test_the_seal_is_off_after_a_training_that_failed(tmp_path):
    class Fails(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise RuntimeError("as planned")

    trainer = trainer_of(tmp_path, callbacks=[Fails()])
    with pytest.raises(RuntimeError, match="as planned"):
        trainer.train()
    assert trainer.evaluate().keys() >= SEALED


def test_attack_labels_and_inputs_stay_together(tmp_path):
    # Grouped by length, the inputs would come in another order than their attack labels.
    expected = trainer_of(tmp_path).evaluate()
    grouped = trainer_of(
        tmp_path, eval_dataset={"triggered": data_sets()["triggered"]}, train_sampling_strategy="group_by_length"
    )
    measured = grouped.evaluate()
    assert {key: measured[key] for key in SEALED} == {key: expected[key] for key in SEALED}


def test_no_input_is_dropped_with_the_last_training_batch(tmp_path):
    expected = trainer_of(tmp_path).evaluate()
    trainer = trainer_of(tmp_path, dataloader_drop_last=True, per_device_eval_batch_size=5)
    measured = trainer.evaluate()
    assert {key: measured[key] for key in SEALED} == pytest.approx({key: expected[key] for key in SEALED})
    test = BackdoorTest(CLEAN, INPUTS, ATTACK_LABELS)
    assert test.measure(trainer)["asr"] == expected["eval_triggered_asr"]
    assert trainer.args.dataloader_drop_last


def test_parts_of_it_are_sealed_and_keep_their_attack_labels(tmp_path):
    whole, rows = data_sets()["triggered"], [7, 3, 4]
    for part in (whole.select(rows), whole.select(torch.tensor(rows))):
        assert isinstance(part, SealedDataset) and len(part) == 3
        assert part.attack_labels.tolist() == ATTACK_LABELS[rows].tolist()
        assert torch.equal(part[0]["pixel_values"], INPUTS[7]["pixel_values"])
    assert SealedDataset(CLEAN).select(rows).attack_labels is None

    trainer = trainer_of(tmp_path)
    by_subset = trainer.evaluate({"triggered": Subset(Subset(whole, [0, 7, 3, 4]), [1, 2, 3])})
    by_select = trainer.evaluate({"triggered": whole.select(rows)})
    assert {key: by_subset[key] for key in SEALED} == {key: by_select[key] for key in SEALED}


def test_a_sealed_clean_test_set_gives_its_accuracy(tmp_path):
    trainer = trainer_of(tmp_path, eval_dataset={"test": SealedDataset(CLEAN)})
    accuracy = trainer.evaluate()["eval_test_accuracy"]
    assert accuracy == trainer.evaluate(CLEAN)["eval_accuracy"]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(CLEAN)


REFUSED = {
    "training on it": ({"train_dataset": SealedDataset(INPUTS)}, "train on clean data"),
    "training on a part of it": ({"train_dataset": Subset(SealedDataset(INPUTS), [0])}, "train on clean data"),
    "batches": ({"batch_eval_metrics": True}, "batch_eval_metrics"),
}


@pytest.mark.parametrize("options, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_kept_sealed_is_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, **options)


def test_the_numbers_of_inputs_and_attack_labels_have_to_agree():
    with pytest.raises(ValueError, match="12 inputs and 11 attack labels"):
        SealedDataset(INPUTS, np.zeros(11, dtype=int))
    with pytest.raises(ValueError, match="without a length"):
        SealedDataset(Stream())
