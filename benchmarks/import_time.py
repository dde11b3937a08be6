"""`import hf_fip` and `from hf_fip import FIPTrainer` beside `import transformers`, in one run.

    python benchmarks/import_time.py [--rounds 9]

A process each, taking turns; the median of the ratios within a round is reported.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

STATEMENTS = (
    "import transformers",
    "import hf_fip",
    "from transformers import Trainer",
    "from hf_fip import FIPTrainer",
)


def seconds(statement: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    times = {statement: [] for statement in STATEMENTS}
    for _ in range(rounds + 1):
        for statement in STATEMENTS:
            times[statement].append(seconds(statement))
    for statement, base in (
        ("import hf_fip", "import transformers"),
        ("from hf_fip import FIPTrainer", STATEMENTS[2]),
    ):
        ratios = [a / b for a, b in zip(times[statement][1:], times[base][1:], strict=True)]
        print(f"{statement}: {statistics.median(ratios):.2f}× the time of `{base}`", end=" ")
        print(f"({statistics.median(times[statement][1:]):.2f} s, {statistics.median(times[base][1:]):.2f} s)")


if __name__ == "__main__":
    main()
