"""The model card: what was purified, how, and the evidence. It says what the report says, and nothing else."""

from __future__ import annotations

import hashlib
import keyword
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..evaluation.metrics import METRICS
from .safety import LONGEST_REPORT, commit_of, is_revision, read_object
from .text import in_markdown, one_line

TEMPLATE = Path(__file__).with_name("card_template.md")
CARD_NAME, REPORT_NAME = "README.md", "report.json"
TAGS = ["hf_fip", "backdoor-purification"]
HERE = "."  # where a card says a model is that is on no Hub: code that is run beside it finds it
LIBRARIES = ("transformers", "hf_fip.models")
_LONGEST_SENTENCE = 1000  # characters of what the measures are over
_CURVATURE = {  # of the loss on clean samples that purification used; not in percent
    "curvature_lambda_max": "λ_max of the clean loss, by what was trained",
    "curvature_trace": "Tr H of the same",
}
_HUB_METRICS = {"asr": "attack_success_rate", "ra": "robust_accuracy", "map": "mAP"}  # the others are their own names
_SAID_ABOVE = ("model_name_or_path", "model_revision", "dataset_name", "seed")
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_FREE = {"language", "license", "tags"}  # what a trainer's user may set in the metadata
_LICENSE_KEYS = ("license_name", "license_link")
_PICTURE = re.compile(r"\w[\w.-]*\.png", re.ASCII)
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{1,60}")
FIP = "**FIP** (Fisher Information guided Purification, CCS 2024)"


@dataclass(frozen=True)
class CardWords:
    """What a card says of a task.

    Attributes:
        samples: what the samples are called, in the plural.
        pipeline_tag: the task, as the Hub calls it; None if it has no name for it.
        processor_class: the class of transformers that loads what prepares the inputs; None if nothing does.
        denominator: what the attack's measures are over, in a sentence.
        evaluate: the words after `hf-fip evaluate` that measure such a model again; None if none do.
    """

    samples: str = "images"
    pipeline_tag: str | None = "image-classification"
    processor_class: str | None = "AutoImageProcessor"
    denominator: str = "ASR and RA are over the triggered test images whose true class is not the target."
    evaluate: str | None = "image"


def loading_of(model: Any, words: CardWords) -> dict[str, Any]:
    """What a report keeps under `card`: how a model is loaded, and the words of its task."""
    library = LIBRARIES[1] if type(model).__module__.startswith("hf_fip.") else LIBRARIES[0]
    return {"class": type(model).__name__, "library": library, **asdict(words)}


def provenance(folder: Path | None) -> dict[str, str | None]:
    """Which weights those are in a folder that was admitted: commit on the Hub, SHA-256 of the weights, licence."""
    if folder is None:
        return dict.fromkeys(("revision", "sha256", "license", *_LICENSE_KEYS))
    digest = hashlib.sha256()
    weights = [file for file in folder.glob("*.safetensors") if file.name != "attack.safetensors"]
    for file in sorted(weights or folder.glob("pytorch_model*.bin")):
        with open(file, "rb") as opened:
            while chunk := opened.read(2**20):
                digest.update(chunk)
    said = {}
    if (folder / CARD_NAME).is_file():
        try:
            said = ModelCard.load(folder / CARD_NAME).data.to_dict()
        except Exception:  # a stranger's YAML can be wrong in any way; no licence is known then
            said = {}
    license = said.get("license")
    return {
        "revision": commit_of(folder),
        "sha256": digest.hexdigest(),
        "license": license if isinstance(license, str) and _LICENSE.fullmatch(license) else None,
        **{key: one_line(said[key]) if isinstance(said.get(key), str) else None for key in _LICENSE_KEYS},
    }


def card_of(folder: str | Path, place: str = HERE, base: str | None = None, name: str | None = None) -> ModelCard:
    """The card of a purified model or adapter, from the report and the plots in its folder.

    Args:
        folder: what a purification left.
        place: where the card's code loads the model from: a Hub id, or the folder that it is run in.
        base: the Hub id of the received model, if the report does not know one.
        name: of the purified model; by default the last part of its place.

    Raises:
        ValueError: the folder has no report of a purification by this version.
    """
    folder = Path(folder)
    report = read_object(folder / REPORT_NAME, LONGEST_REPORT)
    pictures = (path.name for path in sorted((folder / "plots").glob("*.png")))
    plots = [f"plots/{name}" for name in pictures if _PICTURE.fullmatch(name)]  # the names become Markdown
    name = name or (folder.resolve().name if place == HERE else place.rpartition("/")[2])
    try:
        return make_card(report, plots, name, place, base)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{folder / REPORT_NAME} is not the report of a purification by this version of hf_fip: {one_line(error)}."
        ) from error


