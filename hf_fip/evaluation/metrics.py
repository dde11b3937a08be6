"""ACC, ASR, RA and DER, in percent, each with its denominator."""

from __future__ import annotations

import numpy as np

WEAK_VICTIM = 90.0  # percent ASR; a victim below it proves nothing about a purifier


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """ACC: share of all clean test inputs answered with their true class. Both `(n,)` integers; percent."""
    return _agreement(predictions, labels)


def attack_success_rate(predictions: np.ndarray, attack_labels: np.ndarray) -> float:
    """ASR: share of triggered test inputs *whose true class is not the target* answered with the attacker's label.

    The inputs have to be those only, as `hf_fip.attacks.trigger` selects them. Both `(n,)` integers; percent.
    """
    return _agreement(predictions, attack_labels)


def robust_accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """RA: share of the same triggered inputs answered with their true class. Both `(n,)` integers; percent."""
    return _agreement(predictions, labels)


def defense_effectiveness_rating(before: dict[str, float], after: dict[str, float]) -> float:
    """DER = [max(0, ΔASR) − max(0, ΔACC) + 1] / 2 with Δ = before − after; percent, 50 is no effect.

    Args:
        before, after: with the keys `accuracy` and `asr`, in percent.
    """
    asr_drop = max(0.0, before["asr"] - after["asr"]) / 100
    accuracy_drop = max(0.0, before["accuracy"] - after["accuracy"]) / 100
    return 50.0 * (asr_drop - accuracy_drop + 1.0)


def _agreement(predictions: np.ndarray, labels: np.ndarray) -> float:
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if predictions.shape != labels.shape:
        raise ValueError(f"There are predictions of shape {predictions.shape} and labels of shape {labels.shape}.")
    if not labels.size:
        raise ValueError("There is no input to measure on: the test set is empty.")
    return 100.0 * float(np.mean(predictions == labels))
