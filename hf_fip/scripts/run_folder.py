"""One folder a run: built beside its final place and moved there when it is whole."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..trainer import last_complete_checkpoint

ARGUMENTS_NAME = "arguments.json"


class RunFolder:
    """The output folder of one run.

    Everything is written to `<output_dir>.partial` and moved to `<output_dir>` at the end, so the output folder is
    there if and only if it is complete. A run that was killed is continued by the same command: its partial folder
    carries the arguments it was started with.

    Args:
        output_dir: the final place.
        arguments: what the run was asked for (JSON values).
        overwrite: replace a finished run, and discard an unfinished one that had other arguments.

    Raises:
        ValueError: when something is there already and may not be replaced.
    """

    def __init__(self, output_dir: str, arguments: dict[str, Any], overwrite: bool = False):
        self.final = Path(output_dir)
        self.work = self.final.with_name(self.final.name + ".partial")
        self.arguments = json.loads(json.dumps(arguments))
        if self.final.exists() and not overwrite and (not self.final.is_dir() or any(self.final.iterdir())):
            raise ValueError(
                f"{self.final} is there already: choose another --output_dir or add --overwrite_output_dir."
            )
        self.discard_first = self.work.exists() and self._recorded() != self.arguments
        if self.discard_first and not overwrite and last_complete_checkpoint(str(self.work)):
            raise ValueError(
                f"{self.work} holds an unfinished run with other arguments: repeat its command to finish it, "
                "or add --overwrite_output_dir to discard it."
            )
        PartialState().wait_for_everyone()

    def __enter__(self) -> RunFolder:
        """Make the partial folder."""
        if PartialState().is_main_process:
            if self.discard_first:
                shutil.rmtree(self.work)
            self.work.mkdir(parents=True, exist_ok=True)
            write_json(self.work / ARGUMENTS_NAME, self.arguments)
        PartialState().wait_for_everyone()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        """After an error, remove the partial folder unless it holds a checkpoint to go on from (Ctrl-C keeps it)."""
        failed = kind is not None and issubclass(kind, Exception)
        if failed and PartialState().is_main_process and self.checkpoint is None and self.work.exists():
            shutil.rmtree(self.work)

    @property
    def checkpoint(self) -> str | None:
        """The checkpoint to go on from; None for a new run."""
        return last_complete_checkpoint(str(self.work))

    def publish(self) -> None:
        """Drop what only a resume needs and move the folder to its place."""
        PartialState().wait_for_everyone()
        if PartialState().is_main_process:
            for checkpoint in self.work.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
            (self.work / ARGUMENTS_NAME).unlink()
            replaced = self.final.with_name(self.final.name + ".replaced")
            shutil.rmtree(replaced, ignore_errors=True)
            if self.final.exists():
                os.replace(self.final, replaced)
            os.replace(self.work, self.final)
            shutil.rmtree(replaced, ignore_errors=True)
        PartialState().wait_for_everyone()

    def _recorded(self) -> dict | None:
        try:
            return json.loads((self.work / ARGUMENTS_NAME).read_text())
        except (OSError, json.JSONDecodeError):
            return None


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the whole file or none of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2, default=str) + "\n", encoding="utf-8")
    os.replace(temporary, path)
