"""The recipes under `accelerate launch` with each of the configurations beside them."""

import os
import socket
import subprocess
import sysconfig
import time
from pathlib import Path

import psutil
import pytest
import yaml
from recipe_cases import RECIPES, SMALL, assert_same_weights, left_in, report_of
from safetensors.torch import load_file

from hf_fip.attacks import load_attack

pytestmark = pytest.mark.slow

CONFIGS = RECIPES / "accelerate_configs"
GIVEN = [option for option in SMALL if option != "--use_cpu"]  # that is for the configuration to say
LONG = [*GIVEN, "--max_steps", "24", "--save_steps", "4", "--per_device_train_batch_size", "2", "--eta_r", "0.1"]


def launch(config: str, *arguments, cwd, launcher=(), recipe="purify_vit") -> subprocess.Popen:
    """Start a recipe as a person does."""
    accelerate = Path(sysconfig.get_path("scripts"), "accelerate")
    command = [accelerate, "launch", "--config_file", CONFIGS / f"{config}.yaml", *launcher]
    command += [RECIPES / f"{recipe}.py", *arguments]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(list(map(str, command)), cwd=cwd, env=env, stdout=pipe, stderr=pipe, text=True)


def ended(process: subprocess.Popen) -> str:
    """What it said, once it has ended well."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return out


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, victim) -> Path:
    """What a run under fsdp2.yaml leaves when nothing happens to it."""
    place = tmp_path_factory.mktemp("sharded")
    port = ["--main_process_port", free_port()]
    ended(launch("fsdp2", *LONG, "--model_name_or_path", victim, "--output_dir", "out", cwd=place, launcher=port))
    return place / "out"


def test_every_configuration_is_tested():
    assert {path.stem for path in CONFIGS.iterdir()} == {"cpu", "ddp", "fsdp2", "multi_node"}
    with open(CONFIGS / "fsdp2.yaml") as one, open(CONFIGS / "multi_node.yaml") as other:
        one, other = yaml.safe_load(one)["fsdp_config"], yaml.safe_load(other)["fsdp_config"]
    assert other.items() <= one.items()


@pytest.mark.parametrize(("config", "processes"), [("cpu", 1), ("ddp", 2)])
def test_a_configuration_starts_its_processes(config, processes, victim, tmp_path):
    port = ["--main_process_port", free_port()]
    options = ["--model_name_or_path", victim, "--output_dir", "out", "--max_steps", "4"]
    said = ended(launch(config, *GIVEN, *options, cwd=tmp_path, launcher=port))
    assert said.count("saved to out") == 1  # one of them speaks
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert report_of(tmp_path / "out")["cost"]["processes"] == processes


def test_two_processes_learn_one_trigger_together(tmp_path):
    few = ["--max_train_samples", "60", "--max_test_samples", "40", "--num_points", "48", "--num_train_epochs", "1"]
    attack = ["--attack", "pcba", "--attack_options", "confidence=0.001,steps=5,restarts=1,points=8"]
    options = {"launcher": ["--main_process_port", free_port()], "recipe": "backdoor_pointcloud"}
    said = ended(launch("ddp", *few, *attack, "--output_dir", "out", cwd=tmp_path, **options))
    assert said.count("pcba learns on a clean model") == said.count("saved to out") == 1
    assert load_attack(tmp_path / "out").placed.shape == (8, 3)
    assert left_in(tmp_path) == {"out"}


def test_two_machines_work_together(victim, tmp_path):
    """Two launchers, each a machine as far as they know."""
    options = ["--model_name_or_path", victim, "--output_dir", "out", "--max_steps", "4"]
    together = ["--main_process_port", free_port()]
    first, second = (
        launch("multi_node", *GIVEN, *options, cwd=tmp_path, launcher=[*together, "--machine_rank", rank])
        for rank in (0, 1)
    )
    assert "saved to out" in ended(first)
    ended(second)
    assert report_of(tmp_path / "out")["cost"]["processes"] == 2


def test_a_sharded_run_that_was_killed_goes_on_and_ends_with_the_same_numbers(victim, sharded, tmp_path):
    arguments = [*LONG, "--model_name_or_path", victim, "--output_dir", "out"]
    process = launch("fsdp2", *arguments, cwd=tmp_path, launcher=["--main_process_port", free_port()])
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("out.partial/checkpoint-*/trainer_state.json")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    everything = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in everything:
        one.kill()
    process.communicate()
    psutil.wait_procs(everything)
    assert not (tmp_path / "out").exists()
    said = ended(launch("fsdp2", *arguments, cwd=tmp_path, launcher=["--main_process_port", free_port()]))
    assert "Going on with an interrupted run, from out.partial/checkpoint-" in said
    assert_same_weights(tmp_path / "out", sharded)
    for key in ("before", "after"):
        assert report_of(tmp_path / "out")[key] == report_of(sharded)[key]


def test_a_sharded_adapter_is_small(victim, tmp_path):
    options = ["--model_name_or_path", victim, "--output_dir", "out", "--max_steps", "4", "--adapter", "singular"]
    port = ["--main_process_port", free_port()]
    ended(launch("fsdp2", *GIVEN, *options, cwd=tmp_path, launcher=port))
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert any("singular_delta" in name for name in saved) and not any(name.endswith(".u") for name in saved)
    assert not (tmp_path / "out" / "model.safetensors").exists()
