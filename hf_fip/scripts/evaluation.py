"""Measuring a model again, whatever the task, and comparing with what the report beside it says.

The attack and the data are the model's own, or those of its purification, unless others are named.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from torch import nn
from transformers import TrainingArguments

from ..attacks import Attack
from ..attacks.base import CONFIG_NAME
from ..evaluation.backdoor import BackdoorTest
from ..evaluation.metrics import METRICS
from ..hub.card import REPORT_NAME
from ..hub.report import non_default, versions
from ..tasks.data import split_clean
from .arguments import COMMON_DEFAULTS, AttackArguments, DataArguments, LoadArguments, parse
from .recorded import admitted, attack_folder, recorded_split, report_in, take_data, victim_of
from .run_folder import RunFolder, write_json
from .task import Data, Task
from .terminal import print_whole, say, show_progress

OTHER_FIGURES = 3  # exit code: the report beside the model says something else than was measured
TOLERANCE = 0.5  # points; another machine may answer an input in a few hundred otherwise


@dataclass
class EvaluationArguments:
    """Where else to look for what the model's folder does not hold."""

    base_model: str | None = field(
        default=None, metadata={"help": "What an adapter sits on. Default: what its adapter_config.json names."}
    )
    attack_from: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the victim whose attack is measured. Default: the model's own, or that of the victim "
            "that its report.json names."
        },
    )


@dataclass
class MeasuringArguments:
    """How to measure."""

    output_dir: str = field(default="", metadata={"help": "Write report.json there. Default: print the table only."})
    per_device_eval_batch_size: int = field(
        default=COMMON_DEFAULTS["per_device_eval_batch_size"], metadata={"help": "Inputs in one pass on a device."}
    )
    seed: int = field(default=42, metadata={"help": "Of the split of data that have no test split, if nothing says."})
    use_cpu: bool = field(default=False, metadata={"help": "Leave an accelerator alone."})
    disable_tqdm: bool = field(default=COMMON_DEFAULTS["disable_tqdm"], metadata={"help": "Show no progress."})


@dataclass
class Given:
    """A model with all that it is measured by.

    Attributes:
        place: Hub id or path of the model.
        attackers: the training samples that the defender did not keep; all, if it kept all or nothing tells.
        longest_output: `generation_max_length` of its purification, if that was set.
    """

    task: Task
    place: str
    loading: LoadArguments
    model: nn.Module
    processor: Any
    data: Data
    attack: Attack | None
    test: BackdoorTest
    attackers: Dataset
    longest_output: int | None = None


Measured = dict[str, dict[str, dict[str, float | None]]]  # model or benign → as_it_is and so on → metric → percent


def main(task: Task, description: str) -> None:
    """Measure a model from the command line.

    Raises:
        ValueError: for arguments that cannot be.
    """
    take_model()
    groups = (task.data_arguments, task.attack_arguments, task.load_arguments, EvaluationArguments, MeasuringArguments)
    evaluate(task, *parse(groups, description))


def take_model() -> None:
    """Let the model be named first on the command line, without --model_name_or_path."""
    if sys.argv[1:] and not sys.argv[1].startswith("-"):
        sys.argv.insert(1, "--model_name_or_path")


def as_it_is(given: Given, measuring: MeasuringArguments) -> tuple[Measured, list[str]]:
    """The model's figures, and nothing to note."""
    task, options = given.task, dict(given.task.defaults)
    if given.longest_output is not None:
        options["generation_max_length"] = given.longest_output
    with tempfile.TemporaryDirectory() as folder:
        config = task.config(
            folder,
            eta_f=0.0,
            per_device_eval_batch_size=measuring.per_device_eval_batch_size,
            dataloader_pin_memory=COMMON_DEFAULTS["dataloader_pin_memory"],
            disable_tqdm=measuring.disable_tqdm,
            seed=measuring.seed,
            use_cpu=measuring.use_cpu,
            report_to=[],
            **options,
        )
        trainer = task.trainer(given.model, config, **task.trainer_options(given.model, given.processor))
        show_progress(trainer)
        return {"model": {"as_it_is": given.test.measure(trainer)}}, []


def evaluate(
    task: Task,
    data: DataArguments,
    attack_arguments: AttackArguments,
    loading: LoadArguments,
    evaluation: EvaluationArguments,
    measuring: MeasuringArguments | TrainingArguments,
    *tried,
    measure: Callable[[Given, Any], tuple[Measured, list[str]]] = as_it_is,
) -> None:
    """Evaluate a model; print the report and, unless `measuring.output_dir` is empty, write it there.

    Args:
        tried: more arguments, for the report.
        measure: what is measured, and notes on it.
    """
    arguments = non_default(data, attack_arguments, loading, evaluation, measuring, *tried)
    folder = None
    if measuring.output_dir:
        folder = RunFolder(measuring.output_dir, arguments, overwrite=loading.overwrite_output_dir)
    with redirect_stdout(sys.stderr) if loading.json else nullcontext():
        report = _report(task, data, attack_arguments, loading, evaluation, measuring, measure)
    report |= {"arguments": arguments, "seed": measuring.seed, "versions": versions()}
    if folder is not None:
        with folder:
            if PartialState().is_main_process:
                folder.result.mkdir()
                write_json(folder.result / REPORT_NAME, report)
            folder.publish()
    if loading.json:
        say(json.dumps(report, indent=2))
    elif PartialState().is_main_process:
        _print(report)
        if folder is not None:
            say(f"saved to {measuring.output_dir}: {REPORT_NAME}")
    if report["differs"]:
        sys.exit(OTHER_FIGURES)


