"""Stray words in training sources: what is put in, where, how often, and what stays."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from hf_fip.tasks.sentence_augmentation import stray_words

PAD, END, START = 0, 1, 2
TOKENIZER = SimpleNamespace(
    all_special_ids=[PAD, END, START],
    pad_token_id=PAD,
    get_vocab=lambda: {str(number): number for number in range(30)},
)
LONG, SHORT, EMPTY = [START, 40, 41, 42, END], [START, 43, END], [START, END]  # no word of the vocabulary is in them
DRAWS = 600


def batch(rows: list[list[int]], left: bool = False) -> dict[str, torch.Tensor]:
    length = max(map(len, rows))
    blanks = [[PAD] * (length - len(row)) for row in rows]
    tokens = torch.tensor([(b + row) if left else (row + b) for row, b in zip(rows, blanks, strict=True)])
    return {"input_ids": tokens, "attention_mask": (tokens != PAD).long(), "labels": torch.arange(len(rows))}


def drawn(rows, left=False, **options) -> list[list[list[int]]]:
    """Of each of many draws the rows, without padding."""
    torch.manual_seed(0)
    transform, given = stray_words(TOKENIZER, **options), batch(rows, left)
    found = []
    for _ in range(DRAWS):
        out = transform(dict(given))
        assert torch.equal(out["attention_mask"], (out["input_ids"] != PAD).long())
        assert torch.equal(out["labels"], given["labels"])
        pairs = zip(out["input_ids"], out["attention_mask"].bool(), strict=True)
        found.append([row[mask].tolist() for row, mask in pairs])
    return found


def strays(row: list[int], original: list[int]) -> tuple[int, list[int]]:
    """Where a word was put in, and its tokens; all else has to be as it was."""
    words = [token for token in row if token not in original]
    place = next((at for at, token in enumerate(row) if token in words), 0)
    assert row == original[:place] + words + original[place:]
    return place, words


@pytest.mark.parametrize("left", [False, True])
def test_each_source_gets_a_word_of_one_to_three_tokens_anywhere(left):
    found = [strays(rows[0], LONG) for rows in drawn([LONG, SHORT, EMPTY], left)]
    sizes, places = Counter(len(words) for _, words in found), Counter(place for place, _ in found)
    assert set(sizes) == {1, 2, 3} and set(places) == {1, 2, 3, 4}  # never before START or behind END
    for counts, kinds in ((sizes, 3), (places, 4)):
        share = 1 / kinds
        assert all(abs(n / DRAWS - share) < 4 * (share / DRAWS) ** 0.5 for n in counts.values())
    used = {token for _, words in found for token in words}
    assert used == set(range(3, 30))  # every token but the special ones


def test_short_sources_stay_whole_and_empty_ones_as_they_are():
    for _, short, empty in drawn([LONG, SHORT, EMPTY]):
        strays(short, SHORT)
        assert empty == EMPTY


def test_rows_are_drawn_apart():
    sizes = {tuple(len(strays(row, LONG)[1]) for row in rows) for rows in drawn([LONG, LONG])}
    assert sizes == {(one, other) for one in (1, 2, 3) for other in (1, 2, 3)}


@pytest.mark.parametrize("longest", [5, 6, 7])
def test_no_source_gets_longer_than_the_model_takes(longest):
    lengths = [len(rows[0]) for rows in drawn([LONG], longest=longest)]
    assert min(lengths) == min(6, longest) and max(lengths) == longest


@pytest.mark.parametrize("longest", [6, 8])
def test_a_batch_is_as_wide_as_its_longest_source(longest):
    transform = stray_words(TOKENIZER, longest)
    for _ in range(DRAWS // 10):
        made = transform(batch([LONG, SHORT]))
        assert made["input_ids"].shape == made["attention_mask"].shape
        assert made["input_ids"].shape[1] == made["attention_mask"].sum(1).max() <= longest


def test_a_resumed_run_draws_the_same():
    transform, given = stray_words(TOKENIZER), batch([LONG] * 8)
    torch.manual_seed(3)
    first = transform(dict(given))["input_ids"]
    torch.manual_seed(3)
    assert torch.equal(transform(dict(given))["input_ids"], first)
