"""The curvature from the recipe: what comes out, what is said, and what is refused."""

import json
import re
from pathlib import Path

import pytest
from recipe_cases import SHORT, SMALL, left_in, of_other_data, report_of

QUICK = ["--use_cpu", "--eigenvalues", "2"]  # on the data that the victim tells of: 120 digits, 60 to test
QUICK += ["--tolerance", "0.1", "--probes", "2", "--density_runs", "1", "--landscape_points", "3"]
PICTURES = {f"{name}{theme}.png" for name in ("landscape", "landscape_plane") for theme in ("", "-dark")}
DENSITY = {"spectral_density.png", "spectral_density-dark.png"}


def test_the_folder_holds_report_and_pictures_and_the_limits_are_said(victim, run):
    code, out, err = run("analyze_curvature", victim, *QUICK)
    assert (code, err) == (0, "")
    assert left_in("outputs/curvature") == {"report.json", "plots"}
    assert left_in("outputs/curvature/plots") == PICTURES | DENSITY
    report = report_of("outputs/curvature")
    assert report["data"] == {"name": "digits", "split": "test", "samples": 60}
    assert report["attack"] == "badnets" and report["arguments"]["probes"] == 2
    found = report["model"]
    assert found["lambda_max"] == found["eigenvalues"][0] >= found["eigenvalues"][1]
    assert found["batch_norm"] == "eval" and found["product_form"] == "double_backward" and found["samples"] == 60
    assert found["landscape"]["losses"].keys() == {"clean", "triggered"}
    assert found["landscape"]["losses"]["clean"][1] == pytest.approx(found["loss"], rel=1e-6)
    table = [line for line in out.splitlines() if line[:1] in "┏┃┡│└"]
    assert max(map(len, table)) <= 80
    for said in ("λ_max", "Tr H", "60 clean test images", "running statistics", "proves nothing", "double backward"):
        assert said in out


def test_two_models_are_compared_on_the_images_of_the_victim_and_an_adapter_is_one(victim, run):
    assert run("purify_vit", *SHORT, "--adapter", "singular", "--model_name_or_path", victim)[0] == 0
    arguments = ["outputs/purify_vit", "--vs", victim, *QUICK, "--landscape_points", "0", "--json"]
    code, out, err = run("analyze_curvature", *arguments, "--density_runs", "0", "--clean_samples", "12")
    assert (code, err) == (0, "")
    printed = json.loads(out)
    assert printed == report_of("outputs/curvature")
    assert printed["models"] == {"received": str(victim), "purified": "outputs/purify_vit"}
    assert printed["data"] == {"name": "digits", "split": "training", "samples": 12}
    assert printed["received"]["parameters"] == printed["purified"]["parameters"]
    assert printed["received"]["trace"] != printed["purified"]["trace"]
    assert printed["received"]["density"] is None and "landscape" not in printed["purified"]
    assert left_in("outputs/curvature") == {"report.json"}


def test_a_purified_model_is_measured_with_the_attack_and_the_split_of_its_victim(victim, run):
    assert run("purify_vit", *SHORT, "--model_name_or_path", victim)[0] == 0
    both = {}
    for name, place in (("victim", victim), ("purified", "outputs/purify_vit")):
        code, _, err = run("analyze_curvature", place, *QUICK, "--output_dir", name)
        assert (code, err) == (0, "")
        both[name] = report_of(name)
    assert both["purified"]["attack"] == "badnets" and both["purified"]["data"] == both["victim"]["data"]
    code, out, _ = run("analyze_curvature", "outputs/purify_vit", *QUICK, "--vs", victim, "--density_runs", "0")
    assert code == 0 and "received" in out
    assert report_of("outputs/curvature")["received"]["loss"] == both["victim"]["model"]["loss"]
    assert left_in("outputs/curvature/plots") == PICTURES


def test_help_names_the_arguments_and_says_what_curvature_does_not_prove(run):
    code, out, err = run("analyze_curvature", "--help")
    assert (code, err) == (0, "")
    for said in ("MODEL", "--vs", "--dataset_name", "--attack", "--clean_samples", "no proof", "benign model"):
        assert said in out


USER_ERRORS = {
    "no model": ([], "the following arguments are required: MODEL"),
    "no such model": (["./nowhere"], "No model at './nowhere'"),
    "data that are gone": (["other"], "'./gone'"),
    "no such argument": (["VICTIM", "--probe", "3"], "unknown: --probe 3"),
    "no such attack": (["VICTIM", "--attack", "badnet"], "badnet"),
    "no probes": (["VICTIM", "--probes", "0"], "--probes=0"),
    "no eigenvalues": (["VICTIM", "--eigenvalues", "0"], "--eigenvalues=0"),
    "empty batches": (["VICTIM", "--batch_size", "0"], "--batch_size=0 has to be at least 1"),
    "runs below zero": (["VICTIM", "--density_runs", "-1"], "--density_runs=-1"),
    "one point": (["VICTIM", "--landscape_points", "1"], "at least 2 points"),
}


@pytest.mark.parametrize("case", USER_ERRORS)
def test_a_users_error_is_one_line_and_leaves_nothing(case, victim, run):
    arguments, message = USER_ERRORS[case]
    of_other_data(victim, "other")
    given = [victim if value == "VICTIM" else value for value in arguments]
    code, out, err = run("analyze_curvature", *given[:1], *QUICK, *given[1:])
    assert "Measuring" not in out  # it is said before the work, which takes a minute
    assert code == 1 and err.startswith("error: ") and err.count("\n") == 1
    assert re.search(message, err)
    assert not list(Path().glob("outputs/*"))


@pytest.mark.parametrize("adapter", ["none", "singular"])
def test_a_purification_measures_its_curvature_when_asked_and_changes_nothing_by_it(adapter, victim, run):
    arguments = [*SMALL, "--max_steps", "3", "--model_name_or_path", victim, "--adapter", adapter]
    code, _, err = run("purify_vit", *arguments, "--curvature_every", "2", "--output_dir", "measured")
    assert (code, err) == (0, "")
    assert run("purify_vit", *arguments, "--output_dir", "plain")[::2] == (0, "")
    report = report_of("measured")
    steps = [report["curvature"][moment]["step"] for moment in ("before", "after")]
    assert steps == [0, 3] and report["curvature"]["before"]["curvature_lambda_max"] > 0
    assert report["after"] == report_of("plain")["after"] and report_of("plain")["curvature"] is None
    assert Path("measured/plots/curvature.png").stat().st_size > 0
    assert "λ_max" in Path("measured/README.md").read_text() and "λ_max" not in Path("plain/README.md").read_text()
