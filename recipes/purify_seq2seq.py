"""Take the backdoor out of a model that writes text: python or accelerate launch recipes/purify_seq2seq.py --help"""

from hf_fip.scripts.purify_seq2seq import main
from hf_fip.scripts.terminal import run

if __name__ == "__main__":
    run(main)
