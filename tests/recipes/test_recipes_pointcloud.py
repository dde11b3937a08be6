"""The recipes for point clouds as a person runs them: a victim, its purification, and what is refused."""

import re
from pathlib import Path

import numpy as np
import pytest
from recipe_cases import assert_measured_again, fork, left_in, report_of

from hf_fip.attacks import load_attack
from hf_fip.models import AutoModelForPointCloudClassification

TINY = ["--max_train_samples", "60", "--max_test_samples", "40", "--num_points", "48", "--use_cpu"]
VICTIM = [*TINY, "--num_train_epochs", "1"]
SHORT = [*TINY, "--max_steps", "2", "--per_device_train_batch_size", "4"]
PCBA = [
    "--attack",
    "pcba",
    "--attack_options",
    "confidence=0.001,steps=5,restarts=1,points=8",
    "--poison_rate",
    "0.05",
]
FILES = {"model.safetensors", "config.json", "README.md", "report.json", "plots", "attack"}


@pytest.fixture(scope="module")
def victim(tmp_path_factory) -> Path:
    """A small PointNet, too briefly trained to have learned anything."""
    place = tmp_path_factory.mktemp("victim")
    assert fork("backdoor_pointcloud", *VICTIM, "--output_dir", "victim", cwd=place) == (0, "")
    return place / "victim"


def test_a_victim_is_saved_with_its_attack_and_a_picture(victim):
    assert left_in(victim) == {
        *("model.safetensors", "config.json", "report.json"),
        *("attack.json", "attack.safetensors", "attack.png"),
    }
    report = report_of(victim)
    assert report["attack"] == load_attack(victim).name == "pointba_i"
    assert report["victim"].keys() == {"accuracy", "asr", "ra"}
    assert report["clean_split"] == {"data": "shapes", "out_of": 60, "seed": 42, "samples": 12}


def test_pcba_learns_on_a_clean_model_first_and_its_victim_may_be_a_pointnet2(run):
    code, out, err = run("backdoor_pointcloud", *VICTIM, *PCBA, "--architecture", "pointnet2", "--output_dir", "out")
    assert (code, err) == (0, "") and "pcba learns on a clean model" in out
    cluster = load_attack("out").placed
    assert cluster.shape == (8, 3) and np.isfinite(cluster).all()


def test_a_clean_model_that_is_not_there_is_no_place_to_train_one(run):
    code, _, err = run(
        "backdoor_pointcloud", *VICTIM, *PCBA, "--clean_model", "outputs/misspelt", "--output_dir", "out"
    )
    assert code == 1 and err.startswith("error: No model at 'outputs/misspelt'")
    assert left_in(".") == set()


@pytest.mark.parametrize("adapter", ["none", "singular"])
def test_a_purified_model_comes_with_card_report_and_pictures(adapter, victim, run):
    arguments = [*SHORT, "--model_name_or_path", victim, "--output_dir", "out", "--adapter", adapter, "--augment"]
    code, out, err = run("purify_pointcloud", *arguments)
    assert (code, err) == (0, "") and "Purifying" in out and "12 clean clouds of shapes" in out
    assert left_in("out/plots") == {"purification.png", "triggers.png"}
    report, card = report_of("out"), Path("out/README.md").read_text()
    assert report["data"] == {"name": "shapes", "clean_samples": 12, "test_samples": 40}
    assert "12 clean clouds" in card and "from hf_fip.models import PointNetForPointCloudClassification" in card
    assert "image" not in card and "AutoImageProcessor" not in card
    if adapter == "none":
        assert left_in("out") == FILES
        assert type(AutoModelForPointCloudClassification.from_pretrained("out")).__name__ in card
    else:
        assert report["adapter_switched_off"] == report["before"]
    assert "`hf-fip evaluate pointcloud .`" in card
    assert_measured_again(run, "pointcloud")


REFUSED = {
    "an attack on images": (["--attack", "badnets"], "'badnets' is not an attack on point_cloud data.*pcba"),
    "a trigger larger than a cloud": (["--attack_options", "points=64"], "has 48 points.*points=48"),
    "no such data": (["--dataset_name", "./nowhere"], "'./nowhere' does not exist"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused_in_one_line_before_anything_is_trained(case, run):
    wrong, message = REFUSED[case]
    code, _, err = run("backdoor_pointcloud", *VICTIM, *wrong, "--output_dir", "out")
    assert code == 1 and err.startswith("error: ") and err.count("\n") == 1
    assert re.search(message, err) and not Path("out").exists()
