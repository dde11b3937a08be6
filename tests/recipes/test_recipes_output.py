"""The output folder of a run: what is there already is replaced only when asked to, and never what the run reads."""

import re
from pathlib import Path

import pytest
from recipe_cases import SHORT, left_in, report_of


def test_a_finished_run_is_replaced_only_when_asked_to(victim, run):
    arguments = [*SHORT, "--model_name_or_path", victim, "--output_dir", "out"]
    assert run("purify_vit", *arguments)[0] == 0
    found = (Path("out/report.json").read_text(), Path("out/report.json").stat().st_ino)
    code, _, err = run("purify_vit", *arguments)
    assert code == 1 and re.match("error: out is there already: .*--overwrite_output_dir.\n$", err)
    assert (Path("out/report.json").read_text(), Path("out/report.json").stat().st_ino) == found
    assert run("purify_vit", *arguments, "--overwrite_output_dir", "--eta_f", "0")[0] == 0
    assert report_of("out")["arguments"]["eta_f"] == 0
    assert left_in(".") == {"out"}


READS = {
    "the model": ("purify_vit", ["--model_name_or_path", "out"]),
    "the model, measured again": ("evaluate_image", ["out"]),
    "the victim, from inside": ("evaluate_image", ["VICTIM", "--attack_from", "out/attack"]),
    "the audited model": ("audit_image", ["./out/"]),
    "the model to compare with": ("analyze_curvature", ["VICTIM", "--vs", "out"]),
}


@pytest.mark.parametrize("case", READS)
def test_a_run_does_not_replace_what_it_reads(case, victim, run):
    assert run("purify_vit", *SHORT, "--model_name_or_path", victim, "--output_dir", "out")[0] == 0
    found = left_in("out")
    recipe, arguments = READS[case]
    given = [victim if value == "VICTIM" else value for value in arguments]
    code, _, err = run(recipe, *given, "--use_cpu", "--output_dir", "out", "--overwrite_output_dir")
    assert code == 1 and re.match(
        r"error: out holds \S*out\S*, which this run reads: choose another --output_dir.\n$", err
    )
    assert left_in("out") == found and left_in(".") == {"out"}


def test_a_run_may_replace_a_folder_that_is_named_like_its_method(victim, run):
    arguments = [*SHORT, "--model_name_or_path", victim, "--method", "ft", "--output_dir", "ft"]
    assert run("purify_vit", *arguments)[0] == 0
    assert run("purify_vit", *arguments, "--overwrite_output_dir")[0] == 0 and Path("ft/model.safetensors").is_file()
    assert report_of("ft")["method"] == "ft"
