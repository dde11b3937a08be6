"""Take the backdoor out of a classifier of clips: python or accelerate launch recipes/purify_video.py --help"""

from hf_fip.scripts.purify_video import main
from hf_fip.scripts.terminal import run

if __name__ == "__main__":
    run(main)
