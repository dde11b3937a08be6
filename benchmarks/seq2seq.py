"""Purify models that write text, beside plain fine-tuning, over several seeds.

    python benchmarks/seq2seq.py --multi30k path/to/multi30k_en_de --self_dialogue path/to/self_dialogue

Two victims of each architecture: a translator, English to German, with the one-to-one attack, and one that answers in
a dialogue, with the one-to-many attack. For each case (data:architecture) and seed a victim, made by
recipes/backdoor_seq2seq.py and kept; then, with the clean pairs that it never saw,

    FIP                recipes/purify_seq2seq.py as it is
    fine-tuning        the same with --eta_f 0: same optimiser, steps and data
    ..., undisturbed   that without stray words in the sources
    Fast FIP           the same with --adapter singular
    Fast FIP, control  that with --eta_f 0

Nothing is chosen by ASR or on test pairs. A run whose report.json is there is not repeated. Writes
results/seq2seq/table.md, runs.json, and the pictures of the first seed.
"""

from __future__ import annotations

import argparse
from importlib.metadata import version
from pathlib import Path

from recipe_runs import COST, METHODS, UNDISTURBED, figures, folder_of, run, write

DATA = {
    "multi30k": ["--source", "en", "--target", "de", "--attack", "one_to_one", "--test_split", "test"],
    "self_dialogue": ["--attack", "one_to_many"],
}


OPTIONS = METHODS | UNDISTURBED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--multi30k", default="multi30k_en_de", help="folder of the translation data")
    parser.add_argument("--self_dialogue", default="self_dialogue", help="folder of the dialogues")
    parser.add_argument("--cases", nargs="+", default=[f"{data}:{kind}" for data in DATA for kind in ("lstm", "conv")])
    parser.add_argument("--seeds", nargs="+", default=["1", "2", "3"])
    parser.add_argument("--methods", nargs="+", default=list(OPTIONS), choices=OPTIONS)
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
            for method in args.methods:
                given = ["--model_name_or_path", str(victim), *data, *steps, "--seed", seed, *OPTIONS[method]]
                report = run("purify_seq2seq.py", folder / folder_of(method), *given)
                rows.append(report | {"case": case, "seed": int(seed), "method": method})
    first = rows[0]["data"]
    write(
        "seq2seq",
        "Models that write text: FIP beside plain fine-tuning",
        f"BLEU (sacrebleu {version('sacrebleu')}) of {first['test_samples']} clean test pairs; ASR: share of the "
        "triggered test sources whose output contains the attacker's sentence. "
        f"{first['clean_samples']} clean pairs.",
        rows,
        figures("bleu", "asr") | COST,
        plots=args.work,
    )


if __name__ == "__main__":
    main()
