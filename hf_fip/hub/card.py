"""The model card: what was purified, how, and the evidence."""

from __future__ import annotations

import html
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..evaluation.metrics import METRICS

TEMPLATE = Path(__file__).with_name("card_template.md")
_CURVATURE = {  # of the loss on clean samples that purification used; not in percent
    "curvature_lambda_max": "λ_max of the clean loss, by what was trained",
    "curvature_trace": "Tr H of the same",
}
_SAID_ABOVE = ("model_name_or_path", "dataset_name", "seed")
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
FIP = "**FIP** (Fisher Information guided Purification, CCS 2024)"


@dataclass(frozen=True)
class CardWords:
    """What a card says of a task.

    Attributes:
        samples: what the samples are called, in the plural.
        pipeline_tag: the task, as the Hub calls it; None if it has no name for it.
        processor_class: the class of transformers that loads what prepares the inputs; None if nothing does.
        denominator: what the attack's measures are over, in a sentence.
    """

    samples: str = "images"
    pipeline_tag: str | None = "image-classification"
    processor_class: str | None = "AutoImageProcessor"
    denominator: str = "ASR and RA are over the triggered test images whose true class is not the target."


def make_card(
    report: dict[str, Any],
    plots: list[str],
    load_class: str,
    words: CardWords = CardWords(),
    library: str = "transformers",
) -> ModelCard:
    """A card from a run's report.

    Args:
        report: as written to `report.json`.
        plots: paths of pictures, relative to the card.
        load_class: the class that loads the model.
        words: of the task.
        library: what that class is imported from.
    """
    arguments = {name: value for name, value in report["arguments"].items() if name not in _SAID_ABOVE}
    rows = [
        f"| {', '.join(METRICS[key])} | {_percent(value)} | {_percent(report['after'][key])} |"
        for key, value in report["before"].items()
    ]
    if report["der"] is not None:
        rows.append(f"| DER (50 is no effect) | | {_percent(report['der'])} |")
    if report["curvature"] is not None:
        moments = report["curvature"]["before"], report["curvature"]["after"]
        for key, name in _CURVATURE.items():
            rows.append(f"| {name} | {' | '.join(f'{moment[key]:.4g}' for moment in moments)} |")
    is_hub_id = report["model_is_from_hub"] and _HUB_ID.fullmatch(report["model"])  # it goes into code
    data = ModelCardData(
        library_name="transformers" if report["adapter_switched_off"] is None else "peft",
        pipeline_tag=words.pipeline_tag,
        tags=["hf_fip", "backdoor-purification"],
        base_model=report["model"] if report["model_is_from_hub"] else None,
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        model=_place(report["model"]),
        dataset=_place(report["data"]["name"]),
        clean_samples=report["data"]["clean_samples"],
        test_samples=report["data"]["test_samples"],
        method=FIP if report["method"] == "fip" else f"`{report['method']}`, a method to compare FIP with,",
        attack=_escape(report["attack"] or "not known"),
        seed=report["seed"],
        table="\n".join(rows),
        arguments="\n".join(f"| `{name}` | `{_escape(value)}` |" for name, value in sorted(arguments.items())),
        cost=report["cost"],
        versions=", ".join(f"{name} {version}" for name, version in report["versions"].items()),
        plots="\n".join(f"![{Path(path).stem}]({path})" for path in plots),
        load_class=load_class,
        words=words,
        imports=_imports(load_class, words.processor_class, library),
        load_processor=f'\nprocessor = {words.processor_class}.from_pretrained("path/to/this/folder")'
        if words.processor_class
        else "",
        is_adapter=report["adapter_switched_off"] is not None,
        switched_off=_percent((report["adapter_switched_off"] or {}).get("asr")),
        base=report["model"] if is_hub_id else "path/to/the/received/model",
    )


def _imports(load_class: str, processor_class: str | None, library: str) -> str:
    names = {"transformers": [processor_class] if processor_class else []}
    names.setdefault(library, []).append(load_class)
    return "\n".join(f"from {module} import {', '.join(sorted(of_it))}" for module, of_it in names.items() if of_it)


def _percent(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.1f} %"


def _place(name: str) -> str:
    """A Hub id, or the last part of a path: where things lie on the maker's disk is nobody's business."""
    return _escape(os.path.basename(os.path.abspath(name)) if os.path.exists(name) else name)


def _escape(value: Any) -> str:
    """Text from a model or data set, for a code span or a table cell: no HTML, and no way out of either."""
    text = " ".join(str(value).split())[:200].replace("`", "'")
    return html.escape(text, quote=False).replace("|", "\\|")
