"""Take the backdoor out of a vision transformer: python or accelerate launch recipes/purify_vit.py --help"""

from hf_fip.scripts.purify_image import main
from hf_fip.scripts.terminal import run

if __name__ == "__main__":
    run(lambda: main("vit"))
