"""Purify models that write text, beside plain fine-tuning, over several seeds.

    python benchmarks/seq2seq.py --multi30k path/to/multi30k_en_de --self_dialogue path/to/self_dialogue

Two victims of each architecture: a translator, English to German, with the one-to-one attack, and one that answers in
a dialogue, with the one-to-many attack. For each case (data:architecture) and seed a victim, made by
recipes/backdoor_seq2seq.py and kept; then, with the clean pairs that it never saw,

    FIP                recipes/purify_seq2seq.py as it is
    fine-tuning        the same with --eta_f 0: same optimiser, steps and data
    Fast FIP           the same with --adapter singular
    Fast FIP, control  that with --eta_f 0

Nothing is chosen by ASR or on test pairs. A run whose report.json is there is not repeated. Writes
results/seq2seq/table.md, runs.json, and the pictures of the first seed.
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

DATA = {
    "multi30k": ["--source", "en", "--target", "de", "--attack", "one_to_one", "--test_split", "test"],
    "self_dialogue": ["--attack", "one_to_many"],
}
METHODS = {
    "FIP": [],
    "fine-tuning, same settings": ["--eta_f", "0"],
    "Fast FIP": ["--adapter", "singular"],
    "Fast FIP, control": ["--adapter", "singular", "--eta_f", "0"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--multi30k", default="multi30k_en_de", help="folder of the translation data")
    parser.add_argument("--self_dialogue", default="self_dialogue", help="folder of the dialogues")
    parser.add_argument("--cases", nargs="+", default=[f"{data}:{kind}" for data in DATA for kind in ("lstm", "conv")])
    parser.add_argument("--seeds", nargs="+", default=["1", "2", "3"])
    parser.add_argument("--max_train_samples", default="8000")
    parser.add_argument("--max_test_samples", default="300")
    parser.add_argument("--clean_samples", default="1000")
    parser.add_argument("--victim_epochs", default="20")
    parser.add_argument("--max_steps", help="of purification and controls; the recipe's own by default")
    parser.add_argument("--work", type=Path, default=Path("outputs/seq2seq"), help="where victims and runs are kept")
    args = parser.parse_args()
    steps = ["--max_steps", args.max_steps] if args.max_steps else []
    rows = []
    for case in args.cases:
        name, architecture = case.split(":")
        data = ["--dataset_name", getattr(args, name), *DATA[name]]
        data += ["--max_train_samples", args.max_train_samples, "--max_test_samples", args.max_test_samples]
        for seed in args.seeds:
            folder = args.work / f"{name}-{architecture}-{seed}"
            victim = folder / "victim"
            made = ["--architecture", architecture, "--num_train_epochs", args.victim_epochs]
            run("backdoor_seq2seq.py", victim, *data, *made, "--clean_samples", args.clean_samples, "--seed", seed)
            for method, options in METHODS.items():
                given = ["--model_name_or_path", str(victim), *data, *steps, "--seed", seed, *options]
                report = run("purify_seq2seq.py", folder / method.replace(", ", "-").replace(" ", "-"), *given)
                rows.append(report | {"case": case, "seed": int(seed), "method": method})
    write(args, rows)


def write(args: argparse.Namespace, rows: list[dict]) -> None:
    folder = RESULTS / "seq2seq"
    folder.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "benchmarks/seq2seq.py", *sys.argv[1:]])
    keys = ("case", "seed", "method", "before", "after", "der", "cost", "arguments", "data", "versions")
    kept = [{key: row[key] for key in keys} for row in rows]
    (folder / "runs.json").write_text(json.dumps({"command": command, "runs": kept}, indent=1) + "\n")
    first = rows[0]
    lines = [
        "# Models that write text: FIP beside plain fine-tuning\n",
        f"`{command}`\n",
        f"Percent, mean ± standard deviation over seeds {', '.join(args.seeds)}. BLEU (sacrebleu "
        f"{version('sacrebleu')}) of {first['data']['test_samples']} clean test pairs; ASR: share of the triggered "
        "test sources whose output contains the attacker's sentence. "
        f"{first['data']['clean_samples']} clean pairs. hf_fip {first['versions']['hf_fip']}, torch "
        f"{first['versions']['torch']}, transformers {first['versions']['transformers']}, {platform.machine()} CPU.\n",
        "| victim | method | BLEU before | BLEU after | ASR before | ASR after | seconds | trained |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in args.cases:
        for method in METHODS:
            runs = [row for row in rows if row["case"] == case and row["method"] == method]
            mean = over_seeds(runs)
            before, after = mean["before"], mean["after"]
            lines.append(
                f"| {case.replace(':', ', ')} | {method} | {before['bleu']} | {after['bleu']} | {before['asr']} | "
                f"{after['asr']} | {mean['cost']['seconds']} | {runs[0]['cost']['trainable_parameters']:,} |"
            )
        name = case.replace(":", "-")
        for plot in (args.work / f"{name}-{args.seeds[0]}" / "FIP" / "plots").glob("*.png"):
            shutil.copy(plot, folder / f"{name}-{plot.name}")
    (folder / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
