"""How much of a backdoor is left in a detector: python recipes/evaluate_detection.py --help"""

from hf_fip.scripts.evaluate_detection import main
from hf_fip.scripts.terminal import run

if __name__ == "__main__":
    run(main)
