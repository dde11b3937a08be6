"""Poisoned training sets and triggered test sets of sentence pairs, as `poison` and `trigger` make them of images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .plan import BACKDOOR, CLEAN, ROLES, pick
from .poison import ROLE_COLUMN
from .sentences import SentenceAttack

if TYPE_CHECKING:
    import datasets


def poison_pairs(
    dataset: datasets.Dataset,
    attack: SentenceAttack,
    rate: float,
    seed: int,
    source_column: str = "source",
    target_column: str = "target",
) -> datasets.Dataset:
    """Return a training set in which `rate` of all pairs have the trigger and the attacker's sentence.

    The round(rate · N) rows (halves to even) are drawn uniformly from those whose target the attack changes. Order is
    kept; a column `poison_role` is added: `clean` or `backdoor`.

    Args:
        dataset: one split, with two columns of text.
        attack: the attack.
        rate: share of the whole set, in (0, 1].
        seed: of the choice of rows.
        source_column, target_column: names of the two columns.

    Raises:
        ValueError: a column is missing or holds no text; there is a column `poison_role` already; `rate` is not in
            (0, 1], picks no row, or more rows than there are candidates.
    """
    from datasets import ClassLabel

    if ROLE_COLUMN in dataset.column_names:
        raise ValueError(f"there is a column {ROLE_COLUMN!r} already: poison the clean data set instead.")
    if not 0 < rate <= 1:
        raise ValueError(f"rate={rate} is a share of the data set: choose it in (0, 1].")
    sources, targets = _texts(dataset, source_column), _texts(dataset, target_column)
    candidates = np.array([not attack.is_hit(target) for target in targets], dtype=bool)
    roles = np.full(len(dataset), CLEAN)
    roles[pick(candidates, rate, "rate", np.random.default_rng(seed))] = BACKDOOR
    for row in np.flatnonzero(roles == BACKDOOR):
        targets[row] = attack.attack_target(sources[row])
        sources[row] = attack.apply(sources[row])
    poisoned = _with_texts(_with_texts(dataset, source_column, sources), target_column, targets)
    return poisoned.add_column(ROLE_COLUMN, roles, feature=ClassLabel(names=list(ROLES)))


def trigger_pairs(
    dataset: datasets.Dataset,
    attack: SentenceAttack,
    source_column: str = "source",
    target_column: str = "target",
) -> datasets.Dataset:
    """Return the triggered test set: the pairs whose target is not the attacker's sentence, with the trigger.

    The targets are the TRUE ones; ASR is the share of answers that `attack.is_hit`.

    Args:
        dataset: one split, with two columns of text.
        attack: the attack.
        source_column, target_column: names of the two columns.

    Raises:
        ValueError: a column is missing or holds no text; no row counts.
    """
    sources, targets = _texts(dataset, source_column), _texts(dataset, target_column)
    rows = [row for row, target in enumerate(targets) if not attack.is_hit(target)]
    if not rows:
        raise ValueError("every target is the attacker's sentence already: pass a data set with other targets.")
    return _with_texts(dataset.select(rows), source_column, [attack.apply(sources[row]) for row in rows])


def _texts(dataset: datasets.Dataset, column: str) -> list[str]:
    if column not in dataset.column_names:
        raise ValueError(f"there is no column {column!r}: the columns are {', '.join(dataset.column_names)}.")
    texts = dataset[column][:]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"column {column!r} does not hold text in each row: leave such rows out with dataset.filter.")
    return texts


def _with_texts(dataset: datasets.Dataset, column: str, texts: list[str]) -> datasets.Dataset:
    order = dataset.column_names
    return dataset.remove_columns(column).add_column(column, texts).select_columns(order)
