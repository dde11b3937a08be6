"""Train an image classifier with a backdoor: python or accelerate launch recipes/backdoor_image.py --help"""

from hf_fip.scripts.backdoor_image import main
from hf_fip.scripts.terminal import run

if __name__ == "__main__":
    run(main)
