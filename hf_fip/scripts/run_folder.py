"""One folder a run: built beside its final place and moved there when it is whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers.trainer import TRAINING_ARGS_NAME

from ..checkpoint import last_complete_checkpoint
from ..hub.card import REPORT_NAME
from .terminal import say

ARGUMENTS_NAME = "arguments.json"

# The arguments that name a model, or the folder of one, which a run reads.
_MODELS = ("model", "model_name_or_path", "vs", "benign_model", "base_model", "clean_model", "attack_from")


class RunFolder:
    """The output folder of one run.

    A run works in `<output_dir>.partial`: checkpoints there, what it makes in `result` there. At the end `result` is
    moved to `<output_dir>`, so the output folder is there if and only if it is complete. A run that was killed is
    continued by the same command: its partial folder carries the arguments it was started with.

    Args:
        output_dir: the final place.
        arguments: what the run was asked for (JSON values).
        overwrite: replace a finished run, and discard an unfinished one that had other arguments.

    Raises:
        ValueError: when something is there already and may not be replaced.
    """

    def __init__(self, output_dir: str, arguments: dict[str, Any], overwrite: bool = False):
        self.final = Path(os.path.abspath(output_dir))
        self.work = self.final.with_name(self.final.name + ".partial")
        self.result = self.work / "result"
        self.arguments = json.loads(json.dumps(arguments))
        taken = self.final.exists() and (not self.final.is_dir() or any(self.final.iterdir()))
        if taken and not overwrite:
            raise ValueError(
                f"{output_dir} is there already: choose another --output_dir or add --overwrite_output_dir."
            )
        if taken and not (self.final / REPORT_NAME).is_file():
            raise ValueError(f"{output_dir} is not what an earlier run left: choose another --output_dir.")
        if taken and (lost := self._would_lose()):
            raise ValueError(f"{output_dir} holds {lost}, which this run reads: choose another --output_dir.")
        above = next(folder for folder in self.final.parents if folder.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise ValueError(f"{output_dir} cannot be made: {above} is no folder that you may write to.")
        self.discard_first = self.work.exists() and self._recorded() != self.arguments
        if self.discard_first and not overwrite and self.checkpoint:
            raise ValueError(
                f"{self.work} holds an unfinished run with other arguments: repeat its command to finish it, "
                "or add --overwrite_output_dir to discard it."
            )
        PartialState().wait_for_everyone()

    def __enter__(self) -> RunFolder:
        """Make the partial folder, or find it with the checkpoint to go on from."""
        if PartialState().is_main_process:
            shutil.rmtree(self.work if self.discard_first else self.result, ignore_errors=True)
            self.work.mkdir(parents=True, exist_ok=True)
            write_json(self.work / ARGUMENTS_NAME, self.arguments)
        PartialState().wait_for_everyone()
        if self.checkpoint:
            say(f"Going on with an interrupted run, from {os.path.relpath(self.checkpoint)}.")
        return self

    def __exit__(self, kind, error, traceback) -> None:
        """After a training that diverged, or before the first checkpoint, leave nothing.

        After any other error (a damaged file, a full disk, Ctrl-C) the checkpoint stays to go on from.
        """
        failed = kind is not None and issubclass(kind, Exception)
        hopeless = failed and issubclass(kind, FloatingPointError)
        if failed and PartialState().is_main_process and (hopeless or self.checkpoint is None):
            shutil.rmtree(self.work, ignore_errors=True)

    @property
    def checkpoint(self) -> str | None:
        """The checkpoint to go on from; None for a new run."""
        return last_complete_checkpoint(str(self.work))

    def publish(self) -> None:
        """Move the result to its place and drop the rest."""
        PartialState().wait_for_everyone()
        if PartialState().is_main_process:
            (self.result / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle; report.json has the arguments
            replaced = self.final.with_name(self.final.name + ".replaced")
            shutil.rmtree(replaced, ignore_errors=True)
            if self.final.exists():
                os.replace(self.final, replaced)
            os.replace(self.result, self.final)
            (self.work / ARGUMENTS_NAME).unlink()  # first: what is left is then no run to go on with
            shutil.rmtree(self.work)
            shutil.rmtree(replaced, ignore_errors=True)
        PartialState().wait_for_everyone()

    def _would_lose(self) -> str | None:
        """A model that the run reads and that lies in the folder it would replace."""
        final = self.final.resolve()
        for model in filter(None, map(self.arguments.get, _MODELS)):
            if final in (place := Path(model).resolve(), *place.parents):
                return model
        return None

    def _recorded(self) -> dict | None:
        try:
            return json.loads((self.work / ARGUMENTS_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A folder to write to, which becomes `folder` when all is written. For all processes of a run together."""
    partial, state = folder.with_name(folder.name + ".tmp"), PartialState()
    if state.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    state.wait_for_everyone()
    yield partial
    state.wait_for_everyone()
    if state.is_main_process:
        os.replace(partial, folder)
    state.wait_for_everyone()


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the whole file or none of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2, default=str) + "\n", encoding="utf-8")
    os.replace(temporary, path)
