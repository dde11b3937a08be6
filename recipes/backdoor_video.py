"""Train a classifier of clips with a backdoor: python or accelerate launch recipes/backdoor_video.py --help"""

from hf_fip.scripts.backdoor_video import main
from hf_fip.scripts.terminal import run

if __name__ == "__main__":
    run(main)
