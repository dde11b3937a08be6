"""The defender's clean split: of the images that the victim was trained without, where its folder tells of them."""

import json
import shutil
from pathlib import Path

from recipe_cases import SHORT, report_of

from hf_fip.scripts.recorded import split_behind
from hf_fip.tasks.data import load_images


def test_the_defender_gets_the_clean_images_that_the_victim_never_saw(victim, run):
    split = report_of(victim)["clean_split"]
    assert split == {"data": "digits", "out_of": 120, "seed": 5, "samples": 12}
    model = ["--model_name_or_path", victim, "--seed", "8"]
    assert run("purify_vit", *SHORT, *model, "--clean_samples", "6")[0] == 0
    assert report_of("outputs/purify_vit")["before"] == report_of(victim)["victim"]  # so the test images are the same
    for wrong, message in (
        (["--clean_samples", "13"], "--clean_samples 12"),
        (["--split_seed", "6"], "--split_seed 5"),
        (["--max_train_samples", "100"], "120 training images, and these are 100"),
    ):
        code, _, err = run("purify_vit", *SHORT, *model, *wrong, "--output_dir", "other")
        assert code == 1 and message in err and err.startswith("error: ") and err.count("\n") == 1


def test_a_given_model_on_other_data_gets_all_their_training_images(victim, run):
    Path("other").mkdir()
    Path("other/README.md").write_text("# digits, with no metadata\n")
    load_images("digits").train.select(range(80)).to_parquet("other/train.parquet")
    code, _, err = run("purify_vit", "--max_steps", "2", "--model_name_or_path", victim, "--dataset_name", "other")
    assert (code, err) == (0, "")
    assert report_of("outputs/purify_vit")["data"] == {
        "name": "other",
        "clean_samples": 60,
        "test_samples": 20,
    }


def test_a_clean_split_that_cannot_be_read_is_not_passed_over(victim, run):
    shutil.copytree(victim, "victim")
    Path("victim/report.json").write_text('{"clean_split": {"seed": 5}}')
    code, _, err = run("purify_vit", *SHORT, "--model_name_or_path", "victim")
    assert code == 1 and "victim/report.json: clean_split is not that" in err and err.count("\n") == 1


def test_what_was_purified_before_still_gets_the_images_that_its_victim_never_saw(victim, run):
    place = victim
    for folder in ("once", "twice", "thrice"):
        arguments = [value for value in SHORT if value not in ("--clean_fraction", "0.1")]
        code, _, err = run("purify_vit", *arguments, "--model_name_or_path", place, "--output_dir", folder)
        assert (code, err) == (0, "")
        report, place = report_of(folder), folder
        assert report["split_seed"] == 5 and report["data"]["clean_samples"] == 12
    report["model"] = "thrice"
    Path("thrice/report.json").write_text(json.dumps(report))  # a circle tells of no victim
    assert run("purify_vit", *arguments, "--model_name_or_path", "thrice", "--output_dir", "out")[0] == 0
    assert report_of("out")["data"]["clean_samples"] == 120


def test_a_report_in_the_folder_here_is_not_that_of_a_model_which_is_not_given(victim, monkeypatch):
    monkeypatch.chdir(victim)
    assert split_behind(".") == report_of(".")["clean_split"]
    assert split_behind(None) is None
