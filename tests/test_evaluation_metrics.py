"""The metrics by hand: denominators, what a trainer computes, several seeds, and modules of the `evaluate` library."""

import math
import statistics

import numpy as np
import pytest
from transformers import EvalPrediction

from hf_fip.attacks import BadNets
from hf_fip.evaluation import (
    EVALUATE_MODULES,
    Spread,
    attack_success_rate,
    backdoor_metrics,
    benign_cost,
    over_seeds,
    robust_accuracy,
)
from hf_fip.evaluation.sealed import TriggeredPrediction

# Ten triggered inputs of 4 classes, by hand. For one target, class 0, rows 0 to 2 do not count, which leaves 7.
LABELS = np.array([0, 0, 0, 1, 1, 2, 2, 3, 3, 3])
ANSWERS = np.array([0, 1, 2, 0, 1, 0, 3, 0, 3, 0])
ONE = np.zeros(10, dtype=int)
ALL = (LABELS + 1) % 4  # 1, 1, 1, 2, 2, 3, 3, 0, 0, 0: each row counts


@pytest.mark.parametrize(
    "attack_labels, asr, ra",
    [
        (ONE, 400 / 7, 200 / 7),  # rows 3, 5, 7, 9 answered 0; rows 4, 8 truly
        (ALL, 40, 30),  # rows 1, 6, 7, 9 answered y + 1; rows 0, 4, 8 truly
    ],
    ids=["one target", "all to all"],
)
def test_asr_and_ra_are_over_inputs_whose_true_class_is_not_the_target(attack_labels, asr, ra):
    assert attack_success_rate(ANSWERS, attack_labels, LABELS) == pytest.approx(asr)
    assert robust_accuracy(ANSWERS, LABELS, attack_labels) == pytest.approx(ra)
    counts = attack_labels != LABELS  # as `trigger` selects them: nothing is left to leave out
    assert attack_success_rate(ANSWERS[counts], attack_labels[counts]) == pytest.approx(asr)
    assert robust_accuracy(ANSWERS[counts], LABELS[counts]) == pytest.approx(ra)


@pytest.mark.parametrize(
    "answer, attack_labels, asr, ra",
    [
        (0, ONE, 100, 0),  # always the target: all of the attack, none of the truth
        (3, ONE, 0, 300 / 7),
        (0, ALL, 30, 30),  # always class 0: what the attacker wants of class 3, the truth of class 0
    ],
)
def test_a_model_that_always_answers_one_class(answer, attack_labels, asr, ra):
    answers = np.full(10, answer)
    assert attack_success_rate(answers, attack_labels, LABELS) == pytest.approx(asr)
    assert robust_accuracy(answers, LABELS, attack_labels) == pytest.approx(ra)


@pytest.mark.parametrize("rule", ["all_to_one", "all_to_all"])
def test_the_attacks_and_the_metrics_agree_on_what_counts(rule):
    attack = BadNets(label_rule=rule)
    wanted, eligible = attack.attack_label(LABELS, 4), attack.eligible(LABELS, 4)
    everything = attack_success_rate(ANSWERS, wanted, LABELS)
    assert everything == attack_success_rate(ANSWERS[eligible], wanted[eligible])


def test_an_empty_denominator_is_an_error():
    of_target = np.zeros(3, dtype=int)
    with pytest.raises(ValueError, match="no input to measure on.*already what the attacker wants"):
        attack_success_rate(of_target, of_target, of_target)
    with pytest.raises(ValueError, match="no input to measure on.*already what the attacker wants"):
        robust_accuracy(of_target, of_target, of_target)
    with pytest.raises(ValueError, match="shape"):
        attack_success_rate(of_target, of_target, np.zeros(2, dtype=int))


@pytest.mark.parametrize("before, after, cost", [(92.5, 90.0, 2.5), (90.0, 91.0, -1.0)])
def test_benign_cost_is_what_accuracy_falls_by(before, after, cost):
    assert benign_cost({"accuracy": before}, {"accuracy": after}) == cost


