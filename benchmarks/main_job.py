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
import shlex
from pathlib import Path

from recipe_runs import COST, METHODS, UNDISTURBED, figures, folder_of, run, write

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
# name: what it is called in the table
NAMES = {
    "fip": "FIP",
    "control": "fine-tuning, same settings",
    "own_rate": "fine-tuning, own learning rate",
    "undisturbed": "fine-tuning, undisturbed",
    "fast": "Fast FIP",
    "fast_control": "Fast FIP, control",
}
OPTIONS = METHODS | UNDISTURBED | {NAMES["own_rate"]: ["--eta_f", "0"]}
LEARNING_RATES = ("0.01", "0.05", "0.2")  # the default and a factor of four or five to either side


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
        "--methods", nargs="+", default=["fip", "control", "own_rate", "fast", "fast_control"], choices=NAMES
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
                method = NAMES[name]
                options = OPTIONS[method]
                options = [*options, "--learning_rate", rate] if name == "own_rate" else options
                report = run(script, folder / folder_of(method), *given, *options)
                rows.append(report | {"case": case, "seed": int(seed), "method": method, "learning_rate": rate})
    first, said = rows[0]["data"], ""
    if "own_rate" in args.methods:
        chosen = {f"{row['case']} {row['seed']}": row["learning_rate"] for row in rows}
        rates = ", ".join(f"{victim}: {rate}" for victim, rate in chosen.items())
        said = f"\nOwn learning rates, chosen on held-out clean images from {', '.join(LEARNING_RATES)}: {rates}.\n"
    write(
        args.name,
        f"{args.name}: FIP beside plain fine-tuning",
        f"ACC on {first['test_samples']} test samples, ASR and RA on those of them that the attack is for (as a rule, "
        f"whose true class is not the target). {first['clean_samples']} clean samples.",
        rows,
        {
            **figures("accuracy", "asr"),
            "RA after": lambda mean: mean["after"]["ra"],
            "DER": lambda mean: mean["der"],
            **COST,
        },
        after=said,
        plots=args.work / args.name if args.keep_plots else None,
    )


if __name__ == "__main__":
    main()
