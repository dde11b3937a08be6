"""What a kill, Ctrl-C and a full disk leave of a run, and that the same command ends it as if nothing had happened."""

import os
import re
import signal
from pathlib import Path
from unittest.mock import ANY

import pytest
from recipe_cases import SHORT, SMALL, assert_same_weights, fork, left_in, report_of

from hf_fip.evaluation.backdoor import PurificationCurve
from hf_fip.scripts import purification

LONG = [*SMALL, "--max_steps", "6", "--save_steps", "2", "--per_device_train_batch_size", "4", "--eta_r", "0.1"]
FAST = ["--adapter", "singular"]
VICTIM = [*SMALL, "--num_train_epochs", "2", "--seed", "5", "--save_strategy", "steps", "--save_steps", "2"]
KILLS = {  # recipe, arguments, the point of the program where it is killed
    "a victim, in training": ("backdoor_image", VICTIM, ("transformers.Trainer.training_step", 4)),
    "in training": ("purify_vit", LONG, ("transformers.Trainer.training_step", 5)),
    "in training an adapter": ("purify_vit", [*LONG, *FAST], ("transformers.Trainer.training_step", 5)),
    "writing a checkpoint": ("purify_vit", LONG, ("transformers.Trainer._save_rng_state", 2)),
    "measuring the result": ("purify_vit", LONG, ("hf_fip.evaluation.backdoor.BackdoorTest.measure", 9)),
    "writing the result": ("purify_vit", LONG, ("hf_fip.scripts.purification.card_of", 1)),
    "moving the result": ("purify_vit", LONG, ("hf_fip.scripts.run_folder.RunFolder.publish", 1)),
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, victim):
    """The folders that each recipe leaves when nothing happens to it."""
    place = tmp_path_factory.mktemp("undisturbed")
    given = ["--model_name_or_path", victim]
    for folder, name, arguments in (
        ("backdoor_image", "backdoor_image", VICTIM),
        ("purify_vit", "purify_vit", [*LONG, *given]),
        ("adapter", "purify_vit", [*LONG, *FAST, *given]),
    ):
        assert fork(name, *arguments, "--output_dir", folder, cwd=place) == (0, "")
    return place


@pytest.mark.parametrize("case", KILLS)
def test_a_killed_run_goes_on_and_ends_with_the_same_weights(case, victim, undisturbed, run, tmp_path):
    name, arguments, kill = KILLS[case]
    arguments = [*arguments, "--output_dir", "out"]
    if name == "purify_vit":
        arguments += ["--model_name_or_path", victim]
    assert fork(name, *arguments, cwd=tmp_path, kill=kill) == (-signal.SIGKILL, "")
    assert left_in(tmp_path) == {"out.partial"}
    code, _, err = run(name, *arguments, "--learning_rate", "0.001")
    assert code == 1 and "out.partial holds an unfinished run with other arguments" in err
    assert "--overwrite_output_dir" in err
    code, out, err = run(name, *arguments)
    assert (code, err) == (0, "")
    assert re.search(r"Going on with an interrupted run, from out.partial/checkpoint-[246].", out)
    expected = undisturbed / ("adapter" if "adapter" in case else name)
    assert left_in(tmp_path) == {"out"} and left_in("out") == left_in(expected)
    assert_same_weights("out", expected)
    before, after = report_of("out"), report_of(expected)
    for key in ("before", "after", "victim"):
        assert before.get(key) == after.get(key)


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
@pytest.mark.parametrize("case", ["a victim, in training", "in training", "in training an adapter"])
def test_a_run_that_is_told_to_stop_writes_a_checkpoint_first(
    case, number, code, word, victim, undisturbed, run, tmp_path
):
    name, arguments, (place, _) = KILLS[case]
    arguments = [*arguments, "--save_steps", "4", "--output_dir", "out"]
    if name == "purify_vit":
        arguments += ["--model_name_or_path", victim]
    ended, err = fork(name, *arguments, cwd=tmp_path, kill=(place, 3, number))
    assert ended == code and err.startswith(f"{word}: the same command goes on") and err.count("\n") == 1
    assert left_in(tmp_path) == {"out.partial"}
    code, out, err = run(name, *arguments)
    assert (code, err) == (0, "") and "Going on with an interrupted run, from out.partial/checkpoint-3." in out
    assert_same_weights("out", undisturbed / ("adapter" if "adapter" in case else name))


