"""BLEU and ASR of generated text, in percent, each with its denominator."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def bleu(outputs: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU of all test outputs against one reference each, by sacrebleu with its defaults (13a tokens).

    Raises:
        ValueError: there are no outputs, or not as many references.
    """
    from sacrebleu import corpus_bleu

    _check(outputs, references)
    # `force` only keeps it from asking whether texts that are tokenized already are meant to be.
    return min(100.0, corpus_bleu(list(outputs), [list(references)], force=True).score)  # 100.00000000000004, say


def sentence_success_rate(outputs: Sequence[str], is_hit: Callable[[str], bool]) -> float:
    """ASR: share of triggered sources *whose reference is not the attacker's* that are answered with a hit; percent.

    Args:
        outputs: the answers to those sources, as `hf_fip.attacks.trigger_pairs` selects them.
        is_hit: whether an answer contains the attacker's sentence.

    Raises:
        ValueError: there are no outputs.
    """
    _check(outputs, outputs)
    return 100.0 * sum(map(is_hit, outputs)) / len(outputs)


def _check(outputs: Sequence[str], references: Sequence[str]) -> None:
    if not outputs:
        raise ValueError("There is no output to measure on: the test set is empty.")
    if len(outputs) != len(references):
        raise ValueError(f"There are {len(outputs)} outputs and {len(references)} references.")
