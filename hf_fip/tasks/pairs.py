"""Sentence pairs from the Hub, TSV or parquet files, or the toy corpus: translation, dialogue, any text to text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as compute
from datasets import Dataset, DatasetDict, Features, LargeList, List, Value

from .data import divide, load_splits, pick_splits
from .toy_corpus import sentence_pairs

TOY = "toy"
TOY_PAIRS = {"train": 2000, "test": 200}
SOURCE, TARGET = "source", "target"
_NAMES = (("source", "target"), ("src", "tgt"), ("input", "output"), ("context", "response"), ("question", "answer"))
_TRANSLATION, _DIALOGUES = "translation", ("dialog", "dialogue", "turns", "utterances")


@dataclass(frozen=True)
class SentencePairs:
    """Training and test pairs of sentences.

    Attributes:
        train, test: `datasets.Dataset`s with the columns `source` and `target`, no text of which is empty.
        name: what the user called it.
        skipped: pairs left out because source or target was missing or empty, and dialogues that were missing.
    """

    train: Dataset
    test: Dataset
    name: str
    skipped: int = 0


def load_pairs(
    name_or_path: str = TOY,
    config_name: str | None = None,
    *,
    source: str | None = None,
    target: str | None = None,
    train_split: str | None = None,
    test_split: str | None = None,
    max_train_samples: int | None = None,
    max_test_samples: int | None = None,
    seed: int = 0,
    token: str | bool | None = None,
    revision: str | None = None,
) -> SentencePairs:
    """Load sentence pairs.

    Args:
        name_or_path: a Hub id; a folder of TSV files (one a split) or of parquet files; a TSV or parquet file; or
            `toy`, generated English sentences with their Esperanto.
        config_name: the configuration of a Hub data set that has several, such as `de-en` of `wmt14`.
        source, target: what is translated into what: languages in a column `translation` (WMT, OpenSubtitles), else
            columns. Guessed when left out. A column of dialogues (lists of turns) gives a pair for each turn and the
            next. A TSV file has no line of names unless one of the two is given.
        train_split, test_split: guessed when left out. Without a test split a quarter of the pairs is set aside.
        max_train_samples, max_test_samples: keep a seeded random part.

    Raises:
        ValueError: when the data, a split, a language or a column cannot be found, the message lists what is there; a
            line of a TSV file has no two fields; dialogues are no lists of texts; no pair is left.
    """
    splits = _splits_of(name_or_path, config_name, bool(source or target), token, revision)
    names = pick_splits(splits, name_or_path, train_split, test_split)
    found = [_as_pairs(splits[name], source, target) for name in names]
    parts = [_without_empty(part) for part in found]
    skipped = sum(map(len, found)) - sum(map(len, parts))
    for name, part in zip(names, parts, strict=True):
        if len(part) < 3 - len(names):
            raise ValueError(f"{name_or_path}: the split {name!r} has {len(part)} pairs, which is too few.")
    train, test = divide(parts, max_train_samples, max_test_samples, seed)
    return SentencePairs(train, test, name_or_path, skipped)


def _splits_of(path: str, config_name: str | None, has_names: bool, token, revision) -> DatasetDict:
    if path == TOY:
        pairs = sentence_pairs(sum(TOY_PAIRS.values()))
        train, test = pairs[: TOY_PAIRS["train"]], pairs[TOY_PAIRS["train"] :]
        return DatasetDict(train=_from_rows(train), test=_from_rows(test))
    place = Path(path)
    if place.is_file() and place.suffix == ".tsv":
        return DatasetDict(train=_read_tsv(place, has_names))
    if place.is_dir() and (files := sorted(place.glob("*.tsv"))):
        return DatasetDict({file.stem: _read_tsv(file, has_names) for file in files})
    return load_splits(path, config_name, token, revision)


def _read_tsv(file: Path, has_names: bool) -> Dataset:
    """The lines of a file, two fields each or, with a line of names, as many as there are names."""
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # with a byte-order mark or without
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from error
    rows = [line.removesuffix("\r").split("\t") for line in lines]
    if rows[-1] == [""]:
        rows.pop()
    names = rows.pop(0) if has_names and rows else [SOURCE, TARGET]
    for number, row in enumerate(rows, 1 + has_names):
        if len(row) != len(names):
            raise ValueError(f"{file}, line {number}: {len(row)} fields and not {len(names)}, separated by tabs.")
    return Dataset.from_dict({name: [row[i] for row in rows] for i, name in enumerate(names)})


def _as_pairs(dataset: Dataset, source: str | None, target: str | None) -> Dataset:
    """The columns `source` and `target` of one split, made from whatever there is."""
    dataset, columns = dataset.with_format(None), dataset.features
    if _TRANSLATION in columns and source not in columns:
        languages = list(getattr(columns[_TRANSLATION], "languages", None) or columns[_TRANSLATION])
        source, target = _pick_two(languages, source, target, "languages")
        dataset = dataset.select_columns(_TRANSLATION).flatten()
        return _renamed(dataset, f"{_TRANSLATION}.{source}", f"{_TRANSLATION}.{target}")
    dialogue = next((name for name in _DIALOGUES if name in columns and not isinstance(columns[name], Value)), None)
    if dialogue is not None and source is None and target is None:
        return _turns(dataset, dialogue)
    texts = [name for name, kind in columns.items() if _is_text(kind)]
    usual = next((pair for pair in _NAMES if set(pair) <= set(texts)), texts)
    source, target = _pick_two(list(usual) if source is None and target is None else texts, source, target, "columns")
    return _renamed(dataset, source, target)


def _is_text(kind) -> bool:
    return isinstance(kind, Value) and kind.dtype.endswith("string")


def _turns(dataset: Dataset, column: str) -> Dataset:
    """A pair for each turn of a dialogue and the next; one without text for a dialogue that is missing."""
    kind = dataset.features[column]
    if not isinstance(kind, (List, LargeList)) or not _is_text(kind.feature):
        raise ValueError(
            f"The column {column!r} holds {kind}, not dialogues, each a list of texts. Set --source and --target to "
            "columns of texts."
        )
    dialogues = ([None, None] if turns is None else turns for turns in dataset[column][:])
    return _from_rows([pair for turns in dialogues for pair in zip(turns[:-1], turns[1:], strict=True)])


def _pick_two(there: list[str], source: str | None, target: str | None, what: str) -> tuple[str, str]:
    """The names of source and target: those given; the other one of two; the first two when there are only two."""
    for name in (source, target):
        if name is not None and name not in there:
            raise ValueError(f"There is no {name!r} among the {what} {', '.join(there)}. Set --source and --target.")
    rest = [name for name in there if name not in (source, target)]
    missing = (source is None) + (target is None)
    if len(rest) != missing and missing:
        raise ValueError(f"Cannot tell source and target among the {what} {', '.join(there)}: set --source, --target.")
    source = rest.pop(0) if source is None else source
    target = rest.pop(0) if target is None else target
    if source == target:
        raise ValueError(f"{source!r} cannot be both source and target. Set --target.")
    return source, target


def _from_rows(rows: list[tuple[str | None, str | None]]) -> Dataset:
    features = Features({SOURCE: Value("string"), TARGET: Value("string")})
    return Dataset.from_dict({SOURCE: [row[0] for row in rows], TARGET: [row[1] for row in rows]}, features)


def _renamed(dataset: Dataset, source: str, target: str) -> Dataset:
    return dataset.select_columns([source, target]).rename_columns({source: SOURCE, target: TARGET})


def _without_empty(pairs: Dataset) -> Dataset:
    columns = pairs.with_format("arrow")[:]
    lengths = [compute.utf8_length(compute.utf8_trim_whitespace(columns[name])) for name in (SOURCE, TARGET)]
    filled = compute.fill_null(compute.and_(*(compute.greater(length, 0) for length in lengths)), False)
    return pairs.select(np.flatnonzero(filled.to_numpy()))
