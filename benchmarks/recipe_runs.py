"""What the benchmarks that run recipes share: a recipe's report, made once, and the files of results/."""

from __future__ import annotations

import json
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from hf_fip.evaluation import over_seeds
from hf_fip.evaluation.metrics import METRICS

ROOT = Path(__file__).resolve().parent.parent
RECIPES, RESULTS = ROOT / "recipes", ROOT / "results"
KEPT = ("case", "seed", "method", "before", "after", "der", "cost", "arguments", "data", "versions")
# Methods of every task: the recipe's arguments beside its own defaults
METHODS = {
    "FIP": [],
    "fine-tuning, same settings": ["--eta_f", "0"],
    "Fast FIP": ["--adapter", "singular"],
    "Fast FIP, control": ["--adapter", "singular", "--eta_f", "0"],
}
UNDISTURBED = {"fine-tuning, undisturbed": ["--eta_f", "0", "--disturb", "false"]}  # where the recipe disturbs


def run(script: str, output: Path, *arguments: str) -> dict:
    """A recipe's report; the recipe runs only when the report is not there yet."""
    report = output / "report.json"
    if not report.is_file():
        command = [sys.executable, str(RECIPES / script), "--output_dir", str(output), *arguments]
        print("$", shlex.join(command[1:]), file=sys.stderr, flush=True)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return json.loads(report.read_text())


def folder_of(method: str) -> str:
    """Where under a victim's folder the purification by a method is kept."""
    return method.replace(", ", "-").replace(" ", "-")


def write(
    name: str,
    title: str,
    said: str,
    rows: list[dict],
    columns: dict[str, Callable[[dict], object]],
    after: str = "",
    plots: Path | None = None,
) -> None:
    """Write results/NAME/table.md and runs.json, and print the table.

    What runs.json has of other cases, seeds and methods, by commands given earlier, stays in both.

    Args:
        name: of the folder under results/.
        title, said: head of the table, and what its figures are.
        rows: reports, with `case`, `seed` and `method`.
        columns: heading, and the cell made of `over_seeds` of the rows of one case and method, with `data` and the
            numbers `trained` of the first of them, and their `seeds`.
        after: what stands below the table.
        plots: the folder of victims and runs, CASE-SEED, if the first seed's pictures of FIP are to be copied.
    """
    folder = RESULTS / name
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "runs.json"
    found = json.loads(file.read_text()) if file.is_file() else {"commands": [], "runs": []}
    made = {_key(row) for row in rows}
    rows = [row for row in found["runs"] if _key(row) not in made] + [{key: row[key] for key in KEPT} for row in rows]
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    commands = list(dict.fromkeys([*found["commands"], command]))
    file.write_text(json.dumps({"commands": commands, "runs": rows}, indent=1) + "\n")
    versions = rows[0]["versions"]
    lines = [
        f"# {title}\n",
        *(f"`{command}`\n" for command in commands),
        f"Percent, mean ± standard deviation over the seeds. {said} hf_fip {versions['hf_fip']}, torch "
        f"{versions['torch']}, transformers {versions['transformers']}, {platform.machine()} CPU.\n",
        f"| victim | method | {' | '.join(columns)} |",
        "|---|---" + "|---" * len(columns) + "|",
    ]
    for case in dict.fromkeys(row["case"] for row in rows):
        for method in dict.fromkeys(row["method"] for row in rows):
            ones = [row for row in rows if row["case"] == case and row["method"] == method]
            if not ones:
                continue
            mean = over_seeds(ones)
            mean["trained"] = f"{ones[0]['cost']['trainable_parameters']:,}"
            mean["data"], mean["seeds"] = ones[0]["data"], ", ".join(str(row["seed"]) for row in ones)
            cells = " | ".join(str(cell(mean)) for cell in columns.values())
            lines.append(f"| {case.replace(':', ', ')} | {method} | {cells} |")
        if plots is not None:
            stem = case.replace(":", "-")
            first = min(row["seed"] for row in rows if row["case"] == case)
            for plot in (plots / f"{stem}-{first}" / "FIP" / "plots").glob("*.png"):
                shutil.copy(plot, folder / f"{stem}-{plot.name}")
    text = "\n".join(lines) + "\n" + after
    (folder / "table.md").write_text(text)
    print(text)


def _key(row: dict) -> tuple:
    return row["case"], row["seed"], row["method"]


def figures(*metrics: str) -> dict[str, Callable[[dict], object]]:
    """The columns of some of `METRICS`, before and after purification."""
    return {
        f"{METRICS[metric][0]} {when}": lambda mean, when=when, metric=metric: mean[when][metric]
        for metric in metrics
        for when in ("before", "after")
    }


COST = {
    "seconds": lambda mean: mean["cost"]["seconds"],
    "trained": lambda mean: mean["trained"],
    "seeds": lambda mean: mean["seeds"],
}
