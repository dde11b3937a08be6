"""Purify victims with the recipes' defaults, beside two plain fine-tuning controls, over several seeds.

    python benchmarks/main_job.py --name digits
    python benchmarks/main_job.py --name point_cloud --dataset_name path/to/psb_pointcloud --cases \\
        pointnet:pointba_i pointnet:pcba --data_options "--num_points 256" --attack_options pcba:source_label=2
    python benchmarks/main_job.py --name cifar10_resnet --dataset_name path/to/cifar10 --max_train_samples 10000 \\
        --max_test_samples 2000 --clean_samples 1000 --augment --victim_epochs 15 --cases resnet:blend
    python benchmarks/main_job.py --name video --dataset_name motions --methods fip control undisturbed fast \\
        --cases cnn_lstm:frame_badnets cnn_lstm:frame_blend cnn_lstm:universal_trigger

For each case (architecture:attack) and seed: a victim, made by recipes/backdoor_*.py and kept; then those of

    fip            recipes/purify_*.py as they are
    control        the same with --eta_f 0: plain fine-tuning, same optimiser, steps and data
    own_rate       plain fine-tuning at the learning rate that does best on a fifth of the clean split, held out
    undisturbed    the control on clean samples as they are, where the recipe disturbs them
    fast           FIP with --adapter singular: Fast FIP
    fast_control   that with --eta_f 0: plain fine-tuning of the same shifts and norm layers

Nothing is chosen by ASR or on test images. A run whose report.json is there is not repeated. Writes
results/NAME/table.md and results/NAME/runs.json; with --keep_plots also the pictures of the first seed.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from hf_fip.evaluation import over_seeds

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
RESULTS = Path(__file__).resolve().parent.parent / "results"
PURIFY = {
    "vit": "purify_vit.py",
    "resnet": "purify_cnn.py",
    "pointnet": "purify_pointcloud.py",
    "pointnet2": "purify_pointcloud.py",
}
VIDEO = ("cnn_lstm", "videomae", "timesformer", "vivit")
PURIFY |= dict.fromkeys(VIDEO, "purify_video.py")
BACKDOOR = {"pointnet": "backdoor_pointcloud.py", "pointnet2": "backdoor_pointcloud.py"}  # else of images
BACKDOOR |= dict.fromkeys(VIDEO, "backdoor_video.py")
# name: what it is called in the table, and its arguments beside those of the recipe
METHODS = {
    "fip": ("FIP", []),
    "control": ("fine-tuning, same settings", ["--eta_f", "0"]),
    "own_rate": ("fine-tuning, own learning rate", ["--eta_f", "0"]),
    "undisturbed": ("fine-tuning, undisturbed", ["--eta_f", "0", "--disturb", "false"]),
    "fast": ("Fast FIP", ["--adapter", "singular"]),
    "fast_control": ("Fast FIP, control", ["--adapter", "singular", "--eta_f", "0"]),
}
LEARNING_RATES = ("0.01", "0.05", "0.2")  # the default and a factor of four or five to either side


def run(script: str, output: Path, *arguments: str) -> dict:
    """A recipe's report; the recipe runs only when the report is not there yet."""
    report = output / "report.json"
    if not report.is_file():
        command = [sys.executable, str(RECIPES / script), "--output_dir", str(output), *arguments]
        print("$", shlex.join(command[1:]), file=sys.stderr, flush=True)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return json.loads(report.read_text())