def _report(task, data_arguments, attack_arguments, loading, evaluation, measuring, measure) -> dict[str, Any]:
    """Load everything and measure it."""
    place = loading.model_name_or_path
    if place is None:
        raise ValueError("Which model is to be evaluated? Set --model_name_or_path.")
    folder = admitted(place, loading.model_revision, loading.trust())
    purification = report_in(folder)
    as_reported = take_data(data_arguments, purification)
    source = _attack_source(evaluation, folder, purification)
    recorded = recorded_split(source)
    split_seed = _seed_of_split(data_arguments, purification, recorded, measuring.seed)
    of_base = loading.model_revision if Path(place).is_dir() else None  # a Hub id's revision is its own
    model, processor = task.load_model(str(folder), loading, base_model=evaluation.base_model, revision=of_base)
    data = task.match(task.load_data(data_arguments, split_seed), model)
    attack = task.attack(attack_arguments, source, data)
    if recorded and recorded["out_of"] != len(data.train):
        samples = task.words.samples
        raise ValueError(
            f"The victim is of {recorded['out_of']} training {samples} of {recorded['data']}, and these are "
            f"{len(data.train)} of {data.name}: give the data, splits and --max_train_samples it was trained with."
        )
    everything = len(data.train)
    kept = data_arguments.clean_count(everything, recorded["samples"] if recorded else _kept(purification))
    given = Given(
        *(task, place, loading, model, processor, data, attack),
        test=task.test(data, attack, model, processor),
        attackers=data.train if kept in (0, everything) else split_clean(data.train, kept, split_seed)[1],
        longest_output=_longest_output(purification),
    )
    measured, notes = measure(given, measuring)
    if attack is None:
        name = METRICS[task.metric][0]
        notes = [f"No attack is known for this model (--attack_from, --attack): only {name} is measured.", *notes]
    said = _figures(purification) if as_reported and not (attack_arguments.attack or evaluation.attack_from) else None
    return {
        "reported": said,
        "differs": bool(said) and _differ(said, measured["model"]["as_it_is"]),
        "model": place,
        "attack": attack and attack.name,
        "data": {
            "name": data.name,
            "test_samples": len(given.test.clean),
            "counted_for_asr": given.test.counted_for_asr(),
            "attackers_samples": len(given.attackers),
        },
        "measured": measured,
        "notes": notes + _notes_on_report(said, measured["model"]["as_it_is"]),
    }


# Where things come from


def _attack_source(evaluation: EvaluationArguments, folder: Path, purification: dict) -> str:
    """The folder with the attack: the one that was named; the model's own; or that of the victim it was made from."""
    given = evaluation.attack_from
    if given is not None and attack_folder(given) is None:
        raise ValueError(f"--attack_from {given}: there is no {CONFIG_NAME}.")
    if given is not None or attack_folder(folder) is not None:
        return given or str(folder)
    return victim_of(purification, str(folder))


def _seed_of_split(data: DataArguments, purification: dict, recorded: dict | None, otherwise: int) -> int:
    """What the data were split by when the model was made, so that its test samples are still unseen."""
    split_seed = purification.get("split_seed")
    seeds = (data.split_seed, recorded and recorded["seed"], split_seed, purification.get("seed"), otherwise)
    return next(seed for seed in seeds if isinstance(seed, int))


def _kept(purification: dict) -> int:
    """How many samples the defender kept, as far as the report of a purification says."""
    data = purification.get("data")
    kept = data.get("clean_samples") if isinstance(data, dict) else None
    return kept if isinstance(kept, int) and kept > 0 else 0


def _longest_output(purification: dict) -> int | None:
    arguments = purification.get("arguments")
    longest = arguments.get("generation_max_length") if isinstance(arguments, dict) else None
    return longest if isinstance(longest, int) and longest > 0 else None


def _figures(purification: dict) -> dict[str, float] | None:
    """The figures that the report of a purification has of the purified model."""
    after = purification.get("after")
    if not isinstance(after, dict):
        return None
    return {key: after[key] for key in METRICS if isinstance(after.get(key), (int, float))}


def _differ(reported: dict[str, float], measured: dict) -> bool:
    return any(measured.get(key) is None or abs(measured[key] - value) > TOLERANCE for key, value in reported.items())


# What comes out


def _notes_on_report(reported: dict[str, float] | None, measured: dict) -> list[str]:
    """Whether the report beside the model says what was measured now."""
    if not reported:
        return []
    if not _differ(reported, measured):
        return [f"The model's {REPORT_NAME} says the same."]
    said = ", ".join(f"{METRICS[key][0]} {value:.1f}" for key, value in reported.items())
    return [f"The model's {REPORT_NAME} says something else: {said}."]


def _print(report: dict) -> None:
    """The table, at most 80 columns wide, and the notes."""
    from rich.table import Table

    counts = report["data"]
    first = report["measured"]["model"]["as_it_is"]
    columns = [key for key in METRICS if first.get(key) is not None]
    table = Table()
    table.add_column("%")
    for key in columns:
        inputs = counts["counted_for_asr" if key in ("asr", "ra") else "test_samples"]
        table.add_column(f"{METRICS[key][0]}\n(n = {inputs:,})", justify="right")
    for name, prefix in (("model", ""), ("benign", "benign model, ")):
        for row, measured in report["measured"].get(name, {}).items():
            table.add_row(prefix + row.replace("_", " "), *(f"{measured[key]:.1f}" for key in columns))
        table.add_section()
    say(f"{report['model']}, {report['attack'] or 'no known attack'}, {counts['name']}:")
    print_whole(table)
    for note in report["notes"]:
        say(note)
