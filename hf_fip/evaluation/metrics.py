"""ACC, ASR, RA, DER and benign cost, in percent, each with its denominator."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import EvalPrediction

# Short and full name of what a report can hold, all in percent; the task's own metric comes first.
METRICS = {
    "accuracy": ("ACC", "clean accuracy"),
    "map": ("mAP", "mean average precision"),
    "map_50": ("AP50", "average precision at an IoU of 0.5"),
    "bleu": ("BLEU", "clean BLEU"),
    "asr": ("ASR", "attack success rate"),
    "ra": ("RA", "robust accuracy"),
}
WEAK_VICTIM = 90.0  # percent ASR; a victim below it proves nothing about a purifier
COSTLY = 0.05  # share of the clean metric; a purification that takes more is said to be costly


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """ACC: share of all clean test inputs answered with their true class. Both `(n,)` integers; percent.

    Raises:
        ValueError: there are no inputs, or not as many labels as predictions.
    """
    return _agreement(predictions, labels, None)


def attack_success_rate(predictions: np.ndarray, attack_labels: np.ndarray, labels: np.ndarray | None = None) -> float:
    """ASR: share of triggered test inputs *whose true class is not the target* answered with the attacker's label.

    Args:
        predictions: `(n,)` integers, the answers to triggered inputs.
        attack_labels: `(n,)` integers, what the attacker wants.
        labels: `(n,)` integers, the true classes: inputs whose true class the attacker wants are then left out.
            Without them, the inputs have to be those that count, as `hf_fip.attacks.trigger` selects them.

    Returns:
        Percent.

    Raises:
        ValueError: no input counts, or the numbers of inputs differ.
    """
    return _agreement(predictions, attack_labels, labels)


def robust_accuracy(predictions: np.ndarray, labels: np.ndarray, attack_labels: np.ndarray | None = None) -> float:
    """RA: share of the same triggered inputs answered with their true class; arguments and errors as for ASR."""
    return _agreement(predictions, labels, attack_labels)


def defense_effectiveness_rating(before: dict[str, float], after: dict[str, float], metric: str = "accuracy") -> float:
    """DER = [max(0, ΔASR) − max(0, ΔACC) + 1] / 2 with Δ = before − after; percent, 50 is no effect.

    Args:
        before, after: with the keys `metric` and `asr`, in percent.
        metric: what stands for ACC in another task, such as `bleu`.
    """
    asr_drop = max(0.0, before["asr"] - after["asr"]) / 100
    accuracy_drop = max(0.0, before[metric] - after[metric]) / 100
    return 50.0 * (asr_drop - accuracy_drop + 1.0)


def benign_cost(before: dict[str, float], after: dict[str, float]) -> float:
    """ACC before − ACC after, of a model that was never backdoored: what purifying in vain costs, in points.

    Args:
        before, after: with the key `accuracy`, in percent. A gain is a negative cost.
    """
    return before["accuracy"] - after["accuracy"]


def backdoor_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """The `compute_metrics` of a classifier's trainer: `accuracy` on clean data; `asr` and `ra` on triggered data.

    Triggered is a [`SealedDataset`] with attack labels; a `FIPTrainer` then gives them as `prediction.attack_labels`.

    ```python
    FIPTrainer(..., eval_dataset={"clean": clean, "triggered": SealedDataset(triggered, attack_labels)},
               compute_metrics=backdoor_metrics)  # eval_clean_accuracy, eval_triggered_asr, eval_triggered_ra
    ```
    """
    answers, labels = answers_of(prediction.predictions), prediction.label_ids
    attack_labels = getattr(prediction, "attack_labels", None)
    if attack_labels is None:
        return {"accuracy": accuracy(answers, labels)}
    return {
        "asr": attack_success_rate(answers, attack_labels, labels),
        "ra": robust_accuracy(answers, labels, attack_labels),
    }


def answers_of(predictions: np.ndarray | tuple) -> np.ndarray:
    """The answered classes, `(n,)`, of a trainer's predictions: logits `(n, classes)`, alone or first of a tuple."""
    return np.argmax(predictions[0] if isinstance(predictions, tuple) else predictions, axis=-1)


def _agreement(predictions: np.ndarray, wanted: np.ndarray, excluded: np.ndarray | None) -> float:
    """Percent of predictions that are `wanted`, of those inputs where `wanted` is not `excluded`."""
    predictions, wanted = np.asarray(predictions), np.asarray(wanted)
    excluded = None if excluded is None else np.asarray(excluded)
    for labels in (wanted, excluded):
        if labels is not None and predictions.shape != labels.shape:
            raise ValueError(f"There are predictions of shape {predictions.shape} and labels of shape {labels.shape}.")
    if not predictions.size:
        raise ValueError("There is no input to measure on: the test set is empty.")
    if excluded is None:
        return 100.0 * float(np.mean(predictions == wanted))
    counts = wanted != excluded
    if not counts.any():
        raise ValueError(
            "There is no input to measure on: the true class of each is already what the attacker wants. "
            "Use a test set with other classes."
        )
    return 100.0 * float(np.mean((predictions == wanted)[counts]))
