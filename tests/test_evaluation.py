"""ACC, ASR, RA and DER against numbers worked out by hand; measuring disturbs nothing and chooses nothing."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers.trainer_utils import PredictionOutput

from hf_fip import FIPConfig, FIPTrainer
from hf_fip.evaluation import accuracy, attack_success_rate, defense_effectiveness_rating, robust_accuracy
from hf_fip.evaluation.backdoor import BackdoorTest, PurificationCurve
from hf_fip.tasks.image_architectures import small_vit

METRICS = (accuracy, attack_success_rate, robust_accuracy)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.__name__)
@pytest.mark.parametrize(
    "answers, wanted, percent",
    [([0, 1, 2, 3], [0, 1, 2, 3], 100), ([0, 1, 2, 3], [1, 2, 3, 0], 0), ([0, 0, 0], [0, 0, 1], 200 / 3)],
)
def test_a_share_is_over_all_inputs_given(metric, answers, wanted, percent):
    assert metric(np.array(answers), np.array(wanted)) == pytest.approx(percent)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.__name__)
@pytest.mark.parametrize("answers, wanted", [([], []), ([0, 1], [0]), ([0], [0, 0])], ids=str)
def test_no_inputs_and_unequal_numbers_of_inputs_are_refused(metric, answers, wanted):
    with pytest.raises(ValueError, match="empty|shape"):
        metric(np.array(answers), np.array(wanted))


@pytest.mark.parametrize(
    "before, after, der",
    [
        ((90, 100), (90, 100), 50),  # no effect
        ((90, 100), (90, 0), 100),  # perfect
        ((90, 100), (0, 100), 5),  # [0 − 0.9 + 1] / 2: accuracy lost counts against it
        ((90, 100), (80, 20), 85),  # [0.8 − 0.1 + 1] / 2
        ((90, 50), (95, 60), 50),  # what got better in ACC or worse in ASR does not count
        ((91.94, 99.88), (89.65, 1.75), 97.92),  # FIP on CIFAR-10, as published
    ],
)
def test_der(before, after, der):
    before, after = ({"accuracy": acc, "asr": asr} for acc, asr in (before, after))
    assert defense_effectiveness_rating(before, after) == pytest.approx(der, abs=0.005)


# Measuring, by a trainer that answers what it is told and draws random numbers meanwhile


class Answers:
    """Stands in for a trainer: its data sets are rows of (answer, true label)."""

    args = SimpleNamespace(device=torch.device("cpu"))

    def __init__(self, tuple_output: bool = False):
        self.tuple_output = tuple_output

    def predict(self, dataset):
        torch.rand(7)
        answers, labels = np.array([dataset[row] for row in range(len(dataset))]).T
        logits = np.eye(4)[answers]
        return PredictionOutput((logits, "hidden states") if self.tuple_output else logits, labels, {})


CLEAN = [(0, 0), (1, 1), (2, 2), (3, 3), (0, 3)]
# True classes 1, 2, 3, 3 under a trigger for class 0: two answered 0, one truly, one neither.
TRIGGERED = [(0, 1), (0, 2), (3, 3), (1, 3)]


@pytest.mark.parametrize("tuple_output", [False, True])
def test_acc_is_over_clean_inputs_and_asr_and_ra_are_over_triggered_ones(tuple_output):
    test = BackdoorTest(CLEAN, TRIGGERED, np.zeros(4, dtype=int))
    assert test.measure(Answers(tuple_output)) == {"accuracy": 80.0, "asr": 50.0, "ra": 25.0}
    assert test.answers["clean"].tolist() == [0, 1, 2, 3, 0]
    assert test.answers["triggered"].tolist() == [0, 0, 3, 1]


def test_inputs_of_the_target_class_count_neither_for_asr_nor_for_ra():
    with_target = [*TRIGGERED, (0, 0), (0, 0)]
    measured = BackdoorTest(CLEAN, with_target, np.zeros(6, dtype=int)).measure(Answers())
    assert measured == {"accuracy": 80.0, "asr": 50.0, "ra": 25.0}


def test_without_an_attack_only_acc_is_measured():
    assert BackdoorTest(CLEAN).measure(Answers()) == {"accuracy": 80.0, "asr": None, "ra": None}


def test_measuring_leaves_torchs_random_state():
    state = torch.get_rng_state()
    BackdoorTest(CLEAN, TRIGGERED, np.zeros(4, dtype=int)).measure(Answers())
    assert torch.equal(torch.get_rng_state(), state)


# The curve, on a real trainer


def inputs(count: int, seed: int) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    return [{"pixel_values": torch.rand(1, 8, 8, generator=generator), "labels": i % 3} for i in range(count)]


TRAIN, TEST = inputs(12, 0), inputs(9, 1)


def test_a_part_of_a_test_keeps_inputs_and_attack_labels_together():
    whole = BackdoorTest(TEST, TEST, np.arange(9))
    part = whole.part(4)
    assert len(part.clean) == len(part.triggered) == len(part.attack_labels) == 4
    for item, number in zip(part.triggered, part.attack_labels, strict=True):
        assert item is TEST[number]
    assert len({row["labels"] for row in part.clean}) > 1
    assert len(whole.part(100).triggered) == 9
    assert BackdoorTest(TEST).part(4).triggered is None


def test_a_test_and_its_parts_say_how_many_inputs_count():
    whole = BackdoorTest(TEST, TEST, [0] * 9)  # three of nine have the class 0 already
    part = whole.part(4)
    assert whole.counted_for_asr() == 6
    assert part.counted_for_asr() == sum(row["labels"] != 0 for row in part.triggered)


def trainer_of(folder, curve: PurificationCurve | None = None, **arguments) -> FIPTrainer:
    arguments = {"max_steps": 6, "per_device_train_batch_size": 4, "save_steps": 3, "use_cpu": True, **arguments}
    torch.manual_seed(0)
    model, _ = small_vit(["a", "b", "c"], 8, 1)
    model.config.hidden_dropout_prob = 0.1
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1  # so that the random state matters
    config = FIPConfig(str(folder), disable_tqdm=True, **arguments)
    callbacks = [curve] if curve else None
    trainer = FIPTrainer(model, config, train_dataset=TRAIN, eval_dataset=TEST, callbacks=callbacks)
    if curve:
        curve.trainer = trainer
    return trainer


def curve_of(points: int = 3) -> PurificationCurve:
    return PurificationCurve(BackdoorTest(TEST, TEST, np.zeros(9, dtype=int)), points)


def rows_of(trainer) -> list[dict]:
    return [row for row in trainer.state.log_history if "curve_accuracy" in row]


def weights_of(trainer) -> dict:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A training with a curve, and its folder."""
    folder = tmp_path_factory.mktemp("watched")
    trainer = trainer_of(folder, curve_of())
    trainer.train()
    return trainer, folder


