"""What a person sees: progress, the table at the end, and one line when something is wrong."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path

import datasets
import torch
import transformers
import yaml
from accelerate import PartialState
from safetensors import SafetensorError
from tqdm.auto import tqdm
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback

from ..evaluation.metrics import COSTLY, METRICS
from ..hub.text import visible, without_tokens
from ..processes import are_on_cpu
from .tasks import apart

# What a wrong argument, file or place raises, or a full disk or memory; anything else is a bug with its traceback.
USER_ERRORS = (ValueError, OSError, ImportError, FloatingPointError, SafetensorError, torch.OutOfMemoryError)


_GOES_ON = "the same command goes on from the last checkpoint, if there is one."


class _Terminated(BaseException):
    """SIGTERM came."""


def _terminate(number, frame):
    raise _Terminated


def run(main: Callable[[], None]) -> None:
    """Run a recipe's main function; a user's error is one line on stderr and exit code 1, not a traceback.

    Ctrl-C exits with 130 and SIGTERM with 143; a training is at a checkpoint then. Set HF_FIP_TRACEBACK=1 to see where
    an error came from.
    """
    quiet_libraries()
    if are_on_cpu():
        PartialState(cpu=True)
    found = signal.signal(signal.SIGTERM, _terminate)
    try:
        sys.argv[1:] = with_config(sys.argv[1:])
        main()
    except KeyboardInterrupt:
        sys.exit(_complain(f"interrupted: {_GOES_ON}", 130))
    except _Terminated:
        sys.exit(_complain(f"terminated: {_GOES_ON}", 143))
    except (*USER_ERRORS, RuntimeError) as error:
        is_missing = "to be installed" in str(error)  # what --report_to names
        if os.environ.get("HF_FIP_TRACEBACK") or not (is_missing or isinstance(error, USER_ERRORS)):
            raise
        sys.exit(_complain("error: " + (" ".join(str(error).split()) or type(error).__name__), 1))
    finally:
        signal.signal(signal.SIGTERM, found)


def with_config(arguments: list[str]) -> list[str]:
    """The arguments with those of `--config file.yaml`, or `--config=file.yaml`, before them, which they win over.

    Raises:
        ValueError: the file is not there, or is no YAML of names and values.
    """
    arguments = apart("--config", arguments)
    if "--config" not in arguments:
        return arguments
    place = arguments.index("--config")
    if place + 1 == len(arguments):
        raise ValueError("--config needs the name of a YAML file.")
    name, rest = arguments[place + 1], arguments[:place] + arguments[place + 2 :]
    try:
        values = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"--config {name} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config {name} holds no names and values, such as `max_steps: 100`.")
    given = []
    for key, value in values.items():
        if value is not None:
            several = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
            given += [f"--{key}", *map(str, several)]
    words = next((i for i, argument in enumerate(rest) if argument.startswith("-")), len(rest))
    return rest[:words] + given + rest[words:]  # behind a word such as the name of a task


@contextmanager
def json_of(report: Path, wanted: bool) -> Iterator[None]:
    """Where JSON is wanted, everything said goes to stderr, and the report to stdout when it is there."""
    with redirect_stdout(sys.stderr) if wanted else nullcontext():
        yield
    if wanted and PartialState().is_main_process:
        print(report.read_text(encoding="utf-8"), end="")


def quiet_libraries() -> None:
    """Leave the screen to the recipe: warnings and bars of the libraries only where they were asked for."""
    sys.stdout.reconfigure(errors="replace")  # a terminal without the arrow should not end a run
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub.repocard").setLevel(logging.ERROR)  # a README without metadata is fine
    datasets.disable_caching()  # poisoned images are made anew in each run, and dropped with it
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()


def say(message: str) -> None:
    """Print a line, on the main process only."""
    if PartialState().is_main_process:
        print(visible(message), flush=True)


def _complain(message: str, code: int) -> int:
    if sys.stderr.isatty():
        print(file=sys.stderr)  # off the line of a progress bar
    print(visible(without_tokens(message)), file=sys.stderr, flush=True)
    return code


class BarProgress(ProgressCallback):
    """One bar for a training with the latest figures on it, and a passing one for a measurement outside training."""

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is None:
            if self.prediction_bar is None:
                self.prediction_bar = tqdm(total=len(eval_dataloader), desc="Measuring", leave=False)
            self.prediction_bar.update(1)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None and "loss" in (logs or {}):
            self.training_bar.set_postfix_str(_figures(logs))


class LineProgress(TrainerCallback):
    """About ten plain lines over a training, for a log file."""

    def on_train_begin(self, args, state, control, **kwargs):
        self._next = 0

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}) and state.global_step >= self._next:
            self._next = state.global_step + state.max_steps / 10
            say(f"step {state.global_step} of {state.max_steps}: {_figures(logs)}")


def _figures(logs: dict[str, float]) -> str:
    names = {"task loss": "task_loss", "Tr F": "fisher_trace", "drift": "drift"}
    return ", ".join(f"{name} {logs[key]:.3g}" for name, key in names.items() if key in logs)


def show_progress(trainer) -> None:
    """Give a trainer one of the two above in place of its own, which prints every log."""
    trainer.remove_callback(PrinterCallback if trainer.args.disable_tqdm else ProgressCallback)
    trainer.add_callback(LineProgress if trainer.args.disable_tqdm else BarProgress)


def print_whole(table) -> None:
    """Print a table of rich; a terminal of fewer than 80 columns breaks its lines, and no figure is cut."""
    from rich.console import Console

    Console(width=max(80, Console().width)).print(table)


def print_comparison(before: dict, after: dict, der: float | None, cost: dict) -> None:
    """The before / after table, at most 80 columns wide."""
    from rich.table import Table

    table = Table()
    for heading, side in (("%", "left"), ("before", "right"), ("after", "right"), ("change", "right")):
        table.add_column(heading, justify=side)
    for key, value in before.items():
        if value is not None:
            short, long = METRICS[key]
            table.add_row(f"{short:4} {long}", f"{value:.1f}", f"{after[key]:.1f}", f"{after[key] - value:+.1f}")
    if der is not None:
        table.add_row("DER  (50 = no effect)", "", f"{der:.1f}", "")
    print_whole(table)
    several = f" on {cost['processes']} processes" if cost["processes"] > 1 else ""
    print(
        f"{cost['seconds']:.1f} s{several}, {1000 * cost['seconds_per_step']:.0f} ms a step, "
        f"{cost['trainable_parameters']:,} trainable parameters, peak {cost['peak_memory_bytes'] / 2**20:.0f} MiB, "
        f"{file_size(cost['file_bytes'])} saved"
    )


def warn_if_costly(before: dict, after: dict, metric: str, learning_rate: float) -> None:
    """Say so, and what to try, when much of the clean metric is gone."""
    if after[metric] < (1 - COSTLY) * before[metric]:
        say(
            f"warning: more than {COSTLY:.0%} of the {METRICS[metric][1]} is gone. More clean samples keep it, and a "
            f"--learning_rate below {learning_rate:g} does, which may keep a backdoor too."
        )


def file_size(size: int) -> str:
    """A number of bytes as a person reads it, in units of 1,000."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
