"""Are backdoored victims sharper than benign models, does purification smooth them, and does that go with a low ASR?

    python benchmarks/curvature.py --name digits
    python benchmarks/curvature.py --name cifar10 --dataset_name path/to/cifar10 --max_train_samples 10000 \\
        --max_test_samples 1000 --num_train_epochs 10 --augment --seeds 1

For each seed a benign model and a victim of each attack, made as in benchmarks/attacks.py and shared with it, and each
victim purified by recipes/purify_cnn.py with its defaults: FIP, fine-tuning (the same with --eta_f 0) and Fast FIP
(--adapter singular). Of each, on clean test images that neither training nor purification has seen:

    λ_max, Tr H     of the Hessian of the mean loss by all weights (adapters merged), BatchNorm on running statistics
    loss rise       of the clean loss at 0.1 of the weights' length in filter-normalised random directions: unlike the
                    Hessian, it does not change when a layer before a BatchNorm is scaled

Nothing is chosen by any of these. What is there is not made again; --purify_again does so for the purified models,
after a change of defaults. Writes results/curvature/NAME.md, NAME.json and the pictures NAME-*.png.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from attacks import settings_of, train
from scipy.stats import spearmanr
from study_suites import fip
from tqdm.auto import tqdm

from hf_fip import FIPConfig, FIPTrainer
from hf_fip.attacks import load_attack, trigger
from hf_fip.curvature import Landscape, loss_landscape, measure_curvature
from hf_fip.curvature.callback import CurvatureCallback
from hf_fip.curvature.plots import plot_curvature, plot_landscape, plot_sharpness, plot_spectral_density
from hf_fip.drawing import DARK, LIGHT
from hf_fip.evaluation.backdoor import BackdoorTest, PurificationCurve
from hf_fip.evaluation.reactivation import PixelRange
from hf_fip.hub.report import versions
from hf_fip.scripts.images import channels_of
from hf_fip.scripts.recorded import recorded_split
from hf_fip.tasks.augmentation import disturb
from hf_fip.tasks.data import DIGITS, load_images, split_clean
from hf_fip.tasks.image_classification import PixelDataset, load_image_classifier, match_labels

ROOT = Path(__file__).resolve().parent.parent
BENIGN = "none"
METHODS = {
    "FIP": [],
    "fine-tuning": ["--eta_f", "0"],
    "Fast FIP": ["--adapter", "singular"],
}
RECEIVED = "received"
DIRECTIONS, STEP = 5, 0.1  # of the loss rise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="of the files under results/curvature/")
    parser.add_argument("--dataset_name", default=DIGITS)
    parser.add_argument("--max_train_samples")
    parser.add_argument("--max_test_samples")
    parser.add_argument("--num_train_epochs", help="of a victim; the recipe's own by default")
    parser.add_argument("--augment", action="store_true", help="augment while training the victim")
    parser.add_argument("--attacks", nargs="+", default=["badnets", "blend", "wanet"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="METHOD")
    parser.add_argument("--seeds", nargs="+", default=["1", "2", "3"])
    parser.add_argument("--images", type=int, default=450, help="clean test images that curvature is measured on")
    parser.add_argument("--probes", type=int, default=20)
    parser.add_argument("--victims", type=Path, default=Path("outputs/attacks"), help="where victims are kept")
    parser.add_argument("--work", type=Path, default=Path("outputs/curvature"), help="where purified models are kept")
    parser.add_argument("--purify_again", action="store_true")
    args = parser.parse_args()
    started = time.perf_counter()

    rows = []
    models = len(args.seeds) * (1 + len(args.attacks) * (1 + len(args.methods)))
    with tqdm(total=models, desc="models") as bar:
        for seed in args.seeds:
            for attack in (BENIGN, *args.attacks):
                victim = folder_of(args, seed, attack)
                for method in [RECEIVED] if attack == BENIGN else [RECEIVED, *args.methods]:
                    bar.set_postfix_str(f"{attack}, {method}")
                    if method == RECEIVED:
                        measured = train(victim, victim_options(args, seed, attack))["victim"]
                    else:
                        measured = purify(args, seed, attack, method)
                    row = {"attack": attack, "seed": seed, "method": method, **measured}
                    rows.append(row | curvature_of(args, folder_of(args, seed, attack, method), victim))
                    bar.update()
    write(args, rows, time.perf_counter() - started)


def folder_of(args: argparse.Namespace, seed: str, attack: str, method: str = RECEIVED) -> Path:
    """Where a model is kept."""
    if method == RECEIVED:
        return args.victims / args.name / f"seed-{seed}" / attack
    return args.work / args.name / f"seed-{seed}" / attack / method.replace(" ", "-")


def data_options(args: argparse.Namespace) -> list[str]:
    """Which images, as a recipe is told."""
    names = ("dataset_name", "max_train_samples", "max_test_samples")
    return [part for name in names if getattr(args, name) for part in (f"--{name}", getattr(args, name))]


def victim_options(args: argparse.Namespace, seed: str, attack: str) -> list[str]:
    """What benchmarks/attacks.py gives recipes/backdoor_image.py."""
    options = ["--architecture", "resnet", *(["--augment"] if args.augment else []), *data_options(args)]
    if args.num_train_epochs:
        options += ["--num_train_epochs", args.num_train_epochs]
    return [*options, "--seed", seed, "--attack", attack, *([] if attack == BENIGN else settings_of(args, attack))]


def purify(args: argparse.Namespace, seed: str, attack: str, method: str) -> dict:
    """ACC and ASR after a purification; it is made only when it is not there yet."""
    victim, folder = folder_of(args, seed, attack), folder_of(args, seed, attack, method)
    if args.purify_again:
        shutil.rmtree(folder, ignore_errors=True)
    report = folder / "report.json"
    if not report.is_file():
        command = [sys.executable, str(ROOT / "recipes" / "purify_cnn.py"), "--output_dir", str(folder)]
        command += ["--model_name_or_path", str(victim), "--seed", seed, *data_options(args), *METHODS[method]]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return json.loads(report.read_text())["after"]


# Measurements


def images_for(args: argparse.Namespace, victim: Path, model):
    """The images, split as they were when the victim was trained."""
    images = load_images(
        args.dataset_name,
        max_train_samples=args.max_train_samples and int(args.max_train_samples),
        max_test_samples=args.max_test_samples and int(args.max_test_samples),
        seed=recorded_split(str(victim))["seed"],
    )
    return match_labels(images, model)


def batch_of(dataset, model, processor, labels=None) -> list[dict]:
    inputs = PixelDataset(dataset, processor, channels_of(model))
    pixels = torch.stack([item["pixel_values"] for item in inputs])
    return [{"pixel_values": pixels, "labels": torch.as_tensor(inputs.labels if labels is None else labels)}]


def curvature_of(args: argparse.Namespace, folder: Path, victim: Path) -> dict:
    """The curvature of one model."""
    model, processor = load_image_classifier(str(folder))
    model.requires_grad_(True)  # a merged adapter comes frozen
    images = images_for(args, victim, model)
    batches = batch_of(images.test.select(range(min(args.images, len(images.test)))), model, processor)
    found = measure_curvature(model, batches, probes=args.probes).to_dict()
    rises = [
        loss_landscape(model, {"clean": batches}, span=STEP, points=2, seed=seed).losses["clean"].mean()
        for seed in range(DIRECTIONS)
    ]
    found["loss_rise"] = float(np.mean(rises) - found["loss"])
    return found


# What comes out


def mean_and_error(values) -> str:
    """Mean ± standard error."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return f"{values.mean():.3g}"
    return f"{values.mean():.3g} ± {values.std(ddof=1) / len(values) ** 0.5:.2g}"


