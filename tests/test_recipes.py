"""The recipes as a person runs them: what comes out, what is said, what is refused, and what a kill leaves."""

import functools
import itertools
import json
import multiprocessing
import os
import pkgutil
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from transformers import AutoModelForImageClassification

from hf_fip.evaluation.backdoor import PurificationCurve
from hf_fip.scripts import purify_image
from hf_fip.tasks.data import load_images

RECIPES = Path(__file__).parents[1] / "recipes"
SMALL = ["--max_train_samples", "120", "--max_test_samples", "60", "--clean_fraction", "0.1", "--use_cpu"]
SHORT = [*SMALL, "--max_steps", "2"]


@pytest.fixture(autouse=True)
def clean_place(tmp_path, monkeypatch):
    """An empty working folder; and what a recipe does to the libraries' chatter is undone."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the runs that the results are compared with
    verbosity = transformers.utils.logging.get_verbosity()
    with warnings.catch_warnings():
        yield
    transformers.utils.logging.set_verbosity(verbosity)
    transformers.utils.logging.enable_progress_bar()
    datasets.enable_caching()
    torch.set_num_threads(threads)


def spawn(*command, cwd) -> subprocess.CompletedProcess:
    """Run Python as a person does."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": ""}
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def execute(name: str, arguments) -> int:
    """Run a recipe in this process; gives its exit code."""
    sys.argv = [f"{name}.py", *map(str, arguments)]
    try:
        runpy.run_path(str(RECIPES / f"{name}.py"), run_name="__main__")
    except SystemExit as stop:
        return stop.code or 0
    return 0


@pytest.fixture
def run(monkeypatch, capfd):
    """Run a recipe in this process: gives exit code, stdout and stderr."""

    def run(name: str, *arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [])  # to be put back
        capfd.readouterr()
        return execute(name, arguments), *capfd.readouterr()

    return run


# Processes of their own, forked from one that has imported everything, so that they can be killed at any point

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["hf_fip.scripts.purify_image", "sklearn.datasets", "matplotlib.figure", "rich.table"])


def fork(name: str, *arguments, cwd, kill: tuple[str, int] | None = None, largest_file: int | None = None):
    """Run a recipe in a process of its own: gives its exit code and stderr.

    Args:
        kill: a function, by its full name, at whose n-th call the process kills itself.
        largest_file: bytes, as if the disk were full beyond.
    """
    arguments = [str(argument) for argument in arguments]
    child = FORKS.Process(target=_child, args=(name, arguments, str(cwd), kill, largest_file))
    child.start()
    child.join(300)
    assert child.exitcode is not None, "the process hangs"
    errors = Path(cwd, "stderr")
    text = errors.read_text()
    errors.unlink()
    return child.exitcode, text


def _child(name, arguments, cwd, kill, largest_file):
    os.chdir(cwd)
    torch.set_num_threads(1)
    os.dup2(os.open("stderr", os.O_WRONLY | os.O_CREAT), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    if kill:
        _kill_at(*kill)
    sys.exit(execute(name, arguments))


def _kill_at(place: str, count: int) -> None:
    owner_name, _, name = place.rpartition(".")
    owner = pkgutil.resolve_name(owner_name)
    original, calls = getattr(owner, name), itertools.count(1)

    @functools.wraps(original)
    def killing(*args, **kwargs):
        if next(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, killing)


@pytest.fixture(scope="module")
def victim(tmp_path_factory) -> Path:
    """A small ViT that keeps 12 clean images aside, with seed 5; too briefly trained to have learned anything."""
    place = tmp_path_factory.mktemp("victim")
    arguments = ["--output_dir", "vit", "--num_train_epochs", "1", "--seed", "5"]
    assert fork("backdoor_image", *SMALL, *arguments, cwd=place) == (0, "")
    return place / "vit"


def report_of(folder) -> dict:
    return json.loads(Path(folder, "report.json").read_text())


def assert_same_weights(one, other) -> None:
    one, other = (load_file(Path(folder, "model.safetensors")) for folder in (one, other))
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)


def left_in(folder) -> set[str]:
    return {path.name for path in Path(folder).iterdir()}


# What comes out


