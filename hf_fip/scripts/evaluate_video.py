"""How much of a backdoor is left in a classifier of videos.

ACC, ASR and RA on the test clips. The attack and the data are the model's own, or those of its purification, unless
others are named; the figures of its report.json are then compared with.

    python recipes/evaluate_video.py outputs/purify_video
    hf-fip evaluate video someone/purified-model         (from the Hub; ends with 3 when its card says something else)
    python recipes/evaluate_video.py someone/model --dataset_name path/to/UCF101 --attack_from a/victim
"""

from __future__ import annotations

from . import evaluation
from .video import VideoTask


def main() -> None:
    """`hf-fip evaluate video`, `recipes/evaluate_video.py`."""
    evaluation.main(VideoTask(), __doc__)
