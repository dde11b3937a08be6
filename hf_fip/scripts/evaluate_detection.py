"""How much of a backdoor is left in a detector, or in a multi-label classifier.

mAP, ASR and RA on the test images. The attack and the data are the model's own, or those of its purification, unless
others are named; the figures of its report.json are then compared with.

    python recipes/evaluate_detection.py outputs/purify_detection
    python recipes/evaluate_detection.py outputs/labels --answers labels      (multi-label)
    hf-fip evaluate detection someone/purified-model     (from the Hub; ends with 3 when its card says something else)
    python recipes/evaluate_detection.py someone/model --dataset_name path/to/coco --attack_from a/victim
"""

from __future__ import annotations

from . import evaluation
from .arguments import chosen
from .detection import LABELS, DetectionTask, MultiLabelTask


def main() -> None:
    """`hf-fip evaluate detection`, `recipes/evaluate_detection.py`."""
    several = chosen("--answers") == LABELS
    evaluation.main(MultiLabelTask() if several else DetectionTask(), __doc__)
