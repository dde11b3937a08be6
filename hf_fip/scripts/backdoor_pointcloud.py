"""Train a classifier of point clouds with a backdoor: the victim that purification is tested on.

One folder comes out: the model, its attack (attack.json, attack.safetensors), report.json with ACC, ASR and RA, and
attack.png: clouds clean and triggered, in three dimensions, with the victim's answers. The defender's clean split is
set aside first and never trained on.

    python recipes/backdoor_pointcloud.py
    python recipes/backdoor_pointcloud.py --attack pcba --attack_options source_label=2 --architecture pointnet2
    accelerate launch recipes/backdoor_pointcloud.py --dataset_name path/to/ModelNet40 --augment
"""

from __future__ import annotations

from . import backdooring
from .clouds import CloudTask


def main() -> None:
    """`recipes/backdoor_pointcloud.py`."""
    backdooring.main(CloudTask(), __doc__)
