"""What a person sees: progress, the table at the end, and one line when something is wrong."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from transformers.trainer_callback import ProgressCallback


def run(main: Callable[[], None]) -> None:
    """Run a recipe's main function; a user's error is one line on stderr and exit code 1, not a traceback.

    Ctrl-C exits with 130. Set HF_FIP_TRACEBACK=1 to see where an error came from.
    """
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(_say("interrupted: the same command goes on from the last checkpoint.", 130))
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("HF_FIP_TRACEBACK"):
            raise
        sys.exit(_say("error: " + " ".join(str(error).split()), 1))


def say(message: str) -> None:
    """Print a line, on the main process only."""
    from accelerate import PartialState

    if PartialState().is_main_process:
        print(message, flush=True)


def _say(message: str, code: int) -> int:
    print(message, file=sys.stderr, flush=True)
    return code


class QuietProgress(ProgressCallback):
    """The Trainer's progress bar with the latest figures on it: no line at every log, no bar at every measurement."""

    def on_prediction_step(self, args, state, control, **kwargs):
        pass

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None and "loss" in (logs or {}):
            shown = {"task loss": "task_loss", "Tr F": "fisher_trace", "drift": "drift"}
            self.training_bar.set_postfix({k: f"{logs[v]:.3g}" for k, v in shown.items() if v in logs})


def print_comparison(before: dict, after: dict, der: float | None, cost: dict, title: str) -> None:
    """The before / after table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for heading, side in (("%", "left"), ("before", "right"), ("after", "right"), ("change", "right")):
        table.add_column(heading, justify=side)
    names = {"accuracy": "ACC  clean accuracy", "asr": "ASR  attack success rate", "ra": "RA   robust accuracy"}
    for key, name in names.items():
        if before[key] is not None:
            table.add_row(name, f"{before[key]:.1f}", f"{after[key]:.1f}", f"{after[key] - before[key]:+.1f}")
    if der is not None:
        table.add_row("DER  (50 = no effect)", "", f"{der:.1f}", "")
    table.caption = (
        f"{cost['seconds']:.1f} s, {1000 * cost['seconds_per_step']:.0f} ms a step, "
        f"{cost['trainable_parameters']:,} trainable parameters, peak {cost['peak_memory_bytes'] / 2**20:.0f} MiB"
    )
    Console().print(table)


def quiet(trainer) -> None:
    """Give a trainer the quiet progress bar, unless bars are switched off."""
    if not trainer.args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(QuietProgress)
