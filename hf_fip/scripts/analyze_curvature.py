"""Measure how sharp the minimum is that an image classifier sits in.

The largest eigenvalues of the loss Hessian (the first is λ_max), its trace Tr H and its spectral density on clean
images, and the loss around the model on clean images and, when the attack is known, on triggered ones with the label
that the attacker wants. With --vs, the model as it was received is measured too. One folder comes out: report.json and
plots/, each picture for a light and a dark background.

    python recipes/analyze_curvature.py outputs/victim
    python recipes/analyze_curvature.py outputs/purified --vs outputs/victim
    python recipes/analyze_curvature.py someone/model --dataset_name cifar10 --clean_samples 500 --json
    accelerate launch recipes/analyze_curvature.py outputs/purified

The images are test images, which neither training nor purification has seen, unless --clean_samples or
--clean_fraction asks for the defender's clean split. Small curvature is no proof of a clean model, nor a large one of
a backdoor: compare with a benign model of the same kind.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from torch import nn

from ..attacks import Attack, trigger
from ..curvature import Curvature, Landscape, loss_landscape, measure_curvature
from ..curvature.plots import plot_landscape, plot_spectral_density
from ..drawing import DARK, LIGHT
from ..hub.card import REPORT_NAME
from ..hub.report import non_default, versions
from ..processes import share, sum_over_processes
from ..tasks.data import LabelledImages, split_clean
from ..tasks.image_classification import PixelDataset, load_image_classifier, match_labels
from .arguments import AttackArguments, HelpFormatter, Parser, check_least
from .images import ImageData, channels_of, images_of, reading
from .recorded import attack_of, report_in, split_behind, take_data_of, victim_of
from .run_folder import RunFolder, write_json
from .terminal import print_whole, say

MOST_IMAGES = 500  # test images, of those that there are; every image counts in the time it takes
PLANE = 11  # points along each direction of the plane


@dataclass
class CurvatureArguments:
    """What is measured, and how thoroughly."""

    vs: str | None = field(
        default=None, metadata={"help": "The model as it was received: measured on the same images, to compare."}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub model."})
    image_processor_name: str | None = field(
        default=None, metadata={"help": "Where to take the preprocessing from, if not from the model."}
    )
    eigenvalues: int = field(default=5, metadata={"help": "How many of the largest eigenvalues."})
    tolerance: float = field(default=1e-3, metadata={"help": "Error of the eigenvalues, relative to each."})
    probes: int = field(default=20, metadata={"help": "Random probes of Tr H; twice as many halve its variance."})
    density_runs: int = field(
        default=2, metadata={"help": "Random starts of the spectral density, of 40 products each; 0 for none."}
    )
    landscape_points: int = field(
        default=21, metadata={"help": "Points on the line through the model; 0 for no landscape."}
    )
    batch_size: int = field(default=128, metadata={"help": "Images in one pass; halved where memory is short."})
    seed: int = field(default=42, metadata={"help": "Seed of the random vectors, and of the clean split."})
    use_cpu: bool = field(default=False, metadata={"help": "Leave an accelerator alone."})
    json: bool = field(default=False, metadata={"help": "Print the report as JSON in place of the table."})
    output_dir: str = field(
        default="outputs/curvature", metadata={"help": "Where the report and the pictures are put."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace what an earlier run left in --output_dir."}
    )

    def __post_init__(self):
        check_least(self, eigenvalues=1, probes=1, density_runs=0, landscape_points=0, batch_size=1)
        if self.landscape_points == 1:
            raise ValueError("--landscape_points=1 is no line: ask for at least 2 points, or 0 for no landscape.")


def main() -> None:
    """`hf-fip curvature`, `recipes/analyze_curvature.py`."""
    groups = (ImageData, AttackArguments, CurvatureArguments)
    usage = "%(prog)s MODEL [--argument value ...]"
    parser = Parser(groups, description=__doc__, usage=usage, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("model", metavar="MODEL", help="A Hub id or folder of a model, or the folder of an adapter.")
    data, attack, arguments, rest, unknown = parser.parse_args_into_dataclasses(
        return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        parser.error(f"unknown: {' '.join(unknown)}")
    analyze_curvature(rest.model, data, attack, arguments)


def analyze_curvature(
    place: str, data: ImageData, attack_arguments: AttackArguments, arguments: CurvatureArguments
) -> None:
    """Measure the curvature of a model, show it and write the folder `arguments.output_dir`."""
    given = {"model": place, **non_default(data, attack_arguments, arguments)}
    given.pop("json", None)
    folder = RunFolder(arguments.output_dir, given, overwrite=arguments.overwrite_output_dir)
    models = {"model": place} if arguments.vs is None else {"received": arguments.vs, "purified": place}
    for one in models.values():
        take_data_of(one, arguments.model_revision, data)
    source = arguments.vs or victim_of(report_in(place), place)
    recorded = split_behind(source)
    split_seed = next(s for s in (data.split_seed, recorded and recorded["seed"], arguments.seed) if s is not None)
    images = images_of(data, split_seed)
    attack = attack_of(attack_arguments, source, len(images.class_names))
    device = PartialState(cpu=arguments.use_cpu).device
    with folder:
        started, curvatures, lines, planes = time.perf_counter(), {}, {}, {}
        for when, where in models.items():
            model, processor = load_image_classifier(
                where, arguments.image_processor_name, revision=arguments.model_revision
            )
            matched = match_labels(images, model)
            split, clean = _clean(matched, data, split_seed)
            if not arguments.json:
                say(f"Measuring {where} on {len(clean)} clean {split} images of {images.name}.")
            model.requires_grad_(True).to(device)  # a merged adapter comes frozen
            batches = _batches(matched, clean, attack, model, processor, arguments.batch_size)
            curvatures[when] = _measure(model, batches["clean"], arguments)
            if arguments.landscape_points:
                lines[when] = _landscape(model, batches, arguments, 1, arguments.landscape_points)
                planes[when] = _landscape(model, batches, arguments, 2, PLANE)
        report = {
            "models": models,
            **{
                when: {
                    **curvature.to_dict(),
                    **({"landscape": lines[when].to_dict(), "plane": planes[when].to_dict()} if lines else {}),
                }
                for when, curvature in curvatures.items()
            },
            "attack": attack and attack.name,
            "data": {"name": images.name, "split": split, "samples": len(clean)},
            "seconds": time.perf_counter() - started,
            "arguments": given,
            "seed": arguments.seed,
            "versions": versions(),
        }
        if PartialState().is_main_process:
            folder.result.mkdir()
            write_json(folder.result / REPORT_NAME, report)
            _draw(folder.result / "plots", Path(place).name, curvatures, lines, planes)
        folder.publish()
    if arguments.json:
        say(json.dumps(report, indent=2, default=str))
        return
    _print(curvatures)
    say(
        f"Of the mean loss on {len(clean)} clean {split} images, BatchNorm on its running statistics. ±: standard\n"
        "error over the random probes. Compare with a benign model of the same kind: curvature alone proves nothing."
    )
    say(f"saved to {arguments.output_dir}: {REPORT_NAME}" + (", plots/" if lines or arguments.density_runs else ""))


def _clean(images: LabelledImages, data: ImageData, split_seed: int) -> tuple[str, Dataset]:
    """Which images are measured on: the name of the split, and they."""
    if data.clean_samples is None and data.clean_fraction is None:
        return "test", images.test.select(range(min(MOST_IMAGES, len(images.test))))
    return "training", split_clean(images.train, data.clean_count(len(images.train)), split_seed)[0]


def _batches(
    images: LabelledImages, clean: Dataset, attack: Attack | None, model: nn.Module, processor, size: int
) -> dict[str, list[dict]]:
    """The clean images as batches and, with an attack, the triggered ones with the label that the attacker wants."""

    def cut(dataset: Dataset, labels: np.ndarray | None = None) -> list[dict]:
        inputs = PixelDataset(dataset, processor, channels_of(model))
        pixels = torch.stack([item["pixel_values"] for item in inputs])
        labels = torch.as_tensor(inputs.labels if labels is None else labels)
        return [
            {"pixel_values": pixels[row : row + size], "labels": labels[row : row + size]}
            for row in range(0, len(pixels), size)
        ]

    with reading(images):
        batches = {"clean": cut(clean)}
        if attack is not None:
            triggered = trigger(clean, attack)
            wanted = attack.attack_label(np.asarray(triggered["label"][:]), len(images.class_names))
            batches["triggered"] = cut(triggered, wanted)
    return {kind: share(given) for kind, given in batches.items()}


def _measure(model: nn.Module, batches: list[dict], arguments: CurvatureArguments) -> Curvature:
    return measure_curvature(
        model,
        batches,
        top=arguments.eigenvalues,
        tolerance=arguments.tolerance,
        probes=arguments.probes,
        density_runs=arguments.density_runs,
        seed=arguments.seed,
        reduce=sum_over_processes,
        progress=sys.stderr.isatty(),
    )


def _landscape(
    model: nn.Module, batches: dict[str, list[dict]], arguments: CurvatureArguments, dimensions: int, points: int
) -> Landscape:
    return loss_landscape(
        model,
        batches,
        dimensions=dimensions,
        points=points,
        seed=arguments.seed,
        reduce=sum_over_processes,
        progress=sys.stderr.isatty(),
    )


def _draw(
    folder: Path,
    name: str,
    curvatures: dict[str, Curvature],
    lines: dict[str, Landscape],
    planes: dict[str, Landscape],
) -> None:
    """Every picture that there are figures for, on a light and a dark background."""
    densities = {when: found.density for when, found in curvatures.items() if found.density is not None}
    for suffix, theme in (("", LIGHT), ("-dark", DARK)):
        if densities:
            path = folder / f"spectral_density{suffix}.png"
            plot_spectral_density(densities, path, f"Eigenvalues of the loss Hessian: {name}", theme)
        if lines:
            plot_landscape(lines, folder / f"landscape{suffix}.png", f"Loss around the model: {name}", theme)
            plot_landscape(planes, folder / f"landscape_plane{suffix}.png", f"Loss around the model: {name}", theme)


def _print(curvatures: dict[str, Curvature]) -> None:
    """The table, at most 80 columns wide."""
    from rich.table import Table

    table = Table()
    table.add_column("")
    for when in curvatures:
        table.add_column(when, justify="right")
    for row in range(max(len(found.eigenvalues) for found in curvatures.values())):
        cells = (_eigenvalue(found, row) for found in curvatures.values())
        table.add_row("λ_max" if row == 0 else f"λ_{row + 1}", *cells)
    table.add_row("Tr H", *(f"{found.trace:.4g} ± {found.trace_error:.2g}" for found in curvatures.values()))
    table.add_row("loss, nats", *(f"{found.loss:.4f}" for found in curvatures.values()))
    table.add_row("parameters", *(f"{found.parameters:,}" for found in curvatures.values()))
    forms = (found.product_form.replace("_", " ") for found in curvatures.values())
    table.add_row("Hessian-vector products by", *forms)
    if PartialState().is_main_process:
        print_whole(table)
    if not all(found.converged for found in curvatures.values()):
        say("An eigenvalue with ? has not converged: raise --tolerance, or ask for fewer.")


def _eigenvalue(found: Curvature, row: int) -> str:
    return f"{found.eigenvalues[row]:.4g}{'' if found.converged else '?'}" if row < len(found.eigenvalues) else ""
