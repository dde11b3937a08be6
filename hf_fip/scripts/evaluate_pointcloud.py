"""How much of a backdoor is left in a classifier of point clouds.

ACC, ASR and RA on the test clouds. The attack and the data are the model's own, or those of its purification, unless
others are named; the figures of its report.json are then compared with.

    python recipes/evaluate_pointcloud.py outputs/purify_pointcloud
    hf-fip evaluate pointcloud someone/purified-model    (from the Hub; ends with 3 when its card says something else)
    python recipes/evaluate_pointcloud.py someone/model --dataset_name path/to/ModelNet40 --attack_from a/victim
"""

from __future__ import annotations

from . import evaluation
from .clouds import CloudTask


def main() -> None:
    """`hf-fip evaluate pointcloud`, `recipes/evaluate_pointcloud.py`."""
    evaluation.main(CloudTask(), __doc__)
