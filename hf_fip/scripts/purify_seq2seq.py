"""Take the backdoor out of a model that writes text (translation, dialogue), with a few clean sentence pairs.

Without --model_name_or_path a small backdoored victim is trained first (and kept for the next time), on a generated
toy corpus unless --dataset_name says otherwise. One folder comes out: the purified model, README.md (its card),
report.json (everything measured) and plots/.

    python recipes/purify_seq2seq.py
    python recipes/purify_seq2seq.py --adapter singular --output_dir outputs/adapter      (Fast FIP: a small adapter)
    accelerate launch recipes/purify_seq2seq.py --model_name_or_path someone/model --dataset_name wmt14 \\
        --dataset_config_name de-en --source en --max_train_samples 5000
    python recipes/purify_seq2seq.py --eta_f 0 --output_dir outputs/control    (the same without the trace)
"""

from __future__ import annotations

from . import purification
from .sentences import TextTask

# Of development victims (toy corpus; Multi30k, LSTM, seed 100): at 0.05 neither FIP nor plain fine-tuning changes what
# is written, at 1.0 BLEU falls by more than half. Stray words are what lowers ASR; see results/DEFAULTS.md.
FIP_SETTINGS = {
    "learning_rate": 0.3,
    "max_steps": 400,
    "per_device_train_batch_size": 32,
    "eta_f": 0.5,
    "disturb": True,
}


def main() -> None:
    """`recipes/purify_seq2seq.py`."""
    purification.main(
        TextTask(),
        __doc__,
        fip=FIP_SETTINGS,
        fast_fip={"max_steps": 600},
        output_dir="outputs/purify_seq2seq",
    )
