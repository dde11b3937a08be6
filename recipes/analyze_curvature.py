"""How sharp the minimum is that a model sits in: python recipes/analyze_curvature.py --help"""

from hf_fip.scripts.analyze_curvature import main
from hf_fip.scripts.terminal import run

if __name__ == "__main__":
    run(main)
