"""The audit from the recipe: what comes out, what is said, and what is refused."""

import json
import re
from pathlib import Path

import pytest
from recipe_cases import SHORT, left_in, of_other_data, report_of

QUICK = ["--use_cpu", "--steps", "10"]  # on the data that the victim tells of: 120 digits


def test_the_folder_holds_report_and_picture_and_the_limits_are_said(victim, run):
    code, out, err = run("audit_image", victim, *QUICK)
    assert (code, err) == (0, "")
    assert left_in("outputs/audit") == {"report.json", "plots"} and left_in("outputs/audit/plots") == {"audit.png"}
    report = report_of("outputs/audit")
    assert report["data"] == {"name": "digits", "clean_samples": 12}  # those that the victim kept aside
    assert len(report["model"]["classes"]) == 10 and report["model"]["fisher_trace"] > 0
    assert report["comparison"] is None and report["arguments"]["steps"] == 10
    table = [line for line in out.splitlines() if line[:1] in "┏┃┡│└"]
    assert max(map(len, table)) <= 80
    for said in (
        "12 clean images of digits",
        "raise --steps",
        "small static triggers only",
        "in 33 % of models",
        "saved to outputs/audit",
    ):
        assert said in out


def test_two_models_are_compared_and_an_adapter_is_one(victim, run):
    assert run("purify_vit", *SHORT, "--adapter", "singular", "--model_name_or_path", victim)[0] == 0
    arguments = ["outputs/purify_vit", "--vs", victim, *QUICK, "--classes", "0,3,7", "--json"]
    code, out, err = run("audit_image", *arguments)
    assert (code, err) == (0, "")
    printed = json.loads(out)
    assert printed == report_of("outputs/audit")
    assert printed["models"] == {"received": str(victim), "purified": "outputs/purify_vit"}
    assert [row["label"] for row in printed["purified"]["classes"]] == [0, 3, 7]
    assert printed["received"] != printed["purified"]
    assert printed["comparison"].keys() == {"removed", "left", "new"}


def test_help_states_what_an_audit_cannot_do(run):
    code, out, err = run("audit_image", "--help")
    assert (code, err) == (0, "")
    for said in (
        "MODEL",
        "--vs",
        "--dataset_name",
        "not proven clean",
        "by chance",
        "    python recipes/audit_image.py",
    ):
        assert said in out


USER_ERRORS = {
    "no model": ([], "the following arguments are required: MODEL"),
    "no such model": (["./nowhere"], "No model at './nowhere'"),
    "an adapter without weights": (["adapter"], "adapter has no adapter_model.safetensors"),
    "data that are gone": (["other"], "'./gone'"),
    "no such argument": (["VICTIM", "--step", "3"], "unknown: --step 3"),
    "too few classes": (["VICTIM", "--classes", "0,1"], "at least 3, and got 2"),
    "no such class": (["VICTIM", "--classes", "0,1,10"], "Class 10 is none of the model's"),
    "no number": (["VICTIM", "--classes", "zero"], "--classes zero has to be"),
    "no steps": (["VICTIM", "--steps", "0"], "steps=0"),
    "a foreign folder": (["VICTIM", "--output_dir", "adapter", "--overwrite_output_dir"], "not what an earlier run"),
}


@pytest.mark.parametrize("case", USER_ERRORS)
def test_a_users_error_is_one_line_and_leaves_nothing(case, victim, run):
    arguments, message = USER_ERRORS[case]
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text("{}")
    of_other_data(victim, "other")
    given = [victim if value == "VICTIM" else value for value in arguments]
    code, _, err = run("audit_image", *given[:1], *QUICK, *given[1:])
    assert code == 1 and err.startswith("error: ") and err.count("\n") == 1
    assert re.search(message, err)
    assert left_in(".") <= {"adapter", "other", "outputs"} and not list(Path().glob("outputs/*"))
