"""Audit an image classifier for a backdoor, knowing no trigger.

For each class the smallest patch and the smallest perturbation are searched for that take nearly all clean images of
other classes to it. A class that needs a far smaller one than the rest (anomaly index above 2) is flagged. With --vs,
the model as it was received is audited too. One folder comes out: report.json and plots/.

    python recipes/audit_image.py outputs/victim
    python recipes/audit_image.py outputs/purified --vs outputs/victim
    python recipes/audit_image.py someone/model --dataset_name cifar10 --clean_samples 500 --json

What it cannot do: it finds small static triggers. A model without a flag is not proven clean: warps, sample-specific
and all-to-all triggers leave none. A flag is not proof either: some classes are easy to reach by nature, and with few
classes the index is a weak statistic; the table says how often it flags a class by chance.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState

from ..evaluation.audit import ANOMALY_THRESHOLD, AuditReport, audit, chance_of_a_flag, compare_audits
from ..evaluation.reactivation import PixelRange
from ..hub.card import REPORT_NAME
from ..hub.report import non_default, versions
from ..hub.text import one_line
from ..plots import plot_audit
from ..tasks.data import LabelledImages, split_clean
from ..tasks.image_classification import PixelDataset, load_image_classifier, match_labels
from .arguments import HelpFormatter, Parser
from .images import ImageData, channels_of, images_of
from .recorded import split_behind, take_data_of
from .run_folder import RunFolder, write_json
from .terminal import print_whole, say

MOST_IMAGES = 500  # of those that a model's folder does not tell of; every image counts in the time it takes


@dataclass
class AuditArguments:
    """What is audited, and how thoroughly."""

    vs: str | None = field(
        default=None, metadata={"help": "The model as it was received: audited on the same images, to compare."}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub model."})
    image_processor_name: str | None = field(
        default=None, metadata={"help": "Where to take the preprocessing from, if not from the model."}
    )
    classes: str | None = field(
        default=None, metadata={"help": "Numbers of the classes to audit, as 0,3,7; at least three. Default: all."}
    )
    share: float = field(
        default=0.99, metadata={"help": "Share of the images of other classes that a trigger has to reach."}
    )
    steps: int = field(default=300, metadata={"help": "The most steps a search takes."})
    images_per_step: int = field(default=16, metadata={"help": "Clean images in each step, for each class."})
    batch_size: int = field(default=320, metadata={"help": "Images in one forward pass: lower it if memory is short."})
    seed: int = field(default=42, metadata={"help": "Seed of the search, and of the clean split."})
    use_cpu: bool = field(default=False, metadata={"help": "Leave an accelerator alone."})
    json: bool = field(default=False, metadata={"help": "Print the report as JSON in place of the table."})
    output_dir: str = field(default="outputs/audit", metadata={"help": "Where the report and the picture are put."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace what an earlier run left in --output_dir."}
    )

    def chosen(self) -> list[int] | None:
        """The classes to audit; None for all.

        Raises:
            ValueError: when they are no numbers.
        """
        try:
            return None if self.classes is None else [int(number) for number in self.classes.split(",")]
        except ValueError:
            raise ValueError(f"--classes {self.classes} has to be numbers of classes, as 0,3,7.") from None


def main() -> None:
    """`recipes/audit_image.py`."""
    groups = (ImageData, AuditArguments)
    usage = "%(prog)s MODEL [--argument value ...]"
    parser = Parser(groups, description=__doc__, usage=usage, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("model", metavar="MODEL", help="A Hub id or folder of a model, or the folder of an adapter.")
    data, arguments, rest, unknown = parser.parse_args_into_dataclasses(
        return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        parser.error(f"unknown: {' '.join(unknown)}")
    audit_image(rest.model, data, arguments)


def audit_image(place: str, data: ImageData, arguments: AuditArguments) -> None:
    """Audit a model, show what was found and write the folder `arguments.output_dir`."""
    given = {"model": place, **non_default(data, arguments)}
    given.pop("json", None)
    folder = RunFolder(arguments.output_dir, given, overwrite=arguments.overwrite_output_dir)
    models = {"model": place} if arguments.vs is None else {"received": arguments.vs, "purified": place}
    for one in models.values():
        take_data_of(one, arguments.model_revision, data)
    recorded = split_behind(place) or split_behind(arguments.vs)
    split_seed = next(s for s in (data.split_seed, recorded and recorded["seed"], arguments.seed) if s is not None)
    images = images_of(data, split_seed)
    if recorded and recorded["out_of"] != len(images.train):
        recorded = None
    everything = len(images.train)
    count = data.clean_count(everything, recorded["samples"] if recorded else min(MOST_IMAGES, everything))
    device = PartialState(cpu=arguments.use_cpu).device
    with folder:
        started, audits, names = time.perf_counter(), {}, {}
        for when, where in models.items():
            if not arguments.json:
                say(f"Auditing {where} with {count} clean images of {images.name}.")
            audits[when], names = _audit(where, images, count, split_seed, device, arguments)
        compared = compare_audits(**audits) if arguments.vs is not None else None
        chance = chance_of_a_flag(len(audits[next(iter(models))].classes))
        report = {
            "models": models,
            **{when: audited.to_dict() for when, audited in audits.items()},
            "comparison": compared,
            "chance_of_a_flag": chance,
            "data": {"name": images.name, "clean_samples": count},
            "seconds": time.perf_counter() - started,
            "arguments": given,
            "seed": arguments.seed,
            "versions": versions(),
        }
        if PartialState().is_main_process:
            folder.result.mkdir()
            write_json(folder.result / REPORT_NAME, report)
            title = f"The smallest patches, by their area in pixels: {Path(place).name}"
            plot_audit(_picture(audits, names), folder.result / "plots" / "audit.png", title=title)
        folder.publish()
    if arguments.json:
        say(json.dumps(report, indent=2, default=str))
        return
    for when, audited in audits.items():
        _print(f"{when}: {models[when]}", audited, names)
    _conclude(audits, names, compared, chance, arguments.share)
    say(f"saved to {arguments.output_dir}: {REPORT_NAME}, plots/")


def _audit(
    place: str, images: LabelledImages, count: int, split_seed: int, device: torch.device, arguments: AuditArguments
) -> tuple[AuditReport, dict[int, str]]:
    """The audit of one model, and the names of its classes."""
    model, processor = load_image_classifier(
        place,
        arguments.image_processor_name,
        revision=arguments.model_revision,
    )
    matched = match_labels(images, model)
    clean = matched.train if count == len(matched.train) else split_clean(matched.train, count, split_seed)[0]
    dataset = PixelDataset(clean, processor, channels_of(model))
    inputs = torch.stack([item["pixel_values"] for item in dataset])
    extremes = PixelRange.of(processor, *inputs.shape[2:], inputs.shape[1])
    middle = (slice(None), inputs.shape[2] // 2, inputs.shape[3] // 2)
    black, span = extremes.black[middle], (extremes.white - extremes.black)[middle]
    pixels = ((inputs - black.view(-1, 1, 1)) / span.view(-1, 1, 1)).clamp(0, 1)
    result = audit(
        model.to(device),
        pixels,
        torch.as_tensor(dataset.labels),
        mean=(-black / span).tolist(),
        std=(1 / span).tolist(),
        classes=arguments.chosen(),
        share=arguments.share,
        steps=arguments.steps,
        images_per_step=arguments.images_per_step,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        progress=sys.stderr.isatty(),
    )
    return result, {**model.config.id2label, **dict(enumerate(matched.class_names))}


def _picture(audits: dict[str, AuditReport], names: dict[int, str]) -> dict[str, list[dict]]:
    """Rows for `plot_audit`."""
    return {
        when: [
            {
                "label": names[found.label],
                "mask": found.patch.trigger[0].numpy(),
                "pattern": found.patch.trigger[1].numpy(),
                "size": found.patch.size,
                "anomaly": found.patch_anomaly,
                "flagged": found.patch_anomaly > ANOMALY_THRESHOLD,
            }
            for found in audited.classes
        ]
        for when, audited in audits.items()
    }


def _print(title: str, audited: AuditReport, names: dict[int, str]) -> None:
    """The table of one model, at most 80 columns wide."""
    from rich.table import Table
    from rich.text import Text

    table = Table()
    table.add_column("class")
    for heading in ("n", "patch\npixels", "reach\n%", "index", "pert.\nL2", "reach\n%", "index"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for found in audited.classes:
        table.add_row(
            Text(one_line(names[found.label])),
            str(found.images),
            f"{found.patch.size:.1f}",
            f"{100 * found.patch.share:.1f}",
            f"{found.patch_anomaly:.1f}",
            f"{found.perturbation.size:.2f}",
            f"{100 * found.perturbation.share:.1f}",
            f"{found.perturbation_anomaly:.1f}",
            "flagged" if found.flagged else "",
        )
    say(f"{title}, Tr F {audited.fisher_trace:.3g}")
    if PartialState().is_main_process:
        print_whole(table)


def _conclude(
    audits: dict[str, AuditReport], names: dict[int, str], compared: dict | None, chance: float, share: float
) -> None:
    """What the figures say, and what they do not."""
    if compared is not None:
        texts = {
            "removed": "flagged before, no longer",
            "left": "flagged before and after",
            "new": "flagged only after",
        }
        for key, text in texts.items():
            if compared[key]:
                say(f"{text}: {', '.join(names[label] for label in compared[key])}")
    if not any(audited.flagged for audited in audits.values()):
        say("No class is flagged. That proves nothing: warps, sample-specific and all-to-all triggers leave no flag.")
    if any(f.share < share for a in audits.values() for c in a.classes for f in (c.patch, c.perturbation)):
        say("Where the reach fell short, no trigger was found and the index leaves the class out: raise --steps.")
    count = len(next(iter(audits.values())).classes)
    say(
        "n: clean images of other classes. reach: the share of them that the trigger takes to the class.\n"
        "pert.: additive perturbation. The audit finds small static triggers only. By chance an index\n"
        f"is above 2 for one of {count} classes in {100 * chance:.0f} % of models: look at the picture."
    )
