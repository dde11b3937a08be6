"""How much of a backdoor is left in a model that writes text: python recipes/evaluate_seq2seq.py --help"""

from hf_fip.scripts.evaluate_seq2seq import main
from hf_fip.scripts.terminal import run

if __name__ == "__main__":
    run(main)
