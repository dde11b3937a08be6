"""Purify detectors and multi-label classifiers, beside plain fine-tuning, over several seeds.

    python benchmarks/detection.py --bccd path/to/bccd

Cases are data:attack, with `labels:` before it for multi-label; `scenes` are the recipe's generated ones. For each
case and seed a victim, made by recipes/backdoor_detection.py and kept; then, with the clean images it never saw,

    FIP                recipes/purify_detection.py as it is
    fine-tuning        the same with --eta_f 0: same optimiser, steps, data and disturbances
    Fast FIP           the same with --adapter singular
    Fast FIP, control  that with --eta_f 0

Nothing is chosen by ASR or on test images. A run whose report.json is there is not repeated. Writes
results/detection/table.md, runs.json, and the pictures of the first seed.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

from main_job import RESULTS, run

from hf_fip.evaluation import over_seeds

# Cells: 164 images to train on, of which the defender has 50. The victim mirrors them, and sees them half as large.
BCCD = {
    "data": ["--test_split", "test", "--clean_samples", "50", "--augment"],
    "victim": ["--largest_side", "128", "--num_train_epochs", "70", "--target_label", "1", "--poison_rate", "0.2"],
}
DATA = {"scenes": {"data": [], "victim": []}, "bccd": BCCD}
METHODS = {
    "FIP": [],
    "fine-tuning, same settings": ["--eta_f", "0"],
    "Fast FIP": ["--adapter", "singular"],
    "Fast FIP, control": ["--adapter", "singular", "--eta_f", "0"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bccd", default="bccd", help="folder of the blood cells, parquet files")
    cases = ["scenes:object_patch", "bccd:object_patch", "labels:scenes:clean_image"]
    parser.add_argument("--cases", nargs="+", default=cases)
    parser.add_argument("--seeds", nargs="+", default=["1", "2", "3"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--work", type=Path, default=Path("outputs/detection"), help="where victims and runs are kept")
    args = parser.parse_args()
    rows = []
    for case in args.cases:
        *kind, name, attack = case.split(":")
        answers = ["--answers", "labels"] if kind else []
        data = [*answers, "--dataset_name", args.bccd if name == "bccd" else name, *DATA[name]["data"]]
        for seed in args.seeds:
            folder = args.work / f"{case.replace(':', '-')}-{seed}"
            victim = folder / "victim"
            made = ["--attack", attack, *DATA[name]["victim"]]
            run("backdoor_detection.py", victim, *data, *made, "--seed", seed)
            for method in args.methods:
                given = ["--model_name_or_path", str(victim), *data, "--seed", seed, *METHODS[method]]
                report = run("purify_detection.py", folder / method.replace(", ", "-").replace(" ", "-"), *given)
                rows.append(report | {"case": case, "seed": int(seed), "method": method})
    write(args, rows)


def write(args: argparse.Namespace, rows: list[dict]) -> None:
    folder = RESULTS / "detection"
    folder.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "benchmarks/detection.py", *sys.argv[1:]])
    keys = ("case", "seed", "method", "before", "after", "der", "cost", "arguments", "data", "versions")
    kept = [{key: row[key] for key in keys} for row in rows]
    (folder / "runs.json").write_text(json.dumps({"command": command, "runs": kept}, indent=1) + "\n")
    first = rows[0]
    lines = [
        "# Object detection and multi-label recognition: FIP beside plain fine-tuning\n",
        f"`{command}`\n",
        f"Percent, mean ± standard deviation over seeds {', '.join(args.seeds)}. mAP of detection is COCO's, IoU 0.50 "
        f"to 0.95, by faster-coco-eval {version('faster-coco-eval')}, of all clean test images; ASR is over the "
        "objects under attack in the triggered test images, each taken for the class of its surest detection (score "
        "0.3 and IoU 0.5 or more). "
        "Multi-label (`labels`): the mean of the average precisions, and the triggered images that the attack is for. "
        f"hf_fip {first['versions']['hf_fip']}, torch {first['versions']['torch']}, transformers "
        f"{first['versions']['transformers']}, {platform.machine()} CPU.\n",
        "| victim | clean images | method | mAP before | mAP after | ASR before | ASR after | seconds | trained |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in args.cases:
        for method in args.methods:
            runs = [row for row in rows if row["case"] == case and row["method"] == method]
            mean = over_seeds(runs)
            before, after, cost = mean["before"], mean["after"], runs[0]["cost"]
            lines.append(
                f"| {case.replace(':', ', ')} | {runs[0]['data']['clean_samples']} | {method} | {before['map']} | "
                f"{after['map']} | {before['asr']} | {after['asr']} | {mean['cost']['seconds']} | "
                f"{cost['trainable_parameters']:,} |"
            )
        name = case.replace(":", "-")
        for plot in (args.work / f"{name}-{args.seeds[0]}" / "FIP" / "plots").glob("*.png"):
            shutil.copy(plot, folder / f"{name}-{plot.name}")
    (folder / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
