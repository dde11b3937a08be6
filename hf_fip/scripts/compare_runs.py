"""Purifications side by side: ACC (or the task's own metric), ASR, RA, DER, time, trainable parameters and file size.

python recipes/compare_runs.py outputs/purify_vit outputs/purify_vit_fast
"""

from __future__ import annotations

import json
from pathlib import Path

from ..evaluation.metrics import METRICS
from ..hub.card import REPORT_NAME
from .arguments import word_parser
from .terminal import file_size, print_whole, say


def main() -> None:
    """`recipes/compare_runs.py`."""
    parser = word_parser(__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="output folders of purify recipes")
    reports = {folder: _report_of(folder) for folder in parser.parse_args().folders}
    _warn_of_other_victims(reports)
    _print_table(reports)


def _report_of(folder: Path) -> dict:
    """A purification's report.

    Raises:
        ValueError: when the folder has none.
    """
    try:
        report = json.loads((folder / REPORT_NAME).read_text(encoding="utf-8"))
        return {key: report[key] for key in ("before", "after", "der", "cost", "model")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} is not what a purify recipe left: it has no {REPORT_NAME} of one.") from error


def _warn_of_other_victims(reports: dict[Path, dict]) -> None:
    models = {report["model"] for report in reports.values()}
    if len(models) > 1:
        say(f"warning: these are purifications of {len(models)} models: {', '.join(sorted(models))}.")


def _print_table(reports: dict[Path, dict]) -> None:
    from rich.table import Table

    table = Table()
    keys = list(dict.fromkeys(key for report in reports.values() for key in report["before"]))
    for heading in ("", *(METRICS[key][0] for key in keys), "DER", "seconds", "trained", "saved"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=bool(heading))
    first = next(iter(reports.values()))
    names = [folder.resolve().name for folder in reports]
    table.add_row("received", *_percentages(first["before"], keys), "", "", "", "", end_section=True)
    for (folder, report), name in zip(reports.items(), names, strict=True):
        cost = report["cost"]
        table.add_row(
            name if names.count(name) == 1 else str(folder),
            *_percentages(report["after"], keys),
            "" if report["der"] is None else f"{report['der']:.1f}",
            f"{cost['seconds']:.1f}",
            f"{cost['trainable_parameters']:,}",
            file_size(cost["file_bytes"]),
        )
    print_whole(table)


def _percentages(measured: dict, keys: list[str]) -> list[str]:
    return ["" if measured.get(key) is None else f"{measured[key]:.1f}" for key in keys]
