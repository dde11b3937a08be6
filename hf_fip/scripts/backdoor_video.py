"""Train a video classifier with a backdoor: the victim that purification is tested on.

One folder comes out: the model, its attack (attack.json, attack.safetensors), report.json with ACC, ASR and RA, and
attack.png: clips clean and triggered, frame by frame, with the victim's answers. The defender's clean split is set
aside first and never trained on.

    python recipes/backdoor_video.py
    python recipes/backdoor_video.py --attack universal_trigger --architecture videomae
    accelerate launch recipes/backdoor_video.py --dataset_name path/to/UCF-101 --num_frames 16 --augment
"""

from __future__ import annotations

from . import backdooring
from .video import VideoTask


def main() -> None:
    """`recipes/backdoor_video.py`."""
    backdooring.main(VideoTask(), __doc__)
