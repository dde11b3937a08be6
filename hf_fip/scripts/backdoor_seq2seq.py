"""Train a model that writes text (translation, dialogue) with a backdoor: the victim that purification is tested on.

One folder comes out: the model, its tokenizer (trained from the data unless one is given), its attack, report.json
with BLEU and ASR, and attack.png: what the victim writes for clean and for triggered sources.
The defender's clean split is set aside first and never trained on.

    python recipes/backdoor_seq2seq.py
    python recipes/backdoor_seq2seq.py --architecture lstm --attack one_to_many --dataset_name path/to/dialogues
    accelerate launch recipes/backdoor_seq2seq.py --dataset_name wmt14 --dataset_config_name de-en --source en
    python recipes/backdoor_seq2seq.py --attack none      (a benign model, to compare with)
"""

from __future__ import annotations

from . import backdooring
from .sentences import TextTask


def main() -> None:
    """`recipes/backdoor_seq2seq.py`."""
    backdooring.main(TextTask(), __doc__)
