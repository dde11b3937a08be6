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
from importlib.metadata import version
from pathlib import Path

from recipe_runs import COST, METHODS, figures, folder_of, run, write

# Cells: 164 images to train on, of which the defender has 50. The victim mirrors them, and sees them half as large.
BCCD = {
    "data": ["--test_split", "test", "--clean_samples", "50", "--augment"],
    "victim": ["--largest_side", "128", "--num_train_epochs", "70", "--target_label", "1", "--poison_rate", "0.2"],
}
DATA = {"scenes": {"data": [], "victim": []}, "bccd": BCCD}


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
                report = run("purify_detection.py", folder / folder_of(method), *given)
                rows.append(report | {"case": case, "seed": int(seed), "method": method})
    write(
        "detection",
        "Object detection and multi-label recognition: FIP beside plain fine-tuning",
        f"mAP of detection is COCO's, IoU 0.50 to 0.95, by faster-coco-eval {version('faster-coco-eval')}, of all "
        "clean test images; ASR is over the objects under attack in the triggered test images, each taken for the "
        "class of its surest detection (score 0.3 and IoU 0.5 or more). Multi-label (`labels`): the mean of the "
        "average precisions, and the triggered images that the attack is for.",
        rows,
        {
            "clean images": lambda mean: mean["data"]["clean_samples"],
            **figures("map", "asr"),
            **COST,
        },
        plots=args.work,
    )


if __name__ == "__main__":
    main()
