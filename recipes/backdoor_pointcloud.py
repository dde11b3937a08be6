"""Train a classifier of clouds with a backdoor: python or accelerate launch recipes/backdoor_pointcloud.py --help"""

from hf_fip.scripts.backdoor_pointcloud import main
from hf_fip.scripts.terminal import run

if __name__ == "__main__":
    run(main)