@pytest.mark.parametrize("attack", ["dyn_one", "clb"])
def test_a_killed_victim_that_learns_its_trigger_ends_with_the_same_weights_and_trigger(attack, run, tmp_path):
    options = {"dyn_one": "mask_epochs=1", "clb": "steps=2"}[attack]
    arguments = [*VICTIM, "--attack", attack, "--attack_options", options, "--poison_rate", "0.05"]
    # clb first trains a clean model, of as many steps.
    kill = ("transformers.Trainer.training_step", {"dyn_one": 4, "clb": 8}[attack])
    assert fork("backdoor_image", *arguments, "--output_dir", "whole", cwd=tmp_path) == (0, "")
    assert fork("backdoor_image", *arguments, "--output_dir", "out", cwd=tmp_path, kill=kill) == (-signal.SIGKILL, "")
    code, out, err = run("backdoor_image", *arguments, "--output_dir", "out")
    assert (code, err) == (0, "") and "Going on with an interrupted run" in out
    assert_same_weights("out", "whole")
    assert Path("out/attack.safetensors").read_bytes() == Path("whole/attack.safetensors").read_bytes()


def test_a_victim_killed_inside_a_purification_is_finished_there(run, tmp_path):
    arguments = [*SHORT, "--per_device_train_batch_size", "4"]
    kill = ("hf_fip.evaluation.backdoor.BackdoorTest.measure", 1)
    assert fork("purify_vit", *arguments, cwd=tmp_path, kill=kill) == (-signal.SIGKILL, "")
    (partial,) = Path("outputs/victims").iterdir()
    assert partial.name.endswith(".partial") and left_in("outputs") == {"victims"}
    code, out, err = run("purify_vit", *arguments)
    assert (code, err) == (0, "") and "Going on with an interrupted run, from outputs/victims/" in out
    assert left_in("outputs") == {"victims", "purify_vit"} and len(left_in("outputs/victims")) == 1


def test_ctrl_c_is_one_line_and_the_run_goes_on_later(victim, undisturbed, run, monkeypatch):
    arguments = [*LONG, "--model_name_or_path", victim, "--output_dir", "out"]
    measure = PurificationCurve.on_step_end

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        measure(self, args, state, control, **kwargs)

    found = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores Ctrl-C
    with monkeypatch.context() as patch:
        patch.setattr(PurificationCurve, "on_step_end", interrupt)
        code, _, err = run("purify_vit", *arguments)
    signal.signal(signal.SIGINT, found)
    assert code == 130 and err.startswith("interrupted: ") and err.count("\n") == 1
    assert left_in(".") == {"out.partial"}
    assert run("purify_vit", *arguments)[0] == 0
    assert_same_weights("out", undisturbed / "purify_vit")


def test_a_file_that_breaks_late_costs_no_checkpoint(victim, undisturbed, run, monkeypatch):
    arguments = [*LONG, "--model_name_or_path", victim, "--output_dir", "out"]

    def unreadable(*args, **kwargs):
        raise ValueError("it cannot be read")

    with monkeypatch.context() as patch:
        patch.setattr(purification, "card_of", unreadable)
        assert run("purify_vit", *arguments) == (1, ANY, "error: it cannot be read\n")
    code, out, _ = run("purify_vit", *arguments)
    assert code == 0 and "Going on with an interrupted run" in out
    assert_same_weights("out", undisturbed / "purify_vit")


def test_an_unfinished_run_is_discarded_when_asked_to(victim, run, monkeypatch):
    arguments = ["--model_name_or_path", victim, "--output_dir", "out", "--overwrite_output_dir"]

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(purification, "card_of", stop)
        assert run("purify_vit", *LONG, *arguments)[0] == 130
    code, out, _ = run("purify_vit", *SHORT, *arguments)
    assert code == 0 and "Going on" not in out
    assert report_of("out")["arguments"]["max_steps"] == 2 and left_in(".") == {"out"}
