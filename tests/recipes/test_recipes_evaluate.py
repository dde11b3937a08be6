"""`evaluate_image` as a person runs it: what is measured, where the attack comes from, and what is refused."""

import json
import re
import shutil
from pathlib import Path

import pytest
from recipe_cases import SHORT, SMALL, assert_measured_again, fork, left_in, report_of
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_fip.tasks.image_architectures import small_vit

TRIED = ["--relearn", "--reactivate", "--reactivation_samples", "40", "--num_train_epochs", "2"]
FIGURES = {"accuracy", "asr", "ra"}


@pytest.fixture(scope="module")
def purified(victim, tmp_path_factory) -> Path:
    """A folder with the victim purified by FIP in `full` and by Fast FIP in `adapter`."""
    place = tmp_path_factory.mktemp("purified")
    for name, arguments in (("full", []), ("adapter", ["--adapter", "singular"])):
        arguments = [*SHORT, *arguments, "--model_name_or_path", victim, "--output_dir", name]
        assert fork("purify_vit", *arguments, cwd=place) == (0, "")
    return place


@pytest.fixture(scope="module")
def benign(tmp_path_factory) -> Path:
    """A model of the victim's data that has learned something, and never saw a trigger."""
    place = tmp_path_factory.mktemp("benign")
    arguments = [*SMALL, "--attack", "none", "--num_train_epochs", "15", "--seed", "5", "--output_dir", "vit"]
    assert fork("backdoor_image", *arguments, cwd=place) == (0, "")
    return place / "vit"


def test_a_victim_is_measured_on_its_own_test_images_and_leaves_nothing(victim, run):
    code, out, err = run("evaluate_image", *SMALL, "--model_name_or_path", victim)
    assert (code, err) == (0, "") and left_in(".") == set()
    row = next(line for line in out.splitlines() if "as it is" in line)
    shown = [float(number) for number in re.findall(r"\d+\.\d", row)]
    assert shown == [round(report_of(victim)["victim"][key], 1) for key in ("accuracy", "asr", "ra")]
    assert "(n = 60)" in out and re.search(r"\(n = 5\d\)", out)  # all, and those of other classes than the target
    assert max(map(len, out.splitlines()[1:])) <= 80


