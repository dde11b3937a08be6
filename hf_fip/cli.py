"""The command `hf-fip`: one word for each recipe, with the recipe's own arguments."""

from __future__ import annotations

import importlib
import sys

# Word, module under hf_fip.scripts, what it does. The modules are imported when they are asked for.
COMMANDS = {
    "purify": ("purify_{task}", "take the backdoor out of a model, with a little clean data"),
    "backdoor": ("backdoor_{task}", "train a model with a backdoor, to practise on"),
    "evaluate": ("evaluate_{task}", "measure ACC, ASR and RA of a model again; of images, after more attacks too"),
    "tasks": ("tasks", "list the tasks that those three know; images by default"),
    "audit": ("audit_image", "look for backdoors in a model without knowing the trigger"),
    "curvature": ("analyze_curvature", "measure how sharp the minimum is that a model sits in"),
    "attacks": ("list_attacks", "list the attacks and their options"),
    "compare": ("compare_runs", "put purifications side by side"),
    "card": ("write_card", "write the card of a purified model again"),
    "push": ("push_model", "push a purified model or adapter to the Hub"),
    "pull": ("pull_model", "get a model or adapter from the Hub, looked at first"),
    "demo-app": ("demo_app", "show a model before and after, side by side in the browser"),
    "completion": ("print_completion", "print what makes a shell complete all this"),
}
EXIT_CODES = """\
Exit codes: 0 done; 1 an error, one line of which says what to do; 2 no such word; 3 the figures of a model's report
are not those that `evaluate` measured; 130 interrupted (Ctrl-C); 143 terminated (SIGTERM)."""


def main() -> None:
    """`hf-fip WORD …`; the exit codes are `EXIT_CODES`."""
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
    run(lambda: _run(word))


def _run(word: str) -> None:
    module = COMMANDS[word][0]
    if "{task}" in module:
        from .scripts.tasks import take_task

        arguments = sys.argv[1:]
        module = module.format(task=take_task(arguments, or_model=word == "evaluate"))
        sys.argv[1:] = arguments
    importlib.import_module(f".scripts.{module}", __package__).main()


def _help() -> str:
    words = "\n".join(f"  {word:12}{what}" for word, (_, what) in COMMANDS.items())
    return (
        "usage: hf-fip WORD [TASK] [--config file.yaml] [--argument value ...]\n\n"
        "Takes backdoors out of neural networks.\n\n"
        f"{words}\n\n`hf-fip WORD --help` lists the arguments of each; a YAML file can hold them too. Several "
        "processes:\n`accelerate launch -m hf_fip.cli WORD ...`.\n\n" + EXIT_CODES
    )


if __name__ == "__main__":
    main()
