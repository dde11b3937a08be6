"""How much faster two processes train than one, what of it communication takes, and what the trace adds.

    python benchmarks/processes.py [--rounds 5] [--output results/processes]

A ViT of 5 M parameters, 32 samples of 32 × 32 a process, one thread a process, DDP over gloo. In each round take turns

    one            one process
    two, apart     two processes that know nothing of each other, at the same time: what the machine can give
    two            two processes of `torch.distributed.run`

Reported are samples a second over those of one process in the same round, the median over the rounds. What two lack of
two that are apart is communication. Only steps are timed, after three that warm up.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from scaling import SMALL, Repeated
from transformers import TrainerCallback

from hf_fip import FIPConfig, FIPTrainer, SingularValueConfig
from hf_fip.hub.report import versions

STEPS, WARM = 15, 3  # twelve are timed, three of them with the trace where it is due at every 4th
STEP_KINDS = {
    "plain fine-tuning": {"eta_f": 0.0},
    "FIP, trace at every 4th step": {"trace_interval": 4},
    "FIP, trace at every step": {"trace_interval": 1},
    "Fast FIP": {"trace_interval": 4},
}


class Clock(TrainerCallback):
    """Seconds of the steps after the warm ones."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == WARM:
            self.started = time.perf_counter()
        elif state.global_step == STEPS:
            self.seconds = time.perf_counter() - self.started


def work(kind: str, batch: int) -> float:
    """Samples a second of this process."""
    size, clock = SMALL[0], Clock()
    torch.manual_seed(0)
    args = FIPConfig(
        tempfile.mkdtemp(),
        max_steps=STEPS,
        per_device_train_batch_size=batch,
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1000,
        use_cpu=True,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
        report_to=[],
        **STEP_KINDS[kind],
    )
    adapter = SingularValueConfig() if kind == "Fast FIP" else None
    data = Repeated(size.inputs(batch))
    FIPTrainer(size.make(), args, train_dataset=data, callbacks=[clock], peft_config=adapter).train()
    return batch * (STEPS - WARM) / clock.seconds


def samples_a_second(how: str, kind: str, batch: int) -> float:
    """Of all processes together."""
    worker = [__file__, "--work", kind, "--batch", str(batch)]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if how == "two" else []
    started = [
        subprocess.Popen(
            [sys.executable, *launcher, *worker],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for _ in range(2 if how == "two, apart" else 1)
    ]
    said = "".join(process.communicate()[0] for process in started)
    return sum(float(value) for value in re.findall(r"samples a second: ([\d.]+)", said))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=32, help="samples of a process")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).resolve().parent.parent / "results" / "processes"
    )
    parser.add_argument("--work", choices=STEP_KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.work:
        print("samples a second:", work(args.work, args.batch), flush=True)
        return
    ways = ("one", "two, apart", "two")
    found = {kind: {how: [] for how in ways} for kind in STEP_KINDS}
    for _ in range(args.rounds):
        for kind in STEP_KINDS:
            for how in ways:
                found[kind][how].append(samples_a_second(how, kind, args.batch))
                print(kind, how, found[kind][how], file=sys.stderr, flush=True)
    write(args.output, found, args.batch)


def write(output: Path, found: dict[str, dict[str, list[float]]], batch: int) -> None:
    times = len(found["plain fine-tuning"]["one"])
    lines = [
        "# Two processes against one",
        "",
        f"`python benchmarks/processes.py --rounds {times}` on CPU, one thread a process, {batch} samples "
        "a process; the median over the rounds of ratios within a round.",
        "",
        "| step | one, samples a second | two, apart | two | lowest, highest | communication | beside plain, on two |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind, rates in found.items():
        apart, two = (_ratio(rates[how], rates["one"]) for how in ("two, apart", "two"))
        share = 1 - _ratio(rates["two"], rates["two, apart"])
        slower = _ratio(found["plain fine-tuning"]["two"], rates["two"])
        one = statistics.median(rates["one"])
        rounds = [each / alone for each, alone in zip(rates["two"], rates["one"], strict=True)]
        spread = f"{min(rounds):.2f}, {max(rounds):.2f}"
        lines.append(
            f"| {kind} | {one:.1f} | {apart:.2f}× | {two:.2f}× | {spread} | {share:.0%} | {slower:.2f}× the time |"
        )
    output.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    kept = {"versions": versions(), "batch": batch, "samples_a_second": found}
    output.with_suffix(".json").write_text(json.dumps(kept, indent=1) + "\n")
    print("\n".join(lines))


def _ratio(rates: list[float], others: list[float]) -> float:
    return statistics.median(rate / other for rate, other in zip(rates, others, strict=True))


if __name__ == "__main__":
    main()
