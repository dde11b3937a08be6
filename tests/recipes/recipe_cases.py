"""What the tests of the recipes share: running one as a person does, killing one, and what it left."""

import functools
import itertools
import json
import multiprocessing
import os
import pkgutil
import resource
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = ["--max_train_samples", "120", "--max_test_samples", "60", "--clean_fraction", "0.1", "--use_cpu"]
SHORT = [*SMALL, "--max_steps", "2"]


def spawn(*command, cwd) -> subprocess.CompletedProcess:
    """Run Python as a person does."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": ""}
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def execute(name: str, arguments) -> int:
    """Run a recipe in this process; gives its exit code."""
    sys.argv = [f"{name}.py", *map(str, arguments)]
    try:
        runpy.run_path(str(RECIPES / f"{name}.py"), run_name="__main__")
    except SystemExit as stop:
        return stop.code or 0
    return 0


def assert_measured_again(run, task: str, *arguments) -> dict:
    """What was purified in `out` has its report's figures, on the data that names; gives what was measured."""
    code, out, err = run(f"evaluate_{task}", "out", "--use_cpu", "--json", *arguments)
    assert code == 0, err
    found, report = json.loads(out), json.loads(Path("out/report.json").read_text())
    assert found["measured"] == {"model": {"as_it_is": report["after"]}}
    assert found["reported"] == {key: value for key, value in report["after"].items() if value is not None}
    assert found["notes"] == ["The model's report.json says the same."] and not found["differs"]
    assert found["data"]["name"] == report["data"]["name"]
    assert found["data"]["test_samples"] == report["data"]["test_samples"] and found["data"]["counted_for_asr"] > 0
    return found


# Processes of their own, forked from one that has imported everything, so that they can be killed at any point

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["hf_fip.scripts.purify_image", "sklearn.datasets", "matplotlib.figure", "rich.table"])


def fork(name: str, *arguments, cwd, kill: tuple | None = None, largest_file: int | None = None):
    """Run a recipe in a process of its own: gives its exit code and stderr.

    Args:
        kill: a function, by its full name, at whose n-th call the process kills itself, and the signal, if another.
        largest_file: bytes, as if the disk were full beyond.
    """
    arguments = [str(argument) for argument in arguments]
    child = FORKS.Process(target=_child, args=(name, arguments, str(cwd), kill, largest_file))
    child.start()
    child.join(300)
    assert child.exitcode is not None, "the process hangs"
    errors = Path(cwd, "stderr")
    text = errors.read_text()
    errors.unlink()
    return child.exitcode, text


def _child(name, arguments, cwd, kill, largest_file):
    os.chdir(cwd)
    torch.set_num_threads(1)
    os.dup2(os.open("stderr", os.O_WRONLY | os.O_CREAT), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    if kill:
        _kill_at(*kill)
    sys.exit(execute(name, arguments))


def _kill_at(place: str, count: int, number: int = signal.SIGKILL) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores Ctrl-C
    owner_name, _, name = place.rpartition(".")
    owner = pkgutil.resolve_name(owner_name)
    original, calls = getattr(owner, name), itertools.count(1)

    @functools.wraps(original)
    def killing(*args, **kwargs):
        if next(calls) == count:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    setattr(owner, name, killing)


def report_of(folder) -> dict:
    return json.loads(Path(folder, "report.json").read_text())


def of_other_data(victim, folder: str) -> None:
    """A copy of a victim whose report says that it was made of the images in the folder `gone`."""
    shutil.copytree(victim, folder)
    report = report_of(folder)
    report["arguments"]["dataset_name"] = "./gone"
    Path(folder, "report.json").write_text(json.dumps(report))


def assert_same_weights(one, other) -> None:
    one, other = (load_file(next(Path(folder).glob("*model.safetensors"))) for folder in (one, other))
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)


def left_in(folder) -> set[str]:
    return {path.name for path in Path(folder).iterdir()}


FILES = {"model.safetensors", "config.json", "preprocessor_config.json", "README.md", "report.json", "plots", "attack"}
