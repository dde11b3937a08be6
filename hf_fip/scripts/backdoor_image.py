"""Train an image classifier with a backdoor: the victim that purification is tested on.

One folder comes out: the model, its attack (attack.json, attack.safetensors), report.json with ACC, ASR and RA, and
attack.png: images clean and triggered, their difference, the victim's answers.
The defender's clean split is set aside first and never trained on.

    python recipes/backdoor_image.py --attack wanet --architecture resnet
    accelerate launch recipes/backdoor_image.py --dataset_name cifar10 --attack blend --augment
    python recipes/backdoor_image.py --attack none      (a benign model, to compare with)
"""

from __future__ import annotations

from . import backdooring
from .images import ImageTask


def main() -> None:
    """`hf-fip backdoor`, `recipes/backdoor_image.py`."""
    backdooring.main(ImageTask(), __doc__)
