"""Train a detector, or a multi-label classifier, with a backdoor: the victim that purification is tested on.

One folder comes out: the model, its attack (attack.json, attack.safetensors), report.json with mAP, ASR and RA, and
attack.png: what the victim finds in triggered images.
The defender's clean split is set aside first and never trained on.

    python recipes/backdoor_detection.py
    python recipes/backdoor_detection.py --attack clean_image --attack_options effect=appearing
    python recipes/backdoor_detection.py --answers labels --attack clean_image      (multi-label)
    accelerate launch recipes/backdoor_detection.py --dataset_name path/to/VOCdevkit/VOC2007 --architecture detr
    python recipes/backdoor_detection.py --attack none      (a benign model, to compare with)
"""

from __future__ import annotations

from . import backdooring
from .arguments import chosen
from .detection import LABELS, DetectionTask, MultiLabelTask


def main() -> None:
    """`recipes/backdoor_detection.py`."""
    if chosen("--answers") == LABELS:
        backdooring.main(MultiLabelTask(), __doc__, architecture="resnet")
    else:
        backdooring.main(DetectionTask(), __doc__)
