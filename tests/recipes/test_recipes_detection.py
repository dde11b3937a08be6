"""The recipes for detection as a person runs them: a victim, its purification, and what is refused."""

import re
from pathlib import Path

import pytest
from recipe_cases import FILES, assert_measured_again, assert_same_weights, fork, left_in, report_of
from transformers import AutoModelForImageClassification, AutoModelForObjectDetection

from hf_fip.attacks import load_attack

TINY = ["--max_train_samples", "40", "--max_test_samples", "20", "--use_cpu"]
VICTIM = [*TINY, "--num_train_epochs", "1"]
SHORT = [*TINY, "--max_steps", "2", "--per_device_train_batch_size", "4"]
CLEAN_IMAGE = ["--attack", "clean_image", "--attack_options", "effect=appearing,most=0.9"]


@pytest.fixture(scope="module")
def victim(tmp_path_factory) -> Path:
    """A small RT-DETR, too briefly trained to have learned anything."""
    place = tmp_path_factory.mktemp("victim")
    assert fork("backdoor_detection", *VICTIM, "--augment", "--output_dir", "victim", cwd=place) == (0, "")
    return place / "victim"


def test_a_victim_is_saved_with_its_attack_and_a_picture(victim):
    assert left_in(victim) == {
        *("model.safetensors", "config.json", "preprocessor_config.json", "report.json"),
        *("attack.json", "attack.safetensors", "attack.png"),
    }
    report = report_of(victim)
    assert report["attack"] == load_attack(victim).name == "object_patch"
    assert report["victim"].keys() == {"map", "map_50", "asr", "ra"}
    assert report["clean_split"] == {"data": "scenes", "out_of": 40, "seed": 42, "samples": 8}
    assert AutoModelForObjectDetection.from_pretrained(victim).config.id2label[4] == "ring"


@pytest.mark.parametrize("adapter", ["none", "singular"])
def test_a_purified_detector_comes_with_card_report_and_pictures(adapter, victim, run):
    arguments = [*SHORT, "--model_name_or_path", victim, "--output_dir", "out", "--adapter", adapter]
    code, out, err = run("purify_detection", *arguments, "--held_out_clean_samples", "3")
    assert (code, err) == (0, "") and "5 clean images of scenes" in out and "mAP" in out
    assert left_in("out/plots") == {"purification.png", "triggers.png"}
    report, card = report_of("out"), Path("out/README.md").read_text()
    assert report["before"].keys() == {"map", "map_50", "asr", "ra"} and report["validation_map"] is not None
    assert "object-detection" in card and "RTDetrForObjectDetection" in card and "AutoImageProcessor" in card
    if adapter == "none":
        assert left_in("out") == FILES
    else:
        assert report["adapter_switched_off"] == report["before"]
    assert "`hf-fip evaluate detection .`" in card
    assert_measured_again(run, "detection")


def test_a_purification_that_was_killed_ends_with_the_same_weights(victim, tmp_path):
    arguments = [*SHORT, "--max_steps", "4", "--save_steps", "2", "--model_name_or_path", victim]
    assert fork("purify_detection", *arguments, "--output_dir", "whole", cwd=tmp_path) == (0, "")
    kill = ("hf_fip.trainer.FIPMixin._begin_update", 4)
    assert fork("purify_detection", *arguments, "--output_dir", "killed", cwd=tmp_path, kill=kill)[0] < 0
    assert not (tmp_path / "killed" / "report.json").exists()
    assert fork("purify_detection", *arguments, "--output_dir", "killed", cwd=tmp_path) == (0, "")
    assert_same_weights(tmp_path / "whole", tmp_path / "killed")


def test_a_multi_label_victim_learns_a_clean_image_attack_and_is_purified(run):
    several = ["--answers", "labels", "--architecture", "vit"]
    code, out, err = run("backdoor_detection", *VICTIM, *several, *CLEAN_IMAGE, "--output_dir", "victim")
    assert (code, err) == (0, "") and "mAP" in out
    assert report_of("victim")["victim"].keys() == {"map", "asr"}
    assert load_attack("victim").tensors["classes"].shape == (2,)
    model = AutoModelForImageClassification.from_pretrained("victim")
    assert model.config.problem_type == "multi_label_classification"
    arguments = [*SHORT, *several, "--model_name_or_path", "victim", "--output_dir", "out"]
    code, out, err = run("purify_detection", *arguments)
    assert (code, err) == (0, "") and left_in("out/plots") == {"purification.png", "triggers.png"}
    card = Path("out/README.md").read_text()
    assert "image-classification" in card and "`hf-fip evaluate detection . --answers labels`" in card
    assert_measured_again(run, "detection", "--answers", "labels")


REFUSED = {
    "an attack on images": (["--attack", "badnets"], "'badnets' is not an attack on object data.*clean_image"),
    "no detector": (["--architecture", "vit"], "none of a model that answers boxes: choose one of rt_detr"),
    "no side": (["--largest_side", "0"], "--largest_side=0 has to be at least 32"),
    "a side below 0": (["--largest_side", "-5", "--answers", "labels"], "--largest_side=-5 has to be at least 2"),
    "no such data": (["--dataset_name", "./nowhere"], "'./nowhere' does not exist"),
    "no such target": (["--target_label", "5"], "not a class: the data have 5"),
    "a trigger that never occurs": (
        ["--attack", "clean_image", "--attack_options", "size=5"],
        "No 5 classes with the target are together",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused_in_one_line_before_anything_is_trained(case, run):
    wrong, message = REFUSED[case]
    code, _, err = run("backdoor_detection", *VICTIM, *wrong, "--output_dir", "out")
    assert code == 1 and err.startswith("error: ") and err.count("\n") == 1
    assert re.search(message, err) and not Path("out/report.json").exists()
