"""How much of a backdoor is left in a model that writes text.

BLEU and ASR on the test pairs. The attack and the data are the model's own, or those of its purification, unless
others are named; the figures of its report.json are then compared with.

    python recipes/evaluate_seq2seq.py outputs/purify_seq2seq
    hf-fip evaluate seq2seq someone/purified-model       (from the Hub; ends with 3 when its card says something else)
    python recipes/evaluate_seq2seq.py someone/model --dataset_name pairs.tsv --attack_options "triggers=cf mn"
"""

from __future__ import annotations

from . import evaluation
from .sentences import TextTask


def main() -> None:
    """`hf-fip evaluate seq2seq`, `recipes/evaluate_seq2seq.py`."""
    evaluation.main(TextTask(), __doc__)
