"""A short training, and what can befall it: kills, full and read-only disks, workers that die, wrong numbers.

Children are forked from a server that has imported everything once, so that each costs a training and not the imports.
"""

from __future__ import annotations

import ctypes
import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from torch.utils.data import get_worker_info
from trainer_cases import Images, image_trainer, resnet
from transformers.trainer_callback import TrainerState

import hf_fip.anchor
import hf_fip.collapse
from hf_fip.checkpoint import last_complete_checkpoint
from hf_fip.fisher import Categorical

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["hf_fip.trainer", "hf_fip.models", "pytest", "torch.utils.serialization.config"]
    + [f"transformers.models.{name}.modeling_{name}" for name in ("marian", "resnet", "vit")]
)

STEPS = 6
# The files of a checkpoint, in the order in which they are written.
WRITES = ("fip_anchor.safetensors", "fip_collapse.safetensors", "config.json", "model.safetensors")
WRITES += ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
WRITES += ("fip_checksums.json",)
RECEIVED, OUT, FINAL, ERRORS = "received", "out", "final.safetensors", "errors"  # in a trial's folder


def receive(place: Path) -> None:
    """Put the received model into a trial's folder."""
    resnet().save_pretrained(place / RECEIVED)


def trainer(place: Path, **options):
    """Everything that draws or accumulates: augmentation, BatchNorm, momentum, both penalties, the collapse guard."""
    return image_trainer(
        place / OUT,
        str(place / RECEIVED),
        train_transform=jitter,
        **{"eta_f": 0.05, "eta_r": 1.0, "trace_interval": 2, "max_steps": STEPS, "gradient_accumulation_steps": 2},
        **{"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, **options},
    )


def jitter(batch: dict) -> dict:
    return {**batch, "pixel_values": batch["pixel_values"] + 0.3 * torch.randn_like(batch["pixel_values"])}


def train(place: Path, **options) -> None:
    """Train, from the last checkpoint if there is one, and leave the weights at the end and the log."""
    run = trainer(place, **options)
    run.train(resume_from_checkpoint=last_whole(place) > 0)
    logs = [{k: v for k, v in row.items() if k in ("step", "loss", "fisher_trace")} for row in run.state.log_history]
    save_file(run.model.state_dict(), place / FINAL, {"log": json.dumps(logs)})


def last_whole(place: Path) -> int:
    """The step of the last whole checkpoint; 0 if there is none."""
    found = last_complete_checkpoint(str(place / OUT))
    return int(found.rpartition("-")[2]) if found else 0


def in_child(place: Path, fault: Callable | None = None, *arguments, **options) -> int:
    """Train in a child process, after `fault(*arguments)`; gives its exit status, negative for a signal.

    What it says on stderr is in the trial's folder, in `errors`.
    """
    child = FORKS.Process(target=_child, args=(place, fault, arguments, options))
    child.start()
    child.join(120)
    assert child.exitcode is not None, "the process hangs"
    return child.exitcode


def _child(place: Path, fault: Callable | None, arguments: tuple, options: dict) -> None:
    os.dup2(os.open(place / ERRORS, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    torch.set_num_threads(1)
    torch.manual_seed(time.time_ns())  # a run has to set its own seeds
    transformers.utils.logging.disable_progress_bar()
    if fault is not None:
        fault(*arguments)
    try:
        train(place, **options)
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# ---- Faults in a training in this process ----


class Faulty(Categorical):
    """A categorical likelihood that goes wrong at its n-th use, or from then on; an update uses it once a score."""

    def __init__(self, at: int, fault: Callable, always: bool = False):
        self.left, self.fault, self.always = at, fault, always

    def log_prob(self, logits, labels):
        self.left -= 1
        wrong = self.left <= 0 if self.always else self.left == 0
        return self.fault(super().log_prob(logits, labels)) if wrong else super().log_prob(logits, labels)


class BadBatch:
    """A `train_transform` under which the n-th batch is one of NaN, or of another value."""

    def __init__(self, at: int, value: float = math.nan):
        self.left, self.value = at, value

    def __call__(self, batch: dict) -> dict:
        self.left -= 1
        pixels = batch["pixel_values"]
        return {**batch, "pixel_values": torch.full_like(pixels, self.value)} if self.left == 0 else batch


def interrupt(log_prob):
    raise KeyboardInterrupt


# ---- Faults of a child ----


def die_at_micro_batch(number: int) -> None:
    def transform(batch, real=jitter, seen=[]):  # noqa: B006
        seen.append(batch)
        if len(seen) > number:
            die()
        return real(batch)

    globals()["jitter"] = transform


def die_after(seconds: float) -> None:
    signal.signal(signal.SIGALRM, lambda *_: die())
    signal.setitimer(signal.ITIMER_REAL, seconds)


def die_at_write(name: str, checkpoint: int, half: bool) -> None:
    """Die when a file of a checkpoint is written, or half written."""

    def dying(write: Callable, path: Path) -> None:
        write()
        if half:
            os.truncate(path, os.path.getsize(path) // 2)
        die()

    _at_write(name, checkpoint, dying)


def full_at_write(name: str, checkpoint: int) -> None:
    """From a file of a checkpoint on the system writes 64 bytes of a file and no more."""

    def limited(write: Callable, path: Path) -> None:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
        try:
            write()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    _at_write(name, checkpoint, limited)


def _at_write(name: str, checkpoint: int, instead: Callable[[Callable, Path], None]) -> None:
    def wrapped(save: Callable) -> Callable:
        def saving(*args, **kwargs):
            paths = (value for value in (*args, *kwargs.values()) if isinstance(value, (str, Path)))
            path = Path(next((path for path in paths if Path(path).name.startswith(name)), ""))
            if path.parent.name == f"checkpoint-{checkpoint}":
                return instead(lambda: save(*args, **kwargs), path)
            return save(*args, **kwargs)

        return saving

    for owner, function in (
        (hf_fip.anchor, "save_file"),
        (hf_fip.collapse, "save_file"),
        (transformers.modeling_utils, "safe_save_file"),
        (transformers.PreTrainedConfig, "to_json_file"),
        (torch, "save"),
        (TrainerState, "save_to_json"),
        (Path, "write_text"),
    ):
        setattr(owner, function, wrapped(getattr(owner, function)))


def die_at_rotation() -> None:
    """Die while an old checkpoint is being removed."""

    def rmtree(folder, *args, **kwargs):
        next(Path(folder).glob("*.safetensors")).unlink()
        die()

    shutil.rmtree = rmtree


def worker_fails_at(sample: int, how: str) -> None:
    """The worker process of the data loader dies, or fails, when it is asked for its n-th sample."""
    multiprocessing.set_start_method("fork", force=True)  # a worker that knows of this
    real, seen = Images.__getitem__, []

    def get(self, row):
        seen.append(row)
        if get_worker_info() is not None and len(seen) == sample:
            {"is killed": die, "exits": lambda: os._exit(3), "cannot read": lambda: os.stat("/not/there")}[how]()
        return real(self, row)

    Images.__getitem__ = get


# ---- Disks of their own: a child may mount what nobody else sees ----

_NEW_USER, _NEW_MOUNTS, _READ_ONLY, _REMOUNT, _PRIVATE = 1 << 28, 1 << 17, 1, 1 << 5, 1 << 18 | 1 << 14


def _call(function: str, *arguments) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if getattr(library, function)(*arguments):
        raise OSError(ctypes.get_errno(), f"{function}: {os.strerror(ctypes.get_errno())}")


def mount(folder: Path, size: int, flags: int = 0) -> None:
    """A disk in memory of so many bytes; or another size or state of the one there, with `_REMOUNT`."""
    _call("mount", b"tmpfs", bytes(folder), b"tmpfs", flags, f"size={size}".encode())


def on_small_disk(place: Path, size: int, whole: int) -> None:
    """Let the child train on a disk that is too small; and again, when it has more room.

    The last whole checkpoint is then to be that of the step `whole`.
    """

    def instead(place: Path, real=train, **options) -> None:
        mount(place / OUT, size)
        try:
            real(place, **options)
        except Exception:
            traceback.print_exc()
            assert last_whole(place) == whole
            mount(place / OUT, 2**24, _REMOUNT)
            real(place, **options)
        else:
            raise AssertionError("the disk was large enough")

    _mounting(place, instead)


def on_read_only_disk(place: Path, step: int, whole: int) -> None:
    """As `on_small_disk`, on one that can only be read from a step on."""

    def instead(place: Path, real=train, **options) -> None:
        mount(place / OUT, 2**24)
        real_step = transformers.Trainer.training_step

        def training_step(self, *args, **kwargs):
            if self.state.global_step == step:
                mount(place / OUT, 2**24, _REMOUNT | _READ_ONLY)
            return real_step(self, *args, **kwargs)

        transformers.Trainer.training_step = training_step
        try:
            real(place, **options)
        except Exception:
            traceback.print_exc()
            assert last_whole(place) == whole
            transformers.Trainer.training_step = real_step
            mount(place / OUT, 2**24, _REMOUNT)
            real(place, **options)
        else:
            raise AssertionError("the disk could be written to")

    _mounting(place, instead)


def _mounting(place: Path, instead: Callable) -> None:
    (place / OUT).mkdir()
    _own_mounts()
    globals()["train"] = instead


def _own_mounts() -> None:
    user, group = os.getuid(), os.getgid()
    _call("unshare", _NEW_MOUNTS if user == 0 else _NEW_USER | _NEW_MOUNTS)
    if user:  # becomes root of the mounts that it alone sees
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            Path("/proc/self", name).write_text(text)
    _call("mount", None, b"/", None, _PRIVATE, None)


def may_mount() -> bool:
    """Whether the system lets a child mount a disk."""
    child = FORKS.Process(target=_try_to_mount)
    child.start()
    child.join(60)
    return child.exitcode == 0


def _try_to_mount() -> None:
    try:
        _own_mounts()
        mount(Path("/tmp"), 2**20)
    except OSError:
        os._exit(1)
