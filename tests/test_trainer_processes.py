"""Two processes train as one does."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from trainer_cases import distance, identical
from two_processes import DRAWN, SAME, main

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """What one process and two processes leave."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    main(one)
    place = Path(__file__).parent
    path = os.pathsep.join([str(place.parent), str(place), *filter(None, [os.environ.get("PYTHONPATH")])])
    launched = subprocess.run(  # `accelerate launch` starts more than one process on accelerators only
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        + [str(place / "two_processes.py"), str(two)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
    )
    assert launched.returncode == 0, launched.stderr[-5000:]
    return one, two


def left(folder, name, rank):
    logs = json.loads((folder / f"{name}-{rank}.json").read_text())
    return load_file(folder / f"{name}-{rank}.safetensors"), logs


@pytest.mark.parametrize("name", SAME)
def test_two_processes_end_with_the_weights_of_one(name, folders):
    expected, logs = left(folders[0], name, 0)
    for rank in (0, 1):
        found, found_logs = left(folders[1], name, rank)
        assert distance(found, expected) < 2e-6
        for key, values in logs.items():
            assert found_logs[key] == pytest.approx(values, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("estimator", ["signed_sum", "sampled_sum"])
def test_two_processes_expect_the_trace_of_one(estimator, folders):
    one, first, second = (
        json.loads((folders[place] / f"expected-{rank}.json").read_text()) for place, rank in ((0, 0), (1, 0), (1, 1))
    )
    assert first[estimator] == second[estimator]  # both have the whole
    (mean, error), (other_mean, other_error) = one[estimator], first[estimator]
    assert abs(mean - other_mean) < 4 * math.hypot(error, other_error) < 0.4 * mean
    if estimator == "signed_sum":  # of the same labels
        assert abs(other_mean - first["exact"]) < 4 * other_error


@pytest.mark.parametrize("name", DRAWN)
def test_both_processes_have_the_same_weights_and_log(name, folders):
    (first, first_logs), (second, second_logs) = left(folders[1], name, 0), left(folders[1], name, 1)
    parameters = {key for key in first if "running_" not in key}
    assert identical({key: first[key] for key in parameters}, {key: second[key] for key in parameters})
    assert first_logs == second_logs and len(first_logs["fisher_trace"]) == 4


@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.parametrize("rank", [0, 1])
def test_two_resumed_processes_end_with_the_same_weights(name, rank, folders):
    (whole, logs), (resumed, resumed_logs) = left(folders[1], name, rank), left(folders[1], f"{name}-resumed", rank)
    assert identical(whole, resumed)
    assert logs == resumed_logs


def test_the_state_is_written_when_every_process_has_written_its_part(folders):
    assert json.loads((folders[1] / "state-was-last.json").read_text()) == [True, True]
