"""Two processes, each with batches of its own, find the curvature that one process finds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from curvature_processes import MODELS, main

pytestmark = pytest.mark.slow

CLOSE = {"rel": 2e-3, "abs": 2e-5}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What one process finds, and what each of two."""
    file, place = tmp_path_factory.mktemp("two") / "found", Path(__file__).parent
    path = os.pathsep.join([str(place.parent), str(place), *filter(None, [os.environ.get("PYTHONPATH")])])
    launched = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        + [str(place / "curvature_processes.py"), str(file)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
    )
    assert launched.returncode == 0, launched.stderr[-5000:]
    return main(), *(json.loads(Path(f"{file}-{rank}").read_text()) for rank in (0, 1))


@pytest.mark.parametrize("name", MODELS)
def test_two_processes_find_the_same_figures_as_one(name, found):
    one, first, second = (figures[name] for figures in found)
    assert first == second
    assert first["samples"] == 7
    for key in ("loss", "lambda_max", "trace", "trace_error"):
        assert first[key] == pytest.approx(one[key], **CLOSE)
    assert first["eigenvalues"] == pytest.approx(one["eigenvalues"], **CLOSE)
    assert first["losses"]["clean"] == pytest.approx(one["losses"]["clean"], **CLOSE)
    assert first["density"]["weights"][0] == pytest.approx(one["density"]["weights"][0], rel=2e-2, abs=1e-3)
