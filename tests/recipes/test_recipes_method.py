"""Purification by another method than FIP: the same command, the same folder, said in report and card."""

import re
from pathlib import Path

import pytest
from recipe_cases import SMALL, report_of


@pytest.mark.parametrize("arguments", [["ft", "--max_steps", "2"], ["clp"]], ids=["trains", "prunes"])
def test_another_method_leaves_the_same_folder_and_says_its_name(arguments, run, tmp_path):
    code, _, err = run("purify_cnn", *SMALL, "--method", *arguments, "--output_dir", "out")
    assert (code, err) == (0, "")
    report = report_of("out")
    assert report["method"] == report["arguments"]["method"] == arguments[0] and report["after"]["asr"] is not None
    card = Path("out/README.md").read_text()
    assert f"after purification with `{arguments[0]}`, to compare FIP with, by hf_fip" in card
    assert {"model.safetensors", "plots"} <= {path.name for path in Path("out").iterdir()}


ERRORS = {
    "no such method": (["--method", "magic"], "invalid choice: 'magic' .*'fip', 'ft'"),
    "an adapter": (["--method", "ft", "--adapter", "singular"], "trains a model's own weights"),
    "an argument of FIP": (["--method", "ft", "--eta_f", "0.5"], "FIP's own"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_does_not_go_together_is_one_line(case, victim, run):
    arguments, message = ERRORS[case]
    code, _, err = run("purify_vit", *SMALL, "--model_name_or_path", victim, *arguments, "--output_dir", "out")
    assert code == 1 and err.startswith("error: ") and err.count("\n") == 1 and re.search(message, err)
    assert not Path("out").exists()
