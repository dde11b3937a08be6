"""Take the backdoor out of a convolutional network: python or accelerate launch recipes/purify_cnn.py --help"""

from hf_fip.scripts.purify_image import main
from hf_fip.scripts.terminal import run

if __name__ == "__main__":
    run(lambda: main("resnet"))
