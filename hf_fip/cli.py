"""The command `hf-fip`: one word for each recipe, with the recipe's own arguments."""

from __future__ import annotations

import importlib
import sys

# Word, module under hf_fip.scripts, what it does. The modules are imported when they are asked for.
COMMANDS = {
    "purify": ("purify_image", "take the backdoor out of an image classifier, with a little clean data"),
    "backdoor": ("backdoor_image", "train an image classifier with a backdoor, to practise on"),
    "evaluate": ("evaluate_image", "measure ACC, ASR and RA of a model, also after an attacker's next moves"),
    "audit": ("audit_image", "look for backdoors in a model without knowing the trigger"),
    "curvature": ("analyze_curvature", "measure how sharp the minimum is that a model sits in"),
    "attacks": ("list_attacks", "list the attacks and their options"),
    "compare": ("compare_runs", "put purifications side by side"),
}


def main() -> None:
    """`hf-fip WORD …`; exit codes are 0 (done), 1 (an error that says what to do), 2 (no such word), 130 (Ctrl-C)."""
    word, *rest = sys.argv[1:] or ["--help"]
    if word in ("-h", "--help"):
        print(_help())
        return
    if word == "--version":
        from . import __version__

        print(__version__)
        return
    if word not in COMMANDS:
        print(f"error: {word!r} is not a word of hf-fip.\n\n{_help()}", file=sys.stderr)
        sys.exit(2)
    from .scripts.terminal import run

    sys.argv = [f"hf-fip {word}", *rest]
    run(importlib.import_module(f".scripts.{COMMANDS[word][0]}", __package__).main)


def _help() -> str:
    words = "\n".join(f"  {word:10}{what}" for word, (_, what) in COMMANDS.items())
    return (
        "usage: hf-fip WORD [--argument value ...]\n\nTakes backdoors out of neural networks.\n\n"
        f"{words}\n\n`hf-fip WORD --help` lists the arguments of each. Several processes: `accelerate launch -m "
        "hf_fip.cli WORD ...`."
    )


if __name__ == "__main__":
    main()
