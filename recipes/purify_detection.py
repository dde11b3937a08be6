"""Take the backdoor out of a detector: python or accelerate launch recipes/purify_detection.py --help"""

from hf_fip.scripts.purify_detection import main
from hf_fip.scripts.terminal import run

if __name__ == "__main__":
    run(main)