@pytest.mark.parametrize("as_tuple", [False, True])
def test_a_trainers_metrics_are_acc_on_clean_and_asr_and_ra_on_triggered_inputs(as_tuple):
    logits = np.eye(4)[ANSWERS]
    prediction = EvalPrediction((logits, "hidden states") if as_tuple else logits, LABELS)
    assert backdoor_metrics(prediction) == {"accuracy": 30.0}
    triggered = backdoor_metrics(TriggeredPrediction(prediction, ONE))
    assert triggered == pytest.approx({"asr": 400 / 7, "ra": 200 / 7})


# Several seeds


def report(seed: int, asr: float, **more) -> dict:
    return {"seed": seed, "after": {"asr": asr, "ra": None}, "der": 90.0 + seed, "model": "m", **more}


def test_seeds_give_mean_and_sample_deviation():
    values = [1.0, 2.0, 6.0]
    summary = over_seeds([report(seed, value) for seed, value in enumerate(values)])
    assert summary["after"]["asr"] == Spread(3.0, statistics.stdev(values))
    assert summary["after"]["asr"].deviation == pytest.approx(math.sqrt((4 + 1 + 9) / 2))  # by n − 1
    assert summary["der"] == Spread(91.0, 1.0)
    assert str(summary["after"]["asr"]) == "3.0 ± 2.6"
    assert f"{summary['after']['asr']:.2f}" == "3.00 ± 2.65"


def test_numbers_of_numpy_and_of_a_run_that_diverged_count_too():
    summary = over_seeds([report(1, np.float32(1.0), der=np.int64(3)), report(2, np.float32(2.0), der=5)])
    assert summary["after"]["asr"].mean == 1.5 and summary["der"].mean == 4.0
    diverged = over_seeds([report(1, math.nan), report(2, 2.0)])["after"]["asr"]
    assert str(diverged) == "nan ± nan"


def test_one_seed_has_no_deviation():
    spread = over_seeds([report(1, 2.0)])["after"]["asr"]
    assert spread == Spread(2.0, None)
    assert str(spread) == "2.0"


def test_no_mean_is_over_fewer_runs_than_there_are():
    summary = over_seeds([report(1, 2.0, cost={"seconds": 1.0}, ok=True), report(2, 4.0, cost={}, ok=True)])
    assert summary.keys() == {"seed", "after", "der", "cost"}
    assert summary["after"].keys() == {"asr"}
    assert summary["cost"] == {}


@pytest.mark.parametrize("reports, message", [([], "no run"), ([report(1, 2.0), report(1, 2.0)], "same seed")])
def test_no_run_and_one_run_twice_are_refused(reports, message):
    with pytest.raises(ValueError, match=message):
        over_seeds(reports)


# Modules of the `evaluate` library, loaded offline

ROWS = {"predictions": ANSWERS.tolist(), "references": LABELS.tolist(), "attack_labels": ONE.tolist()}
MODELS = {"accuracy_before": [90.0, 91.94], "asr_before": [100.0, 99.88], "accuracy_after": [80.0, 89.65]}
MODELS |= {"asr_after": [20.0, 1.75]}


@pytest.mark.parametrize(
    "name, given, value",
    [("asr", ROWS, 400 / 7), ("ra", ROWS, 200 / 7), ("der", MODELS, (85.0 + 97.92) / 2)],
)
def test_evaluate_loads_a_module(name, given, value, tmp_path):
    import evaluate

    module = evaluate.load(str(EVALUATE_MODULES / name), cache_dir=str(tmp_path))
    assert module.compute(**given) == pytest.approx({name: value}, abs=0.005)


def test_a_module_does_without_no_column(tmp_path):
    import evaluate

    module = evaluate.load(str(EVALUATE_MODULES / "asr"), cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match="attack_labels"):
        module.compute(predictions=[0], references=[1])
