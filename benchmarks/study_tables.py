"""Tables and the picture of ACC and ASR, from the rows of a suite."""

from __future__ import annotations

import platform
import textwrap
from collections import defaultdict
from pathlib import Path

from study_suites import PUBLISHED_DEVELOPMENT

from hf_fip.drawing import LIGHT, figure
from hf_fip.evaluation import over_seeds
from hf_fip.evaluation.metrics import WEAK_VICTIM
from hf_fip.evaluation.seeds import Spread

COLUMNS = (
    "ACC",
    "ΔACC",
    "ASR",
    "RA",
    "DER",
    "relearned",
    "reactivated",
    "on benign",
    "CPU s",
    "trained",
    "runs",
)


def write(results: Path, suite: str, command: str, title: str, rows: list[dict], missing: int) -> str:
    """Write SUITE.md and SUITE.png; give the text of the former."""
    finished = [row for row in rows if "failed" not in row]
    first = finished[0]
    machine = f"{platform.machine()} {first['device']}"
    lines = [
        f"# {suite}: {title}\n",
        f"`{command}`\n",
        "Percent, mean ± standard deviation. ACC on the test images, ASR and RA on those of them whose true class is "
        "not the target; ΔACC is ACC after minus before; DER is 50 for no effect. Relearned: ASR after 5 epochs on "
        "2 % clean and 5 triggered images. Reactivated: ASR under a perturbation that was learned to wake the "
        "backdoor; on benign: that of perturbation and trigger on a benign model. CPU s: of a run's process, one "
        "thread. " + ", ".join(f"{name} {version}" for name, version in first["versions"].items()) + f", {machine}.\n",
    ]
    if missing:
        lines.append(f"{missing} of {missing + len(rows)} runs have not been made; their cells are empty.\n")
    for family, group in _grouped(finished, _group).items():
        lines += [f"## {family}\n", *_summary(group), "", *_by_attack(group), *_weak(group)]
    lines += _failed([row for row in rows if "failed" in row])
    lines += _chosen_rates(finished)
    text = "\n".join(lines).rstrip() + "\n"
    (results / f"{suite}.md").write_text(text, encoding="utf-8")
    if any(row["der"] is not None for row in finished):
        _draw(results / f"{suite}.png", finished, title)
    return text


def _group(row: dict) -> str:
    """What one table is about: a kind of model, with what else the suite varies."""
    victim, cell = row["cell"]["victim"], row["cell"]
    varied = [f"{key} {value}" for key, value in victim["options"] if key == "poison_rate" and _is_varied(victim)]
    varied += [f"attacker's {key} {value}" for key, value in victim["options"] if key in ("eta_f", "rho")]
    if cell["clean_samples"] and not victim["published"]:
        varied.append(f"{cell['clean_samples']} clean images")
    name = victim["family"] if not victim["published"] else "benign" if row["der"] is None else "backdoored"
    if victim["attack"] == PUBLISHED_DEVELOPMENT:
        varied.append("a development victim")
    return ", ".join([name, *varied])


def _is_varied(victim: dict) -> bool:
    return victim["attack"] == "badnets"  # whose rate is the default's elsewhere


def _grouped(rows: list[dict], key) -> dict[str, list[dict]]:
    groups = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return dict(groups)


def _method(row: dict) -> str:
    return row["cell"]["method"]["name"]


def _attack(row: dict) -> str:
    return row["cell"]["victim"]["attack"]


def _summary(rows: list[dict]) -> list[str]:
    """One line a method, over all attacks and seeds; the deviation is that of the seeds' means over the attacks."""
    before = _mean_of_seeds(rows)["before"]
    asr = "" if before.get("asr") is None else f", ASR {before['asr']}"
    lines = [f"Before: ACC {before['accuracy']}{asr}.\n"]
    table = {}
    for name, runs in _grouped(rows, _method).items():
        mean = _mean_of_seeds(runs)
        after, relearned, reactivated = mean["after"], mean.get("relearned", {}), mean.get("reactivated", {})
        values = (after["accuracy"], mean["change"], after.get("asr"), after.get("ra"), mean.get("der"))
        values += (relearned.get("asr"), reactivated.get("asr"), reactivated.get("benign_asr"), mean["cpu_seconds"])
        table[name] = [*map(_text, values), f"{runs[0]['trained']:,}", str(len(runs))]
    measured = [place for place in range(len(COLUMNS)) if any(cells[place] for cells in table.values())]
    for name, cells in {"method": COLUMNS, "---": ["---"] * len(COLUMNS), **table}.items():
        lines.append(f"| {name} | {' | '.join(cells[place] for place in measured)} |")
    return lines


def _mean_of_seeds(rows: list[dict]) -> dict:
    """Means over the attacks first, for each seed, then over the seeds."""
    by_seed = _grouped(rows, lambda row: row["cell"]["victim"]["seed"])
    seeds = []
    for runs in by_seed.values():
        runs = [run | {"change": run["after"]["accuracy"] - run["before"]["accuracy"]} for run in runs]
        seeds.append(_plain(over_seeds([{key: run[key] for key in run if key != "cell"} for run in runs])))
    return over_seeds(seeds)