def test_the_curve_has_the_start_and_evenly_spaced_points_to_the_end(watched):
    trainer, _ = watched
    assert [row["step"] for row in rows_of(trainer)] == [0, 2, 4, 6]
    for row in rows_of(trainer):
        assert row.keys() == {"step", "curve_accuracy", "curve_asr"}
        assert 0 <= row["curve_accuracy"] <= 100 and 0 <= row["curve_asr"] <= 100
    last = curve_of().test.measure(trainer)
    assert rows_of(trainer)[-1]["curve_accuracy"] == last["accuracy"]


def test_the_curve_does_not_change_the_training(watched, tmp_path):
    alone = trainer_of(tmp_path)
    alone.train()
    expected = weights_of(alone)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights_of(watched[0]).items())


def test_a_resumed_training_keeps_the_curve(watched, tmp_path):
    trainer, folder = watched
    resumed = trainer_of(tmp_path, curve_of())
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    assert rows_of(resumed) == rows_of(trainer)
    assert all(torch.equal(tensor, weights_of(trainer)[name]) for name, tensor in weights_of(resumed).items())


@pytest.mark.parametrize("metric", ["curve_asr", "curve_accuracy"])
def test_no_checkpoint_can_be_chosen_by_the_curve(metric, tmp_path):
    arguments = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True}
    trainer = trainer_of(tmp_path, curve_of(), metric_for_best_model=metric, **arguments)
    with pytest.raises(KeyError, match=metric):
        trainer.train()


def test_a_curve_without_a_trainer_is_refused(tmp_path):
    trainer, curve = trainer_of(tmp_path), curve_of()
    trainer.add_callback(curve)
    with pytest.raises(ValueError, match="set its `trainer`"):
        trainer.train()


def test_a_curve_of_an_unknown_attack_has_acc_alone(tmp_path):
    curve = PurificationCurve(BackdoorTest(TEST), points=1)
    trainer = trainer_of(tmp_path, curve, max_steps=2)
    trainer.train()
    assert [set(row) for row in rows_of(trainer)] == [{"step", "curve_accuracy"}] * 2
    assert curve.seconds > 0