def make_card(
    report: dict[str, Any], plots: list[str], name: str, place: str = HERE, base: str | None = None
) -> ModelCard:
    """A card from a run's report.

    Args:
        report: as written to `report.json`.
        plots: paths of pictures, relative to the card.
        name: of the purified model.
        place, base: as in [`card_of`].
    """
    card = report["card"]
    base = base or (report["model"] if report["model_is_from_hub"] else None)
    base = base if base and _HUB_ID.fullmatch(base) else None  # it goes into code
    is_adapter = report["adapter_switched_off"] is not None
    of_base = report["received"]
    is_known = base == report["model"] and is_revision(of_base["revision"])
    data = ModelCardData(
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag=card["pipeline_tag"],
        tags=TAGS,
        license=of_base["license"],
        license_name=of_base["license_name"],
        license_link=of_base["license_link"],
        base_model=base,
        base_model_relation=base and ("adapter" if is_adapter else "finetune"),
        model_name=one_line(name),
        eval_results=_eval_results(report),
    )
    for key in _FREE.intersection(card.get("metadata", {})):
        setattr(data, key, card["metadata"][key])
    place = place if place == HERE or _HUB_ID.fullmatch(place) else HERE
    arguments = {name: value for name, value in report["arguments"].items() if name not in _SAID_ABOVE}
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=in_markdown(name),
        model=_place(report["model"], report["model_is_from_hub"]),
        received={key: in_markdown(value) for key, value in of_base.items() if value is not None},
        dataset=_place(report["data"]["name"], False),
        samples=in_markdown(card["samples"]),
        clean_samples=report["data"]["clean_samples"],
        test_samples=report["data"]["test_samples"],
        method=FIP if report["method"] == "fip" else f"`{in_markdown(report['method'])}`, to compare FIP with,",
        attack=in_markdown(report["attack"] or "not known"),
        denominator=in_markdown(card["denominator"], _LONGEST_SENTENCE),
        chosen_by=report["arguments"].get("metric_for_best_model"),
        evaluate=card.get("evaluate") and _evaluation(card["evaluate"], place),
        seed=int(report["seed"]),
        rows=_rows(report),
        arguments=[(in_markdown(name), in_markdown(value)) for name, value in sorted(arguments.items())],
        cost=report["cost"],
        collapses=int(report.get("collapses", 0)),
        versions=in_markdown(", ".join(f"{name} {version}" for name, version in report["versions"].items())),
        plots=[(Path(path).stem, path) for path in plots],
        imports=_imports(card["library"], card["class"], card["processor_class"]),
        load_class=_identifier(card["class"]),
        processor_class=card["processor_class"] and _identifier(card["processor_class"]),
        place=place,
        is_adapter=is_adapter,
        switched_off=_shown("asr", (report["adapter_switched_off"] or {}).get("asr")),
        base=base or "path/to/the/received/model",
        revision=of_base["revision"] if is_known else None,
    )


def _evaluation(words: str, place: str) -> str:
    """The words after `hf-fip evaluate`: the task, the model and what else the task needs."""
    task, *options = words.split()
    return in_markdown(" ".join((task, place, *options)))


def _rows(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What was measured, before and after, as it is shown."""
    before, after = report["before"], report["after"]
    rows = [(_name(key), _shown(key, before[key]), _shown(key, after[key])) for key in before]
    if report["der"] is not None:
        rows.append(("DER, defense effectiveness (50 is no effect)", "", _shown("der", report["der"])))
    if report["curvature"] is not None:
        moments = report["curvature"]["before"], report["curvature"]["after"]
        for key, name in _CURVATURE.items():
            rows.append((name, *(f"{moment[key]:.4g}" for moment in moments)))
    return rows


def _eval_results(report: dict[str, Any]) -> list[EvalResult]:
    """What was measured after purification, as the Hub reads it: in percent, as in the report."""
    dataset = one_line(_name_of(report["data"]["name"]))
    attack = f" under {one_line(report['attack'])}" if report["attack"] else ""
    values = {**report["after"], "der": report["der"]}
    return [
        EvalResult(
            task_type=report["card"]["pipeline_tag"] or "other",
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split="test",
            metric_type="defense_effectiveness_rating" if key == "der" else _HUB_METRICS.get(key, key),
            metric_name=f"{_SHORT.get(key, one_line(key))}{attack if key in _OF_ATTACK else ''}{_unit(key)}",
            metric_value=value,
        )
        for key, value in values.items()
        if value is not None
    ]


_SHORT = {key: short for key, (short, _) in METRICS.items()} | {"der": "DER"}
_OF_ATTACK = ("asr", "ra", "der")


def _name(key: str) -> str:
    return ", ".join(METRICS[key]) if key in METRICS else f"`{in_markdown(key)}`"


def _unit(key: str) -> str:
    return ", %" if key in _SHORT else ""


def _shown(key: str, value: float | None) -> str:
    """A figure of ours in percent, any other as it was logged."""
    if value is None:
        return "not measured"
    return f"{value:.1f} %" if key in _SHORT else f"{value:.4g}"


def _imports(library: str, load_class: str, processor_class: str | None) -> str:
    if library not in LIBRARIES:
        raise ValueError(f"{one_line(library)} is not a library that a card imports from")
    names = {LIBRARIES[0]: [_identifier(processor_class)] if processor_class else []}
    names.setdefault(library, []).append(_identifier(load_class))
    return "\n".join(f"from {of} import {', '.join(sorted(found))}" for of, found in names.items() if found)


def _identifier(name: Any) -> str:
    """A name that may stand in code."""
    if not (isinstance(name, str) and name.isascii() and name.isidentifier() and not keyword.iskeyword(name)):
        raise ValueError(f"{one_line(name)} is no name of a class")
    return name


def _place(name: str, is_hub_id: bool) -> str:
    return in_markdown(name if is_hub_id else _name_of(name))


def _name_of(name: str) -> str:
    """A Hub id, or the last part of a path: where things lie on the maker's disk is nobody's business."""
    is_id = _HUB_ID.fullmatch(name) and not os.path.exists(name)
    return name if is_id else re.split(r"[/\\]", name.rstrip("/\\"))[-1]
