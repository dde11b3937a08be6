"""How much of a backdoor is left in a classifier of videos: python recipes/evaluate_video.py --help"""

from hf_fip.scripts.evaluate_video import main
from hf_fip.scripts.terminal import run

if __name__ == "__main__":
    run(main)
