"""Take the backdoor out of a classifier of point clouds, with a little clean data.

Without --model_name_or_path a small backdoored PointNet is trained first (and kept for the next time), on generated
shapes unless --dataset_name says otherwise. One folder comes out: the purified model, README.md (its card),
report.json (everything measured) and plots/, with the trigger in three dimensions.

    python recipes/purify_pointcloud.py
    python recipes/purify_pointcloud.py --adapter singular --output_dir outputs/adapter      (Fast FIP)
    accelerate launch recipes/purify_pointcloud.py --model_name_or_path a/model --dataset_name path/to/ModelNet40
    python recipes/purify_pointcloud.py --eta_f 0 --output_dir outputs/control      (plain fine-tuning, to compare)
"""

from __future__ import annotations

from . import purification
from .clouds import CloudTask


def main() -> None:
    """`recipes/purify_pointcloud.py`."""
    purification.main(
        CloudTask(),
        __doc__,
        fip={"max_steps": 400, "per_device_train_batch_size": 32, "learning_rate": 0.05, "eta_f": 0.5},
        fast_fip={"max_steps": 400, "learning_rate": 0.05},
        output_dir="outputs/purify_pointcloud",
    )
