"""Trains in child processes that die by SIGKILL at chosen and at random moments, and goes on until one gets through.

    python kill_and_resume.py FOLDER

Leaves the weights at the end in FOLDER/final.safetensors and prints, as JSON, how each child ended. Imported once and
forked for each child, so that a child costs a training and not the imports.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import safetensors.torch
import torch
from trainer_cases import PlainNet, Snapshots, image_trainer
from transformers.trainer_callback import TrainerState

import hf_fip.anchor
from hf_fip.checkpoint import last_complete_checkpoint

WRITES = ("anchor", "weights", "arguments", "optimizer", "scheduler", "random state", "state")  # of one checkpoint
STEPS = 8
RANDOM_KILLS = 3


def trainer(folder: Path):
    """Everything that draws or accumulates: dropout, augmentation, BatchNorm, momentum, both penalties."""
    return image_trainer(
        folder,
        PlainNet(dropout=0.3),
        **{"eta_f": 0.05, "eta_r": 1.0, "trace_interval": 2, "max_steps": STEPS, "gradient_accumulation_steps": 2},
        **{"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1},
        train_transform=jitter,
        callbacks=[Snapshots()],
    )


def jitter(batch: dict) -> dict:
    return {**batch, "pixel_values": batch["pixel_values"] + 0.3 * torch.randn_like(batch["pixel_values"])}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_write(number: int, half: bool) -> None:
    """Die when the `number`-th file of a checkpoint is written, or half written."""
    count = 0

    def dying(write, place):
        def wrapped(*args, **kwargs):
            nonlocal count
            write(*args, **kwargs)
            if count == number:
                if half:
                    path = kwargs.get("filename") or args[place]
                    os.truncate(path, os.path.getsize(path) // 2)
                die()
            count += 1

        return wrapped

    safetensors.torch.save_file = hf_fip.anchor.save_file = dying(safetensors.torch.save_file, 1)
    torch.save = dying(torch.save, 1)
    TrainerState.save_to_json = dying(TrainerState.save_to_json, 1)


def die_at_rotation() -> None:
    """Die while an old checkpoint is being removed."""

    def rmtree(folder, *args, **kwargs):
        (Path(folder) / "trainer_state.json").unlink()
        die()

    shutil.rmtree = rmtree


def die_at_micro_batch(number: int) -> None:
    def transform(batch, real=jitter, seen=[]):  # noqa: B006
        seen.append(batch)
        if len(seen) > number:
            die()
        return real(batch)

    globals()["jitter"] = transform


def train(folder: Path) -> None:
    run = trainer(folder)
    run.train(resume_from_checkpoint=bool(last_complete_checkpoint(str(folder))))
    safetensors.torch.save_file(run.model.state_dict(), folder / "final.safetensors")


def child(folder: Path, prepare, seconds: float | None = None) -> int:
    """Train in a child process; returns its exit status, negative for a signal."""
    process = os.fork()
    if process == 0:
        try:
            torch.manual_seed(time.time_ns())  # a run has to set its own seeds
            prepare()
            if seconds is not None:
                signal.signal(signal.SIGALRM, lambda *_: die())
                signal.setitimer(signal.ITIMER_REAL, seconds)
            train(folder)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def main(folder: Path) -> None:
    sys.stdout.flush()
    ends = {}
    ends["micro-batch 3"] = child(folder, lambda: die_at_micro_batch(3))
    for number in (1, len(WRITES) - 1):  # of the first checkpoint: there is nothing to go back to
        ends[f"first {WRITES[number]}, half"] = child(folder, lambda number=number: die_at_write(number, True))
    ends["first checkpoint"] = child(folder, lambda: die_at_write(len(WRITES) - 1, False))
    ends["micro-batch 1"] = child(folder, lambda: die_at_micro_batch(1))
    for number, name in enumerate(WRITES):  # of the second one
        ends[f"{name}, half"] = child(folder, lambda number=number: die_at_write(number, True))
        ends[name] = child(folder, lambda number=number: die_at_write(number, False))
    ends["rotation"] = child(folder, die_at_rotation)
    ends["last"] = child(folder, lambda: None)

    at_random, dice = folder / "at_random", random.Random(0)
    at_random.mkdir()
    for number in range(RANDOM_KILLS):  # most hit; one that comes too late finds the run finished
        ends[f"random moment {number}"] = child(at_random, lambda: None, seconds=dice.uniform(0.05, 0.5))
    ends["last, at random"] = child(at_random, lambda: None)
    print(json.dumps(ends))


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    main(Path(sys.argv[1]))