def _plain(value):
    """The means of a report of `Spread`s."""
    return {key: _plain(inner) for key, inner in value.items()} if isinstance(value, dict) else value.mean


def _by_attack(rows: list[dict]) -> list[str]:
    """ACC / ASR of each method on each attack, over the seeds; the victims' first."""
    attacks = list(dict.fromkeys(map(_attack, rows)))
    if len(attacks) == 1:
        return []  # the summary says it
    lines = ["| ACC / ASR | " + " | ".join(attacks) + " |", "|---" * (len(attacks) + 1) + "|"]

    def line(name: str, runs: list[dict], moment: str) -> str:
        cells = []
        for attack in attacks:
            values = [run[moment] for run in runs if _attack(run) == attack]
            mean = over_seeds(values) if values else {}
            cells.append(" / ".join(_text(mean[key]) for key in ("accuracy", "asr") if key in mean))
        return f"| {name} | {' | '.join(cells)} |"

    received = {(_attack(row), row["cell"]["victim"]["seed"]): row for row in rows}
    lines.append(line("received", list(received.values()), "before"))
    lines += [line(name, runs, "after") for name, runs in _grouped(rows, _method).items()]
    return [*lines, ""]


def _weak(rows: list[dict]) -> list[str]:
    """Which attacks some victims had not taken on."""
    weak = sorted({_attack(row) for row in rows if (row["before"]["asr"] or 100) < WEAK_VICTIM})
    named = ", ".join(weak)
    return [f"Some victims had an ASR below {WEAK_VICTIM:.0f} % before purification: {named}.\n"] if weak else []


def _failed(rows: list[dict]) -> list[str]:
    if not rows:
        return []
    counts = _grouped(rows, lambda row: f"{row['cell']['victim']['family']}, {_method(row)}: {row['failed'][:160]}")
    return [
        "Not defined for the model, or diverged:\n",
        *(f"- {len(runs)} × {why}" for why, runs in counts.items()),
        "",
    ]


def _chosen_rates(rows: list[dict]) -> list[str]:
    chosen = [
        f"{row['cell']['victim']['family']} {_attack(row)} {row['cell']['victim']['seed']}: {row['learning_rate']}"
        for row in rows
        if "learning_rate" in row
    ]
    said = "Learning rates chosen on held-out clean images, the smallest of equals; the time leaves the choice out"
    return [f"{said}: {', '.join(chosen)}."] if chosen else []


def _text(value: Spread | None) -> str:
    return "" if value is None else str(value)


def _draw(path: Path, rows: list[dict], title: str) -> None:
    """ACC lost and ASR of each method, the best DER on top, one pair of panels a table.

    A method with fewer runs than others is left out: its mean is over other victims.
    """
    groups = {name: group for name, group in _grouped(rows, _group).items() if group[0]["der"] is not None}
    means = {}
    for name, group in groups.items():
        methods = _grouped(group, _method)
        most = max(map(len, methods.values()))
        complete = {method: _mean_of_seeds(runs) for method, runs in methods.items() if len(runs) == most}
        means[name] = sorted(complete.items(), key=lambda pair: pair[1]["der"].mean)
    longest = max(map(len, means.values()))
    lines = 1 if len(means) <= 2 else 2  # a kind of model each
    abreast = -(-len(means) // lines)
    with figure(path, 5.6 * abreast, 0.4 + lines * (1 + 0.24 * longest), layout="constrained") as drawn:
        drawn.suptitle(textwrap.fill(title, 60 * abreast), fontsize=10)
        axes = drawn.subplots(lines, 2 * abreast, squeeze=False).flat
        for unused in axes[2 * len(means) :]:
            unused.remove()
        axes = axes[: 2 * len(means)]
        for (name, methods), lost, asr in zip(means.items(), axes[::2], axes[1::2], strict=True):
            for place, (method, mean) in enumerate(methods):
                colour = LIGHT.vermillion if "Fast" in method else LIGHT.blue if "FIP" in method else LIGHT.grey
                style = {"fmt": "o", "color": colour, "mfc": "none" if "control" in method else colour, "ms": 5}
                change, success = mean["change"], mean["after"]["asr"]
                lost.errorbar(-change.mean, place, xerr=change.deviation, **style)
                asr.errorbar(success.mean, place, xerr=success.deviation, **style)
            lost.set_yticks(range(len(methods)), [method for method, _ in methods])
            asr.set_yticks(range(len(methods)), [])
            lost.set(title=name, xlabel="ACC lost (points)")
            asr.set(xlabel="ASR (percent)", xlim=(-4, 104))
            for axis in (lost, asr):
                axis.grid(True)
                axis.set_axisbelow(True)
