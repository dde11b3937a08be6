"""Train a model that writes text with a backdoor: python or accelerate launch recipes/backdoor_seq2seq.py --help"""

from hf_fip.scripts.backdoor_seq2seq import main
from hf_fip.scripts.terminal import run

if __name__ == "__main__":
    run(main)
