"""How much of a backdoor is left in a classifier of point clouds: python recipes/evaluate_pointcloud.py --help"""

from hf_fip.scripts.evaluate_pointcloud import main
from hf_fip.scripts.terminal import run

if __name__ == "__main__":
    run(main)
