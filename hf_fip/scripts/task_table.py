"""recipes/README.md, made from what the tasks themselves say.

python -m hf_fip.scripts.task_table > recipes/README.md
"""

from __future__ import annotations

import importlib
import inspect
import re
from dataclasses import fields

from ..attacks import attack_names
from ..evaluation.metrics import METRICS
from .task import Task
from .tasks import TASKS

_HEAD = """\
# Recipes

Each runs by itself on data that need no download: `python recipes/NAME.py`, or `accelerate launch recipes/NAME.py` for
several processes. `--help` explains all arguments. `backdoor_…` trains a victim to practise on; `purify_…` takes the
backdoor out of a model, one of those or your own, by FIP or, with `--adapter singular`, by Fast FIP, and writes one
folder: model or adapter, card, `report.json`, pictures. The same by one command: `hf-fip purify TASK`.

This page is generated, by `python -m hf_fip.scripts.task_table`.
"""
_TAIL = """
`evaluate_…` measures a model again and compares with its report; classifiers of images also after relearning and
reactivation. `compare_runs.py` puts purifications side by side; for images `audit_image.py` looks for a
backdoor without knowing the trigger, and `analyze_curvature.py` measures how sharp a minimum is.
"""


def table() -> str:
    """The page, in Markdown."""
    heads = ("task", "models", "victims made here", "attacks", "data", "measured", "recipes")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in TASKS:
        module = importlib.import_module(f".purify_{name}", __package__)
        for task in _tasks_of(module):
            lines.append("| " + " | ".join(_cells(name, task)) + " |")
    return _HEAD + "\n" + "\n".join(lines) + "\n" + _TAIL


def _tasks_of(module) -> list[type[Task]]:
    found = (value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Task))
    return [task for task in found if not inspect.isabstract(task)]


def _cells(name: str, task: type[Task]) -> list[str]:
    architecture = _field(task.model_arguments, "architecture")
    data = _field(task.data_arguments, "dataset_name")
    attacks = attack_names(task.poison_arguments.input_kind)
    recipes = [f"backdoor_{name}.py", *_PURIFY.get(name, [f"purify_{name}.py"]), f"evaluate_{name}.py"]
    return [
        f"`{name}`: {task.words.samples}",
        inspect.getdoc(task).split("\n")[0].rstrip("."),
        ", ".join(f"`{choice}`" for choice in architecture.metadata["choices"]),
        ", ".join(f"`{attack}`" for attack in attacks),
        re.sub(r"'(\w+)'", r"`\1`", data.metadata["help"]),
        f"{METRICS[task.metric][0]}, ASR",
        ", ".join(f"`{recipe}`" for recipe in recipes),
    ]


_PURIFY = {"image": ["purify_vit.py", "purify_cnn.py"]}  # their victims differ


def _field(group: type, name: str):
    return next(field for field in fields(group) if field.name == name)


if __name__ == "__main__":
    print(table(), end="")
