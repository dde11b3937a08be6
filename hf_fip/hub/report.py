"""What report.json holds beside measurements: arguments and versions; and the report of a trainer used from Python."""

from __future__ import annotations

import dataclasses
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import has_length

from ..evaluation.cost import trained_numbers
from .card import CardWords, loading_of, provenance
from .safety import admit

# Where things lie, what is shown and where it is published changes nothing that is measured.
_PLACES = (
    *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "victims_dir", "disable_tqdm", "json"),
    *("push_to_hub", "hub_model_id", "hub_token", "hub_strategy", "hub_private_repo", "hub_always_push"),
    *("hub_revision", "hub_create_pr", "hub_base_model"),
)
_NOT_MEASURED = ("runtime", "samples_per_second", "steps_per_second", "preparation_time")


def non_default(*groups) -> dict[str, Any]:
    """The arguments that differ from their defaults, of several dataclasses; places are left out, and tokens."""
    chosen = {}
    for group in groups:
        if isinstance(group, TrainingArguments):
            state = dict(AcceleratorState._shared_state)  # new arguments would clear it, in the middle of a training
            values, defaults = group.to_dict(), type(group)(output_dir="unused").to_dict()
            AcceleratorState._shared_state.update(state)
        else:
            values, defaults = dataclasses.asdict(group), dataclasses.asdict(type(group)())
        chosen |= {k: v for k, v in values.items() if k not in _PLACES and v != defaults[k]}
    return chosen


def versions() -> dict[str, str]:
    """The versions that a figure depends on."""
    from .. import __version__

    libraries = ("torch", "transformers", "accelerate", "peft", "datasets")
    return {"hf_fip": __version__, **{name: version(name) for name in libraries}, "python": platform.python_version()}


def collapses_of(log_history: list[dict[str, Any]]) -> int:
    """How often a training collapsed to one class, and was taken back."""
    return max((row["collapses"] for row in log_history if "collapses" in row), default=0)


def report_of(trainer, metadata: dict[str, Any]) -> dict[str, Any]:
    """What is known of a purification from its trainer alone, with its evaluations as they were logged.

    `before` is of the model as it was received, and `after` of the model as it is; None is not measured.

    Args:
        trainer: a FIP trainer.
        metadata: what else the card's metadata is to say.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    is_adapter = hasattr(model, "peft_config")
    received = model.get_base_model() if is_adapter else model
    name = str(getattr(received, "name_or_path", "") or "a module")
    before, after = (_figures(trainer.evaluations, moment) for moment in (None, trainer.moment()))
    measured = before | after
    ran = next((row for row in reversed(trainer.state.log_history) if "train_runtime" in row), None)
    cost = None
    if ran is not None:
        cost = {
            "seconds": ran["train_runtime"],
            "seconds_per_step": ran["train_runtime"] / max(1, trainer.state.global_step),
            "trainable_parameters": trained_numbers(trainer.optimizer),
        }
    try:
        source = admit(name, revision=getattr(getattr(received, "config", None), "_commit_hash", None))
    except ValueError:  # a module that was made here
        source = None
    info = getattr(trainer.train_dataset, "info", None)
    words = CardWords("samples", None, _processor_class(trainer.processing_class), "", None)
    return {
        "method": type(trainer).__name__ if ".baselines." in type(trainer).__module__ else "fip",
        "before": {key: before.get(key) for key in measured},
        "after": {key: after.get(key) for key in measured},
        "der": None,
        "adapter_switched_off": {} if is_adapter else None,
        "curvature": None,
        "cost": cost,
        "collapses": collapses_of(trainer.state.log_history),
        "model": name,
        "model_is_from_hub": source is not None and not Path(name).exists(),
        "received": provenance(source),
        "attack": None,
        "data": {
            "name": getattr(info, "dataset_name", None) or "not named",
            "clean_samples": len(trainer.train_dataset) if has_length(trainer.train_dataset) else None,
            "test_samples": None,
        },
        "card": loading_of(received, words) | {"metadata": metadata},
        "arguments": non_default(trainer.args),
        "seed": trainer.args.seed,
        "versions": versions(),
    }


def _figures(evaluations: list[dict[str, Any]], moment: int | None) -> dict[str, float]:
    """What was measured of the model of a moment, last where several times."""
    rows = (item for row in evaluations if row["moment"] == moment for item in row.items())
    figures = {key.removeprefix("eval_"): value for key, value in rows if key.startswith("eval_")}
    return {key: value for key, value in figures.items() if not key.endswith(_NOT_MEASURED)}


def _processor_class(processor) -> str | None:
    if processor is None:
        return None
    return "AutoTokenizer" if isinstance(processor, PreTrainedTokenizerBase) else "AutoImageProcessor"
