"""Take the backdoor out of a classifier of clouds: python or accelerate launch recipes/purify_pointcloud.py --help"""

from hf_fip.scripts.purify_pointcloud import main
from hf_fip.scripts.terminal import run

if __name__ == "__main__":
    run(main)