def ratio(pairs: list[tuple[dict, dict]], key: str) -> str:
    """The geometric mean over pairs of models of the first's figure by the second's, ×/÷ its standard error."""
    logs = [np.log(one[key] / other[key]) for one, other in pairs if one[key] > 0 and other[key] > 0]
    if not logs:
        return "–"
    error = f" ×/÷ {np.exp(np.std(logs, ddof=1) / len(logs) ** 0.5):.2f}" if len(logs) > 1 else ""
    return f"{np.exp(np.mean(logs)):.2f}{error} (above 1 in {sum(log > 0 for log in logs)} of {len(logs)})"


def select(rows: list[dict], **wanted) -> list[dict]:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def correlation(rows: list[dict], key: str) -> str:
    """Spearman's ρ of the curvature and ASR."""
    if len(rows) < 4 or len({row["asr"] for row in rows}) < 2:
        return "–"
    found = spearmanr([row[key] for row in rows], [row["asr"] for row in rows])
    return f"{found.statistic:+.2f} (p = {found.pvalue:.2g}, n = {len(rows)})"


def write(args: argparse.Namespace, rows: list[dict], seconds: float) -> None:
    place = ROOT / "results" / "curvature" / args.name
    place.parent.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "benchmarks/curvature.py", *sys.argv[1:]])
    record = {"command": command, "seconds": seconds, "versions": versions(), "models": rows}
    place.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    keys = {"lambda_max": "λ_max", "trace": "Tr H", "loss_rise": "loss rise"}
    lines = [
        f"# Curvature before and after purification: {args.name}\n",
        f"`{command}`\n",
        f"Small ResNet ({rows[0]['parameters']:,} weights). λ_max, Tr H, loss rise on {rows[0]['samples']} clean "
        "test images that neither training nor purification has seen; Hessian of the mean loss, eval mode. ACC and "
        f"ASR in percent. Mean ± standard error over seeds {', '.join(args.seeds)}. hf_fip {versions()['hf_fip']}, "
        f"torch {versions()['torch']}, {platform.machine()} CPU; {seconds / 60:.0f} minutes, with what was already "
        "there.\n",
        "| model | method | ACC | ASR | λ_max | Tr H | loss rise | clean loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for attack in (BENIGN, *args.attacks):
        for method in dict.fromkeys(row["method"] for row in select(rows, attack=attack)):
            own = select(rows, attack=attack, method=method)
            asr = "–" if attack == BENIGN else mean_and_error([row["asr"] for row in own])
            cells = [mean_and_error([row[key] for row in own]) for key in (*keys, "loss")]
            name = "benign" if attack == BENIGN else attack
            acc = mean_and_error([row["accuracy"] for row in own])
            lines.append(f"| {name} | {method} | {acc} | {asr} | {' | '.join(cells)} |")
    attacked = [row for row in rows if row["attack"] != BENIGN]
    received = select(attacked, method=RECEIVED)
    benign = {row["seed"]: row for row in select(rows, attack=BENIGN)}
    before = {(row["attack"], row["seed"]): row for row in received}
    lines += ["\n## Are backdoored victims sharper than benign ones?\n"]
    lines += ["Victim ÷ benign model of the same seed, geometric mean ×/÷ its standard error.\n"]
    lines += [f"| victim | {' | '.join(keys.values())} |", "|---|---|---|---|"]
    groups = {attack: select(received, attack=attack) for attack in args.attacks} | {"all": received}
    for attack, own in groups.items():
        cells = [ratio([(row, benign[row["seed"]]) for row in own], key) for key in keys]
        lines.append(f"| {attack} | {' | '.join(cells)} |")
    lines += ["\n## Does purification make them smoother?\n"]
    lines += ["Purified ÷ received model, over all victims; then purified ÷ benign model of the same seed.\n"]
    lines += [f"| method | to the | {' | '.join(keys.values())} |", "|---|---|---|---|---|"]
    for method in args.methods:
        own = select(attacked, method=method)
        for name, base in (
            ("received", [(row, before[row["attack"], row["seed"]]) for row in own]),
            ("benign", [(row, benign[row["seed"]]) for row in own]),
        ):
            lines.append(f"| {method} | {name} | {' | '.join(ratio(base, key) for key in keys)} |")
    lines += ["\n## Does smoothness go with a low ASR?\n"]
    lines += [
        "Spearman's rank correlation with ASR; positive: the smoother the model, the lower its ASR. Models of one "
    ]
    lines[-1] += "victim are not independent, so p is too small where received models are among them.\n"
    lines += [f"| models | {' | '.join(keys.values())} |", "|---|---|---|---|"]
    groups = {"all, received and purified": attacked}
    groups["all purified"] = [row for row in attacked if row["method"] != RECEIVED]
    groups |= {f"purified by {method}": select(attacked, method=method) for method in args.methods}
    for name, own in groups.items():
        lines.append(f"| {name} | {' | '.join(correlation(own, key) for key in keys)} |")
    lines += ["", *(f"![{what}]({args.name}-{what}.png)" for what in draw(args, attacked, place))]
    place.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def draw(args: argparse.Namespace, rows: list[dict], place: Path) -> list[str]:
    """The pictures: of all models, and in more detail of the first attack and seed."""
    attack, seed = args.attacks[0], args.seeds[0]
    victim = folder_of(args, seed, attack)
    folders = {method: folder_of(args, seed, attack, method) for method in (RECEIVED, *args.methods[:2])}
    densities, lines, planes = {}, {}, {}
    for name, folder in folders.items():
        model, processor = load_image_classifier(str(folder))
        model.requires_grad_(True)
        densities[name], lines[name], planes[name] = portrait(args, model, processor, victim)
    history = course(args, victim, seed)
    pictures = {
        "sharpness": lambda path, theme: plot_sharpness(rows, path, f"Sharpness and ASR: {args.name}", theme),
        "density": lambda path, theme: plot_spectral_density(densities, path, f"{args.name}, {attack}", theme),
        "landscape": lambda path, theme: plot_landscape(lines, path, f"{args.name}, {attack}", theme),
        "plane": lambda path, theme: plot_landscape(planes, path, f"{args.name}, {attack}", theme),
        "course": lambda path, theme: plot_curvature(history, path, f"FIP: {args.name}, {attack}", theme),
    }
    for what, picture in pictures.items():
        for suffix, theme in (("", LIGHT), ("-dark", DARK)):
            picture(place.with_name(f"{place.name}-{what}{suffix}.png"), theme)
    return list(pictures)


def portrait(args: argparse.Namespace, model, processor, victim: Path) -> tuple:
    """Spectral density, line and plane of one model."""
    images, attack = images_for(args, victim, model), load_attack(victim)
    clean = images.test.select(range(min(args.images, len(images.test))))
    triggered = trigger(clean, attack)
    wanted = attack.attack_label(np.asarray(triggered["label"][:]), len(images.class_names))
    batches = {"clean": batch_of(clean, model, processor), "triggered": batch_of(triggered, model, processor, wanted)}
    density = measure_curvature(model, batches["clean"], probes=1, density_runs=2).density
    line: Landscape = loss_landscape(model, batches)
    return density, line, loss_landscape(model, batches, dimensions=2, points=9)


def course(args: argparse.Namespace, victim: Path, seed: str) -> list[dict]:
    """λ_max, Tr H, ACC and ASR along FIP, with the settings of recipes/purify_cnn.py."""
    model, processor = load_image_classifier(str(victim))
    images, attack, split = images_for(args, victim, model), load_attack(victim), recorded_split(str(victim))
    test = images.test.select(range(min(args.images, len(images.test))))
    triggered = trigger(test, attack)
    clean, answered = (PixelDataset(data, processor, channels_of(model)) for data in (test, triggered))
    labels = attack.attack_label(answered.labels, len(images.class_names))
    curve = PurificationCurve(BackdoorTest(clean, answered, labels), points=10)
    callback = CurvatureCallback(batch_of(test, model, processor), every=40, probes=5)
    defended = split_clean(images.train, split["samples"], split["seed"])[0]
    with tempfile.TemporaryDirectory() as folder:
        options = {"seed": int(seed), "save_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False}
        data = PixelDataset(defended, processor, channels_of(model))
        trainer = FIPTrainer(
            model,
            FIPConfig(folder, **options, **fip("resnet")),
            train_dataset=data,
            train_transform=disturb(PixelRange.of(processor, *data[0]["pixel_values"].shape[1:], channels_of(model))),
            callbacks=[curve, callback],
        )
        curve.trainer = trainer
        trainer.train()
    return trainer.state.log_history


if __name__ == "__main__":
    main()