def best_learning_rate(script: str, folder: Path, victim: Path, data: list[str], split: dict, steps: list[str]) -> str:
    """The learning rate of plain fine-tuning that gives the best accuracy on held-out clean images."""
    held_out = split["samples"] // 5
    scores = {}
    for rate in LEARNING_RATES:
        report = run(
            script,
            folder / f"choose-{rate}",
            *("--model_name_or_path", str(victim), "--eta_f", "0", "--learning_rate", rate),
            *("--held_out_clean_samples", str(held_out), *data, *steps),
        )
        scores[rate] = report["validation_accuracy"]
    return max(scores, key=scores.get)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="name of the folder under results/")
    parser.add_argument("--dataset_name", default="digits")
    parser.add_argument("--max_train_samples")
    parser.add_argument("--max_test_samples")
    parser.add_argument("--clean_samples")
    parser.add_argument("--data_options", default="", help="more arguments of all recipes, as one string")
    parser.add_argument("--attack_options", nargs="*", default=[], help="attack:options, for --attack_options")
    parser.add_argument("--augment", action="store_true", help="augment while training the victim")
    parser.add_argument("--victim_epochs")
    parser.add_argument("--max_steps", help="of purification and controls; the recipe's own by default")
    parser.add_argument("--cases", nargs="+", default=["vit:badnets", "resnet:badnets"])
    parser.add_argument(
        "--methods", nargs="+", default=["fip", "control", "own_rate", "fast", "fast_control"], choices=METHODS
    )
    parser.add_argument("--seeds", nargs="+", default=["1", "2", "3"])
    parser.add_argument("--work", type=Path, default=Path("outputs/main_job"), help="where victims and runs are kept")
    parser.add_argument("--keep_plots", action="store_true")
    args = parser.parse_args()

    data = ["--dataset_name", args.dataset_name, *shlex.split(args.data_options)]
    for name in ("max_train_samples", "max_test_samples"):
        if getattr(args, name):
            data += [f"--{name}", getattr(args, name)]
    clean = ["--clean_samples", args.clean_samples] if args.clean_samples else []
    steps = ["--max_steps", args.max_steps] if args.max_steps else []
    victim_options = [*data, *clean, *(["--augment"] if args.augment else [])]
    victim_options += ["--num_train_epochs", args.victim_epochs] if args.victim_epochs else []

    of_attack = {
        name: ["--attack_options", options]
        for name, _, options in (given.partition(":") for given in args.attack_options)
    }
    rows = []
    for case in args.cases:
        architecture, attack = case.split(":")
        script = PURIFY[architecture]
        for seed in args.seeds:
            folder = args.work / args.name / f"{architecture}-{attack}-{seed}"
            victim = folder / "victim"
            made = run(
                BACKDOOR.get(architecture, "backdoor_image.py"),
                victim,
                *("--architecture", architecture, "--attack", attack, "--seed", seed, *victim_options),
                *of_attack.get(attack, []),
            )
            given = ["--model_name_or_path", str(victim), *data, *steps, "--seed", seed]
            rate = None
            if "own_rate" in args.methods:
                rate = best_learning_rate(script, folder, victim, data, made["clean_split"], [*steps, "--seed", seed])
            for name in args.methods:
                method, options = METHODS[name]
                options = [*options, "--learning_rate", rate] if name == "own_rate" else options
                report = run(script, folder / method.replace(", ", "-").replace(" ", "-"), *given, *options)
                rows.append(report | {"case": case, "seed": int(seed), "method": method, "learning_rate": rate})
    write(args, rows)


def write(args: argparse.Namespace, rows: list[dict]) -> None:
    folder = RESULTS / args.name
    folder.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "benchmarks/main_job.py", *sys.argv[1:]])
    keys = ("case", "seed", "method", "before", "after", "der", "cost", "arguments", "data", "versions")
    (folder / "runs.json").write_text(
        json.dumps({"command": command, "runs": [{key: row[key] for key in keys} for row in rows]}, indent=1) + "\n"
    )
    first = rows[0]
    lines = [
        f"# {args.name}: FIP beside plain fine-tuning\n",
        f"`{command}`\n",
        f"Percent, mean ± standard deviation over seeds {', '.join(args.seeds)}; "
        f"ACC on {first['data']['test_samples']} test samples, ASR and RA on those of them that the attack is for (as "
        f"a rule, whose true class is not the target). {first['data']['clean_samples']} clean samples. "
        f"hf_fip {first['versions']['hf_fip']}, torch {first['versions']['torch']}, "
        f"transformers {first['versions']['transformers']}, {platform.machine()} CPU.\n",
        "| victim | method | ACC before | ACC after | ASR before | ASR after | RA after | DER | seconds | trained |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in args.cases:
        for method in dict.fromkeys(row["method"] for row in rows):
            runs = [row for row in rows if row["case"] == case and row["method"] == method]
            mean = over_seeds(runs)
            before, after = mean["before"], mean["after"]
            lines.append(
                f"| {case.replace(':', ', ')} | {method} | {before['accuracy']} | {after['accuracy']} | "
                f"{before['asr']} | {after['asr']} | {after['ra']} | {mean['der']} | {mean['cost']['seconds']} | "
                f"{runs[0]['cost']['trainable_parameters']:,} |"
            )
    rates = {f"{row['case']} {row['seed']}": row["learning_rate"] for row in rows}
    if "own_rate" in args.methods:
        chosen = ", ".join(f"{victim}: {rate}" for victim, rate in rates.items())
        lines.append(
            f"\nOwn learning rates, chosen on held-out clean images from {', '.join(LEARNING_RATES)}: {chosen}."
        )
    (folder / "table.md").write_text("\n".join(lines) + "\n")
    if args.keep_plots:
        for case in args.cases:
            name = case.replace(":", "-")
            plots = args.work / args.name / f"{name}-{args.seeds[0]}" / "FIP" / "plots"
            for plot in plots.glob("*.png"):
                shutil.copy(plot, folder / f"{name}-{plot.name}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
