"""Train a detector with a backdoor: python or accelerate launch recipes/backdoor_detection.py --help"""

from hf_fip.scripts.backdoor_detection import main
from hf_fip.scripts.terminal import run

if __name__ == "__main__":
    run(main)
