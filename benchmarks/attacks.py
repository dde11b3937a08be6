"""Train a victim of each of the fourteen attacks, and a benign model beside them: ACC, ASR, RA and a contact sheet.

    python benchmarks/attacks.py --name digits
    python benchmarks/attacks.py --name cifar10 --dataset_name path/to/cifar10 --max_train_samples 10000 \\
        --max_test_samples 1000 --num_train_epochs 10 --augment --seeds 1

Each victim is made by recipes/backdoor_image.py and kept under outputs/; the benign model is the clean model that some
attacks learn on. Attacks have their defaults but for FOR_DIGITS and FOR_OTHERS. A victim whose report.json is there is
not trained again. Writes results/attacks/NAME.md, NAME.json and NAME.png (for each attack a test image: clean,
triggered, difference, answers).
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from hf_fip.attacks import attack_class, load_attack, trigger
from hf_fip.attacks.pixels import fitted
from hf_fip.attacks.poison import to_array
from hf_fip.evaluation import over_seeds
from hf_fip.plots import plot_attacks
from hf_fip.scripts.images import channels_of
from hf_fip.scripts.recorded import recorded_split
from hf_fip.tasks.data import DIGITS, load_images
from hf_fip.tasks.image_classification import PixelDataset, load_image_classifier, match_labels

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "backdoor_image.py"
RESULTS = Path(__file__).resolve().parent.parent / "results" / "attacks"
FOURTEEN = ("badnets", "blend", "troj_one", "troj_all", "sig", "dyn_one", "dyn_all", "clb", "cba", "fba", "wanet")
FOURTEEN += ("issba", "lira", "bppa")
# What 8×8 pixels of gray need otherwise than the attacks' defaults, which are for photographs. Found on victims of
# another seed, by their ASR: an attacker may.
FOR_DIGITS = {
    "sig": "--attack_options delta=200,frequency=3",
    "clb": "--attack_options epsilon=48",
    "troj_one": "--attack_options patch_size=4",
    "troj_all": "--attack_options patch_size=4 --poison_rate 0.4 --num_train_epochs 60",
    "dyn_one": "--attack_options mask_weight=0.5,learning_rate=0.003 --num_train_epochs 100 --learning_rate 0.005",
    "dyn_all": "--attack_options mask_weight=0.5,learning_rate=0.003 --num_train_epochs 100 --learning_rate 0.005 "
    "--poison_rate 0.3",
    "wanet": "--attack_options strength=2.0,cover_rate=0.0 --poison_rate 0.2",
    "lira": "--attack_options epsilon=0.05,learning_rate=0.001",
    "bppa": "--attack_options bits=1 --poison_rate 0.2",
    "cba": "--attack_options shake=false,jitter=0,first_class=4,second_class=6,cover_rate=0.3 --poison_rate 0.2 "
    "--learning_rate 0.005",
}
# The default epochs, 25 and 20, take a quarter of an hour of a CPU for 8,000 images of 32×32 pixels.
FOR_OTHERS = {"dyn_all": "--attack_options mask_epochs=5", "issba": "--attack_options epochs=5"}
LOOKED_AT = 50  # test images that the one on the contact sheet is chosen from


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="of the files under results/attacks/")
    parser.add_argument("--dataset_name", default=DIGITS)
    parser.add_argument("--max_train_samples")
    parser.add_argument("--max_test_samples")
    parser.add_argument("--num_train_epochs")
    parser.add_argument("--architecture", default="resnet", choices=("resnet", "vit"))
    parser.add_argument("--augment", action="store_true")
    parser.add_argument("--attacks", nargs="+", default=FOURTEEN, choices=FOURTEEN, metavar="NAME")
    parser.add_argument("--seeds", nargs="+", default=["1", "2", "3"])
    parser.add_argument("--work", type=Path, default=Path("outputs/attacks"), help="where victims are kept")
    args = parser.parse_args()

    options = ["--architecture", args.architecture, *(["--augment"] if args.augment else [])]
    for name in ("dataset_name", "max_train_samples", "max_test_samples", "num_train_epochs"):
        if getattr(args, name):
            options += [f"--{name}", getattr(args, name)]
    rows = []
    with tqdm(total=len(args.seeds) * (1 + len(args.attacks)), desc="victims") as bar:
        for seed in args.seeds:
            folder = args.work / args.name / f"seed-{seed}"
            benign = train(folder / "none", [*options, "--seed", seed, "--attack", "none"])
            bar.update()
            for name in args.attacks:
                bar.set_postfix_str(name)
                attack = ["--attack", name, "--clean_model", str(folder / "none"), *settings_of(args, name)]
                report = train(folder / name, [*options, "--seed", seed, *attack])
                row = {"attack": name, "settings": shlex.join(settings_of(args, name)), "seed": seed}
                rows.append({**row, "benign_accuracy": benign["victim"]["accuracy"], **report})
                bar.update()
    write(args, rows)


def settings_of(args: argparse.Namespace, name: str) -> list[str]:
    """What an attack is given beside the arguments that all have."""
    settings = FOR_DIGITS if args.dataset_name == DIGITS else FOR_OTHERS
    return shlex.split(settings.get(name, ""))


def train(folder: Path, arguments: list[str]) -> dict:
    """A victim's report; it is trained only when it is not there yet."""
    report = folder / "report.json"
    if not report.is_file():
        command = [sys.executable, str(RECIPE), "--output_dir", str(folder), *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return json.loads(report.read_text())


def example(args: argparse.Namespace, name: str) -> dict:
    """A row of the contact sheet: a test image that the first seed's victim knows, and its answers."""
    folder = args.work / args.name / f"seed-{args.seeds[0]}" / name
    model, processor = load_image_classifier(str(folder))
    images = load_images(
        args.dataset_name,
        max_train_samples=args.max_train_samples and int(args.max_train_samples),
        max_test_samples=args.max_test_samples and int(args.max_test_samples),
        seed=recorded_split(str(folder))["seed"],
    )
    images = match_labels(images, model)
    names, attack = images.class_names, load_attack(folder)
    counting = np.flatnonzero(attack.eligible(np.asarray(images.test["label"][:]), len(names)))[:LOOKED_AT]
    clean = images.test.select(counting)
    triggered = trigger(clean, attack)
    answers = [answers_of(model, PixelDataset(data, processor, channels_of(model))) for data in (clean, triggered)]
    row = int(np.argmax(answers[0] == np.asarray(clean["label"][:])))  # the first that is answered rightly
    attacked = to_array(triggered[row]["image"])
    return {
        "name": name,
        "label": names[clean[row]["label"]],
        "target": names[int(attack.attack_label([clean[row]["label"]], len(names))[0])],
        "clean": fitted(to_array(clean[row]["image"]), *attacked.shape),
        "triggered": attacked,
        "answer": {kind: names[given[row]] for kind, given in zip(("clean", "triggered"), answers, strict=True)},
    }


@torch.no_grad()
def answers_of(model: torch.nn.Module, data: PixelDataset) -> np.ndarray:
    pixels = torch.stack([item["pixel_values"] for item in data])
    return model.eval()(pixel_values=pixels).logits.argmax(-1).numpy()


def rate_of(row: dict) -> float:
    return row["arguments"].get("poison_rate") or attack_class(row["attack"]).default_rate


def write(args: argparse.Namespace, rows: list[dict]) -> None:
    place = RESULTS / args.name
    place.parent.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "benchmarks/attacks.py", *sys.argv[1:]])
    keys = ("attack", "settings", "seed", "benign_accuracy", "victim", "data", "cost", "arguments", "versions")
    runs = [{key: row[key] for key in keys} for row in rows]
    place.with_suffix(".json").write_text(json.dumps({"command": command, "runs": runs}, indent=1) + "\n")
    plot_attacks([example(args, name) for name in args.attacks], place.with_suffix(".png"), f"Attacks on {args.name}")

    first = rows[0]
    lines = [
        f"# Victims of the fourteen attacks: {args.name}\n",
        f"`{command}`\n",
        f"Small {args.architecture}, {first['data']['training_samples']} training images (before an attack adds its "
        f"own), {first['data']['test_samples']} test images. Percent, mean ± standard deviation over seeds "
        f"{', '.join(args.seeds)}; ACC on all test images, ASR and RA on the triggered ones whose true class is not "
        f"the target (for cba: of its first class). hf_fip {first['versions']['hf_fip']}, torch "
        f"{first['versions']['torch']}, transformers {first['versions']['transformers']}, {platform.machine()} CPU.\n",
        "| attack | labels | rate | ACC | ACC of the benign model | ASR | RA | seconds of training | settings |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in args.attacks:
        runs = [row for row in rows if row["attack"] == name]
        cls, mean, settings = attack_class(name), over_seeds(runs), runs[0]["settings"]
        victim, labels = mean["victim"], "kept" if cls.clean_label else cls.label_rule.replace("_", "-")
        lines.append(
            f"| {name} | {labels} | {rate_of(runs[0]):g} | {victim['accuracy']} | "
            f"{mean['benign_accuracy']} | {victim['asr']} | {victim['ra']} | {mean['cost']['seconds']} | "
            f"{settings and f'`{settings}`'} |"
        )
    lines.append(f"\n![one image for each attack]({args.name}.png)")
    place.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
