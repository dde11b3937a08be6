"""Take the backdoor out of a detector, or of a multi-label classifier, with a little clean data.

Without --model_name_or_path a small backdoored victim is trained first (and kept for the next time), on generated
scenes unless --dataset_name says otherwise. One folder comes out: the purified model, README.md (its card),
report.json (everything measured) and plots/.

    python recipes/purify_detection.py
    python recipes/purify_detection.py --adapter singular --output_dir outputs/adapter      (Fast FIP: a small adapter)
    python recipes/purify_detection.py --answers labels --attack clean_image      (multi-label)
    accelerate launch recipes/purify_detection.py --model_name_or_path someone/model --dataset_name path/to/coco
    python recipes/purify_detection.py --eta_f 0 --output_dir outputs/control      (plain fine-tuning, to compare)
"""

from __future__ import annotations

from . import purification
from .arguments import chosen
from .detection import LABELS, DetectionTask, MultiLabelTask

# Found on a development victim (scenes, seed 42). So large a learning rate damages the detector at first; what it then
# learns again is without the backdoor.
FIP_SETTINGS = {"max_steps": 400, "per_device_train_batch_size": 16, "learning_rate": 0.1, "eta_f": 0.3}
# At 0.1 it keeps more of the accuracy and of the backdoor, at 0.2 it loses a third of the accuracy.
FAST_FIP_SETTINGS = {"max_steps": 600, "learning_rate": 0.05, "eta_f": 0.02}


def main() -> None:
    """`recipes/purify_detection.py`."""
    several = chosen("--answers") == LABELS
    purification.main(
        MultiLabelTask() if several else DetectionTask(),
        __doc__,
        fip=FIP_SETTINGS,
        fast_fip=FAST_FIP_SETTINGS,
        output_dir="outputs/purify_detection",
        **({"architecture": "resnet"} if several else {}),
    )