@pytest.fixture(scope="module")
def default_run(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """`python recipes/purify_vit.py`, shortened; its working folder and what it printed."""
    place = tmp_path_factory.mktemp("default")
    done = spawn(RECIPES / "purify_vit.py", *SHORT, cwd=place)
    assert done.returncode == 0, done.stderr
    return place, done


FILES = {"model.safetensors", "config.json", "preprocessor_config.json", "README.md", "report.json", "plots"}
REPORT = {"before", "after", "der", "cost", "arguments", "seed", "versions"}
COST = {"seconds", "seconds_per_step", "trainable_parameters", "peak_memory_bytes"}


def test_the_output_folder_holds_model_card_report_and_pictures_and_nothing_else(default_run):
    place, _ = default_run
    assert left_in(place) == {"outputs"} and left_in(place / "outputs") == {"purify_vit", "victims"}
    out = place / "outputs" / "purify_vit"
    assert left_in(out) == FILES
    assert left_in(out / "plots") == {"purification.png", "triggers.png"}
    model = AutoModelForImageClassification.from_pretrained(out)
    assert model.config.id2label == {i: str(i) for i in range(10)}


def test_the_report_has_every_figure(default_run):
    out = default_run[0] / "outputs" / "purify_vit"
    report = report_of(out)
    assert report.keys() >= REPORT
    for when in ("before", "after"):
        assert report[when].keys() == {"accuracy", "asr", "ra"}
        assert all(0 <= value <= 100 for value in report[when].values())
    asr, acc = (max(0, report["before"][key] - report["after"][key]) for key in ("asr", "accuracy"))
    assert report["der"] == pytest.approx((asr - acc + 100) / 2)
    assert report["cost"].keys() == COST and all(value > 0 for value in report["cost"].values())
    weights = load_file(out / "model.safetensors")
    assert report["cost"]["trainable_parameters"] == sum(tensor.size for tensor in weights.values())
    assert report["cost"]["seconds_per_step"] == pytest.approx(report["cost"]["seconds"] / 2)
    assert report["seed"] == 42 and report["attack"] == "badnets"
    assert report["data"] == {"name": "digits", "clean_samples": 12, "test_samples": 60}
    assert report["arguments"]["max_steps"] == 2 and "output_dir" not in report["arguments"]
    assert {"hf_fip", "torch", "transformers", "datasets", "python"} <= report["versions"].keys()


def test_the_terminal_shows_plain_text_of_80_columns_when_it_is_no_terminal(default_run):
    _, done = default_run
    assert done.stderr == ""
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", done.stdout)
    table = [line for line in done.stdout.splitlines() if line[:1] in "┏┃┡│└"]
    assert len(table) == 8 and max(map(len, table)) <= 80
    for said in (
        "training a small vit with a backdoor first",
        "ACC ",
        "ASR ",
        "RA ",
        "DER ",
        "saved to outputs/purify_vit",
    ):
        assert said in done.stdout


def test_the_card_tells_the_reports_figures(default_run):
    out = default_run[0] / "outputs" / "purify_vit"
    report, card = report_of(out), (out / "README.md").read_text()
    for when in ("before", "after"):
        assert all(f"{value:.1f} %" in card for value in report[when].values())
    for picture in re.findall(r"!\[.*\]\((.*)\)", card):
        assert (out / picture).is_file()


def test_the_victim_is_used_again_and_the_same_seed_gives_the_same_figures(default_run, run, monkeypatch):
    place, _ = default_run
    monkeypatch.chdir(place)
    code, out, err = run("purify_vit", *SHORT, "--output_dir", "outputs/again")
    assert (code, err) == (0, "")
    assert "using the victim that an earlier run trained" in out and "training a small" not in out
    first, second = report_of("outputs/purify_vit"), report_of("outputs/again")
    for key in ("before", "after", "der", "arguments", "versions"):
        assert first[key] == second[key]
    assert_same_weights("outputs/purify_vit", "outputs/again")


ATTACKS = {
    "wanet": ["--attack", "wanet"],
    "blend, all-to-all": ["--attack", "blend", "--attack_options", "alpha=0.3,label_rule=all_to_all"],
    "badnets for class 3": ["--target_label", "3", "--attack_options", "patch_size=2"],
}


@pytest.mark.parametrize("case", ATTACKS)
def test_every_attack_goes_through_and_the_victim_remembers_it(case, run):
    code, out, err = run("purify_cnn", *SHORT, *ATTACKS[case], "--poison_rate", "0.2")
    assert (code, err) == (0, "")
    (victim,) = Path("outputs/victims").iterdir()
    attack = json.loads((victim / "attack.json").read_text())
    assert attack["name"] == case.split(",")[0].split()[0] == report_of("outputs/purify_cnn")["attack"]
    assert attack["options"]["label_rule"] == ("all_to_all" if "all-to-all" in case else "all_to_one")
    assert attack["options"]["target_label"] == (3 if "class 3" in case else 0)
    assert (Path("outputs/purify_cnn/plots") / "triggers.png").is_file()


def test_a_model_of_unknown_attack_gets_acc_alone_and_a_whole_folder(victim, run):
    model = AutoModelForImageClassification.from_pretrained(victim)
    model.save_pretrained("model")
    code, out, err = run("purify_vit", *SHORT, "--model_name_or_path", "model", "--image_processor_name", victim)
    assert (code, err) == (0, "")
    assert "No attack is known" in out and "ASR " not in out
    report = report_of("outputs/purify_vit")
    assert [report[when][key] for when in ("before", "after") for key in ("asr", "ra")] == [None] * 4
    assert report["der"] is None and report["attack"] is None
    assert left_in("outputs/purify_vit") == FILES and left_in("outputs/purify_vit/plots") == {"purification.png"}
    assert "not measured" in Path("outputs/purify_vit/README.md").read_text()


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


def test_two_processes_under_accelerate_make_one_folder(victim, tmp_path):
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    batch = ["--per_device_train_batch_size", "4", "--eta_f", "0.1"]
    done = spawn(*launch, RECIPES / "purify_vit.py", *SHORT, "--model_name_or_path", victim, *batch, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("saved to outputs/purify_vit") == 1
    assert left_in("outputs") == {"purify_vit"} and left_in("outputs/purify_vit") == FILES
    assert report_of("outputs/purify_vit")["before"] == report_of(victim)["victim"]


@pytest.mark.parametrize("name", ["backdoor_image", "purify_vit", "purify_cnn"])
def test_help_explains(name, run):
    code, out, err = run(name, "--help")
    assert (code, err) == (0, "")
    for word in ("--dataset_name", "--eta_f", "handwritten", "    python recipes/", "    accelerate launch recipes/"):
        assert word in out
    assert len(re.findall(r"\(default: ", out)) > 100


def test_a_terminal_sees_a_bar(victim, run, monkeypatch):
    code, _, err = run("purify_vit", *SHORT, "--model_name_or_path", victim, "--disable_tqdm", "false")
    assert code == 0 and "2/2" in err and "task loss" not in err  # logged every ten steps


# What is refused


def spoil_model(folder: Path) -> Path:
    """A model without a classification head."""
    config = transformers.ViTConfig(image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1, num_channels=1)
    config.num_attention_heads = 1
    transformers.ViTModel(config).save_pretrained(folder)
    return folder


USER_ERRORS = {
    "image column": (["--image_column", "photo"], "No column 'photo' .*Set --image_column"),
    "label column": (["--label_column", "y"], "No column 'y' .*Set --label_column"),
    "empty clean split": (["--clean_samples", "0"], "--clean_samples=0"),
    "empty clean fraction": (["--clean_fraction", "0.001"], "--clean_fraction=0.001 of 120 .*empty"),
    "impossible clean fraction": (["--clean_fraction", "1.5"], "--clean_fraction=1.5"),
    "all clean": (["--clean_samples", "120"], "120 out of 120 .*--clean_samples"),
    "no images": (["--dataset_name", "./nowhere"], "'./nowhere' does not exist"),
    "unreadable images": (["--dataset_name", "broken.parquet"], "'broken.parquet' cannot be read"),
    "no model": (["--model_name_or_path", "./nowhere"], "No model at './nowhere'"),
    "no head": (["--model_name_or_path", "headless"], "ViTModel, which lacks the head"),
    "too few classes": (["--model_name_or_path", "binary"], "10 classes and the model answers 2"),
    "no such class": (["--target_label", "10"], "--target_label=10 is not a class"),
    "no such attack": (["--attack", "magic"], "'magic' is not an attack"),
    "no such option": (["--attack_options", "size=3"], "badnets has no option size"),
    "a bad option": (["--attack_options", "patch_size=big"], "patch_size"),
    "no option": (["--attack_options", "patch_size"], "'patch_size' is not name=value"),
    "an option twice": (["--attack_options", "target_label=2"], "target_label is set twice"),
    "no poison": (["--poison_rate", "0.0001"], "is no row at all"),
    "an option of no attack": (["--model_name_or_path", "VICTIM", "--target_label", "2"], "--attack"),
    "NaN": (["--model_name_or_path", "VICTIM", "--learning_rate", "1e30"], "loss is nan|not finite"),
    "NaN after a checkpoint": (
        ["--model_name_or_path", "VICTIM", "--learning_rate", "1e30", "--save_steps", "1", "--eta_f", "0"],
        "loss is nan|not finite",
    ),
    "no such argument": (["--learning_rat", "1"], "unknown: --learning_rat 1 .*--help"),
    "not a number": (["--max_steps", "many"], "argument --max_steps.*'many'"),
    "not a choice": (["--trace_form", "square"], "square.*log_trace"),
    "a wrong setting": (["--eta_f", "-1"], "eta_f=-1.0"),
    "pushing": (["--push_to_hub"], "does not push"),
    "a place under a file": (["--output_dir", "broken.parquet/out"], "broken.parquet is no folder"),
    "a read-only place": (["--model_name_or_path", "VICTIM", "--output_dir", "/proc/out"], "/proc|cannot be made"),
    "a foreign folder": (["--output_dir", "headless", "--overwrite_output_dir"], "not what an earlier run left"),
}


@pytest.mark.parametrize("case", USER_ERRORS)
def test_a_users_error_is_one_line_and_leaves_nothing(case, victim, run):
    arguments, message = USER_ERRORS[case]
    Path("broken.parquet").write_bytes(b"not parquet")
    spoil_model(Path("headless"))
    if "binary" in arguments:
        from hf_fip.tasks.image_classification import small_vit

        model, processor = small_vit(["a", "b"], 8, 1)
        model.save_pretrained("binary")
        processor.save_pretrained("binary")
    found = {str(path) for path in Path().rglob("*")}
    code, _, err = run("purify_vit", *SHORT, *[victim if value == "VICTIM" else value for value in arguments])
    assert code == 1
    assert err.startswith("error: ") and err.count("\n") == 1
    assert re.search(message, err)
    assert {str(path) for path in Path().rglob("*")} - found <= {"outputs", "outputs/victims"}


def test_a_real_command_ends_with_code_1_and_its_one_line(tmp_path):
    done = spawn(RECIPES / "purify_vit.py", "--model_name_or_path", "nobody/nothing", *SHORT, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: No model at 'nobody/nothing'") and done.stderr.count("\n") == 1
    assert left_in(tmp_path) == set()


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


def test_a_full_disk_is_one_line(victim, tmp_path):
    arguments = [*SHORT, "--model_name_or_path", victim, "--output_dir", "out"]
    code, err = fork("purify_vit", *arguments, cwd=tmp_path, largest_file=100_000)  # the weights take 300 kB
    assert code == 1 and err.startswith("error: ") and err.count("\n") == 1
    assert left_in(tmp_path) == set()


# What a kill leaves

LONG = [*SMALL, "--max_steps", "6", "--save_steps", "2", "--per_device_train_batch_size", "4", "--eta_r", "0.1"]
VICTIM = [*SMALL, "--num_train_epochs", "2", "--seed", "5", "--save_strategy", "steps", "--save_steps", "2"]
KILLS = {  # recipe, arguments, the point of the program where it is killed
    "a victim, in training": ("backdoor_image", VICTIM, ("transformers.Trainer.training_step", 4)),
    "in training": ("purify_vit", LONG, ("transformers.Trainer.training_step", 5)),
    "writing a checkpoint": ("purify_vit", LONG, ("transformers.Trainer._save_rng_state", 2)),
    "measuring the result": ("purify_vit", LONG, ("hf_fip.evaluation.backdoor.BackdoorTest.measure", 9)),
    "writing the result": ("purify_vit", LONG, ("hf_fip.scripts.purify_image.make_card", 1)),
    "moving the result": ("purify_vit", LONG, ("hf_fip.scripts.run_folder.RunFolder.publish", 1)),
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, victim):
    """The folders that each recipe leaves when nothing happens to it."""
    place = tmp_path_factory.mktemp("undisturbed")
    for name, arguments in (("backdoor_image", VICTIM), ("purify_vit", [*LONG, "--model_name_or_path", victim])):
        assert fork(name, *arguments, "--output_dir", name, cwd=place) == (0, "")
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
    assert left_in(tmp_path) == {"out"} and left_in("out") == left_in(undisturbed / name)
    assert_same_weights("out", undisturbed / name)
    before, after = report_of("out"), report_of(undisturbed / name)
    for key in ("before", "after", "victim"):
        assert before.get(key) == after.get(key)


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

    with monkeypatch.context() as patch:
        patch.setattr(PurificationCurve, "on_step_end", interrupt)
        code, _, err = run("purify_vit", *arguments)
    assert code == 130 and err.startswith("interrupted: ") and err.count("\n") == 1
    assert left_in(".") == {"out.partial"}
    assert run("purify_vit", *arguments)[0] == 0
    assert_same_weights("out", undisturbed / "purify_vit")


def test_an_unfinished_run_is_discarded_when_asked_to(victim, run, monkeypatch):
    arguments = ["--model_name_or_path", victim, "--output_dir", "out", "--overwrite_output_dir"]

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(purify_image, "make_card", stop)
        assert run("purify_vit", *LONG, *arguments)[0] == 130
    code, out, _ = run("purify_vit", *SHORT, *arguments)
    assert code == 0 and "Going on" not in out
    assert report_of("out")["arguments"]["max_steps"] == 2 and left_in(".") == {"out"}
