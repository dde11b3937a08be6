"""The tasks there are: each has a `backdoor_`, a `purify_` and an `evaluate_NAME.py` beside this file, and a line."""

from __future__ import annotations

import sys

TASKS = {
    "image": "classes of images: any AutoModelForImageClassification",
    "detection": "objects in images: boxes and classes, or several labels an image",
    "video": "classes of videos: any AutoModelForVideoClassification, and a CNN with an LSTM",
    "pointcloud": "classes of point clouds: PointNet, PointNet++",
    "seq2seq": "text from text: any AutoModelForSeq2SeqLM",
}
DEFAULT = "image"


def apart(name: str, arguments: list[str]) -> list[str]:
    """The arguments with `name=value` as the two words `name value`."""
    prefix = f"{name}="
    return [word for one in arguments for word in (one.split("=", 1) if one.startswith(prefix) else [one])]


def take_task(arguments: list[str], or_model: bool = False) -> str:
    """The task that a command line names, taken out of it: `pointcloud …`, `--task pointcloud …`, or the default.

    `--task=pointcloud` is the same.

    Args:
        arguments: of the command line.
        or_model: whether a first word that is no task is a model.

    Raises:
        ValueError: there is no such task.
    """
    arguments[:], name = apart("--task", arguments), DEFAULT
    if arguments and not arguments[0].startswith("-") and (not or_model or arguments[0] in TASKS):
        name = arguments.pop(0)
    while "--task" in arguments:
        place = arguments.index("--task")
        name = " ".join(arguments[place + 1 : place + 2])
        del arguments[place : place + 2]
    if name not in TASKS:
        raise ValueError(f"{name!r} is not a task: choose one of {', '.join(TASKS)}.")
    return name


def main() -> None:
    """`hf-fip tasks`."""
    if sys.argv[1:]:
        print("usage: hf-fip tasks\n\nList the tasks that purify, backdoor and evaluate know: hf-fip purify TASK.\n")
    for name, what in TASKS.items():
        print(f"{name:12}{what}{' (the default)' if name == DEFAULT else ''}")
