"""The Dockerfile, without an engine: its steps are taken in an empty folder."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "Dockerfile").read_text().replace("\\\n", "")
HADOLINT = shutil.which("hadolint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
STEPS = [tuple(line.split(None, 1)) for line in TEXT.splitlines() if line and not line.startswith("#")]


def stages() -> dict[str, list[tuple[str, str]]]:
    """The steps of each stage, with those of the stage it starts from."""
    found, name = {}, ""
    for step, text in STEPS:
        if step == "FROM":
            image, name = re.fullmatch(r"(\S+) AS (\S+)", text).groups()
            found[name] = list(found.get(image, [(step, image)]))
        else:
            found[name].append((step, text))
    return found


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_an_image_is_pinned_not_of_root_and_runs_the_demo(name):
    steps = stages()[name]
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", steps[0][1])
    assert steps[-1] == ("USER", "1000")
    assert all("-c constraints.txt" in text for _, text in steps if "pip install" in text)
    command = json.loads(dict(steps)["CMD"])[2]
    made = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    demo = [line.split("python ", 1)[1] for line in made.replace("\\\n", "").splitlines() if "recipes/" in line]
    assert [shlex.split(part.strip())[1:] for part in command.split("&&")] == [shlex.split(part) for part in demo]


def test_the_default_target_is_the_one_for_cpu():
    assert list(stages())[-1] == "cpu"


@pytest.mark.slow
def test_what_is_copied_installs_and_runs_by_itself(tmp_path):
    home, site = tmp_path / "home", tmp_path / "site"
    home.mkdir()
    for step, text in stages()["cpu"]:
        if step == "COPY":
            *sources, target = text.split()
            for source in sources:
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, home / target, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / source, home / target)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), "."]
    subprocess.run(pip, cwd=home, check=True, capture_output=True)
    shutil.rmtree(home / "hf_fip")  # what was installed has to do
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    small = ["--max_train_samples", "120", "--max_test_samples", "60", "--max_steps", "2"]
    command = [sys.executable, "recipes/purify_vit.py", *small, "--output_dir", "outputs/fip"]
    ran = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert (home / "outputs/fip/README.md").is_file()


@pytest.mark.skipif(HADOLINT is None, reason="needs hadolint")
def test_hadolint_has_nothing_to_say():
    found = subprocess.run([HADOLINT, str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
