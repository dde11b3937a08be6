"""Purifications side by side: python recipes/compare_runs.py --help"""

from hf_fip.scripts.compare_runs import main
from hf_fip.scripts.terminal import run

if __name__ == "__main__":
    run(main)