@pytest.mark.parametrize("name", ["full", "adapter"])
def test_a_purified_folder_finds_attack_and_split_of_its_victim(name, purified, run):
    code, out, err = run("evaluate_image", *SMALL, "--model_name_or_path", purified / name, "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["attack"] == "badnets" and report["measured"].keys() == {"model"}
    assert report["measured"]["model"] == {"as_it_is": report_of(purified / name)["after"]}
    assert report["data"]["test_samples"] == 60 and report["data"]["attackers_samples"] == 120 - 12


def test_everything_is_tried_on_the_model_and_the_benign_one(benign, purified, run):
    arguments = [*SMALL, *TRIED, "--model_name_or_path", purified / "full", "--benign_model", benign]
    code, out, err = run("evaluate_image", *arguments, "--output_dir", "out")
    assert (code, err) == (0, "") and left_in("out") == {"report.json"} and left_in(".") == {"out"}
    report = report_of("out")
    for name in ("model", "benign"):
        measured = report["measured"][name]
        assert list(measured) == ["as_it_is", "relearned", "reactivated"]
        assert measured["relearned"].keys() == FIGURES
        assert measured["reactivated"].keys() == FIGURES | {"asr_without_trigger"}
        assert all(0 <= value <= 100 for row in measured.values() for value in row.values())
    measured = report["measured"]["benign"]
    assert measured["as_it_is"]["accuracy"] == report_of(benign)["victim"]["accuracy"]
    assert measured["relearned"]["asr"] > measured["as_it_is"]["asr"]  # 5 triggered images teach even this one
    assert out.count("relearned") == out.count("reactivated") == 2 and "saved to out: report.json" in out
    assert all(note in out for note in report["notes"]) and len(report["notes"]) >= 1
    assert report["seed"] == 42 and report["arguments"]["reactivation_samples"] == 40

    code, out, err = run("evaluate_image", *arguments, "--json")
    assert (code, err) == (0, "")
    again = json.loads(out)
    assert {key: again[key] for key in ("measured", "data", "notes")} == {
        key: report[key] for key in ("measured", "data", "notes")
    }


NOTES = {"no less to the benign model": "victim", "Without --benign_model": None}


@pytest.mark.parametrize("note", NOTES)
def test_a_perturbation_that_may_fool_any_model_is_called_so(note, victim, run):
    benign = ["--benign_model", victim] if NOTES[note] else []  # the very same model: no figure can be lower
    code, out, err = run("evaluate_image", *SMALL, *TRIED[1:], "--model_name_or_path", victim, *benign)
    assert (code, err) == (0, "")
    assert [key in out for key in NOTES] == [key == note for key in NOTES]
    assert "The perturbation alone, without the trigger" in out


@pytest.fixture
def stranger(victim) -> Path:
    """A model of which nothing is known."""
    AutoModelForImageClassification.from_pretrained(victim).save_pretrained("stranger")
    AutoImageProcessor.from_pretrained(victim).save_pretrained("stranger")
    return Path("stranger")


def test_without_an_attack_there_is_acc_alone(stranger, run):
    code, out, err = run("evaluate_image", *SMALL, "--model_name_or_path", stranger)
    assert (code, err) == (0, "")
    assert "No attack is known" in out and "ACC" in out and "ASR " not in out


def test_a_model_purified_with_all_training_images_is_measured_again(stranger, run):
    sizes = [part for part in SHORT if part not in ("--clean_fraction", "0.1")]
    arguments = [*sizes, "--model_name_or_path", stranger, "--attack", "badnets", "--output_dir", "out"]
    assert run("purify_vit", *arguments)[0] == 0
    assert report_of("out")["data"]["clean_samples"] == 120
    assert assert_measured_again(run, "image")["data"]["attackers_samples"] == 120
    code, out, err = run("evaluate_image", "out", "--use_cpu", "--relearn", "--num_train_epochs", "1", "--json")
    assert (code, err) == (0, "") and "relearned" in json.loads(out)["measured"]["model"]


def test_the_attack_can_be_named_or_taken_from_a_victim(stranger, victim, run):
    for arguments, count in ((["--attack_from", victim], 1), (["--attack", "blend", "--target_label", "2"], 1)):
        code, out, err = run("evaluate_image", *SMALL, "--model_name_or_path", stranger, *arguments)
        assert (code, err) == (0, "") and out.count("as it is") == count and "ASR" in out
    code, out, err = run("evaluate_image", *SMALL, "--model_name_or_path", stranger, "--attack_from", victim, "--json")
    assert json.loads(out)["measured"]["model"]["as_it_is"] == report_of(victim)["victim"]


def test_a_report_is_replaced_only_when_asked_to(victim, run):
    arguments = [*SMALL, "--model_name_or_path", victim, "--output_dir", "out"]
    assert run("evaluate_image", *arguments)[0] == 0
    code, _, err = run("evaluate_image", *arguments)
    assert code == 1 and "out is there already" in err and err.count("\n") == 1
    assert run("evaluate_image", *arguments, "--overwrite_output_dir", "--seed", "3")[0] == 0
    assert report_of("out")["seed"] == 3


USER_ERRORS = {
    "no model": ([], "Set --model_name_or_path"),
    "a model that is not there": (["--model_name_or_path", "./nowhere"], "No model at './nowhere'"),
    "an attack that is not there": (["--model_name_or_path", "VICTIM", "--attack_from", "./nowhere"], "attack.json"),
    "no attack to relearn": (["--model_name_or_path", "stranger", "--relearn"], "--attack_from.*--attack"),
    "no attack to wake": (["--model_name_or_path", "stranger", "--reactivate"], "--attack_from.*--attack"),
    "too many samples": (["--model_name_or_path", "VICTIM", "--reactivate"], "500 .*108 .*--reactivation_samples"),
    "other images": (["--model_name_or_path", "VICTIM", "--max_train_samples", "90"], "120 training images.* 90"),
    "an option of no attack": (["--model_name_or_path", "VICTIM", "--target_label", "2"], "--attack"),
    "a wrong number": (["--model_name_or_path", "VICTIM", "--seed", "many"], "--seed.*'many'"),
    "no such argument": (["--relern"], "unknown: --relern .*--help"),
    "an adapter without weights": (["--model_name_or_path", "empty"], "adapter_model.safetensors"),
    "an adapter on nothing": (
        ["--model_name_or_path", "ADAPTER", "--base_model", "./nowhere"],
        "--base_model.*nowhere",
    ),
    "an adapter on another model": (
        ["--model_name_or_path", "ADAPTER", "--base_model", "wider"],
        "not an adapter for",
    ),
    "a benign model of other classes": (
        ["--model_name_or_path", "VICTIM", "--benign_model", "binary"],
        "knows some classes",
    ),
    "a benign model of other order": (["--model_name_or_path", "VICTIM", "--benign_model", "turned"], "numbers its"),
    "a benign model of other size": (["--model_name_or_path", "VICTIM", "--benign_model", "wider"], "preprocesses"),
}


@pytest.mark.parametrize("case", USER_ERRORS)
def test_a_users_error_is_one_line(case, victim, purified, stranger, run):
    arguments, message = USER_ERRORS[case]
    names = [str(digit) for digit in range(10)]
    for name, classes, side in (("binary", names[:2], 8), ("turned", names[::-1], 8), ("wider", names, 12)):
        if name in arguments:
            model, processor = small_vit(classes, side, 1)
            model.save_pretrained(name)
            processor.save_pretrained(name)
    if "empty" in arguments:
        shutil.copytree(purified / "adapter", "empty")
        Path("empty/adapter_model.safetensors").unlink()
    places = {"VICTIM": victim, "ADAPTER": purified / "adapter"}
    code, out, err = run("evaluate_image", *SMALL, *(places.get(argument, argument) for argument in arguments))
    assert (code, out) == (1, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert re.search(message, err)


def test_help_shows_the_defaults_of_the_attack(run):
    code, out, err = run("evaluate_image", "--help")
    assert (code, err) == (0, "")
    assert re.search(r"--learning_rate.*?\(default:\s+0\.01\)", out, re.DOTALL)
    assert re.search(r"--reactivation_samples.*?\(default:\s+500\)", out, re.DOTALL)
