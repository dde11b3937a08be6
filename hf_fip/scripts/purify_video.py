"""Take the backdoor out of a video classifier, with a little clean data.

Without --model_name_or_path a small backdoored CNN-LSTM is trained first (and kept for the next time), on generated
motions unless --dataset_name says otherwise. One folder comes out: the purified model, README.md (its card),
report.json (everything measured) and plots/, with the frames of triggered clips.

    python recipes/purify_video.py
    python recipes/purify_video.py --adapter singular --output_dir outputs/adapter      (Fast FIP)
    accelerate launch recipes/purify_video.py --model_name_or_path a/model --dataset_name path/to/UCF-101
    python recipes/purify_video.py --eta_f 0 --output_dir outputs/control      (the same without the trace, to compare)
"""

from __future__ import annotations

from . import purification
from .video import VideoTask


def main() -> None:
    """`recipes/purify_video.py`."""
    purification.main(
        VideoTask(),
        __doc__,
        fip={"max_steps": 400, "per_device_train_batch_size": 32, "learning_rate": 0.1, "disturb": True},
        fast_fip={"max_steps": 600},
        output_dir="outputs/purify_video",
    )
