"""The recipes as a person runs them: what comes out, what is said, and what is refused."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import transformers
from recipe_cases import FILES, RECIPES, SHORT, SMALL, assert_same_weights, fork, left_in, report_of, spawn
from safetensors.numpy import load_file
from transformers import AutoModelForImageClassification

from hf_fip.scripts.images import ImageTask
from hf_fip.trainer import FIPTrainer

# What comes out


@pytest.fixture(scope="module")
def default_run(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """`python recipes/purify_vit.py`, shortened; its working folder and what it printed."""
    place = tmp_path_factory.mktemp("default")
    done = spawn(RECIPES / "purify_vit.py", *SHORT, cwd=place)
    assert done.returncode == 0, done.stderr
    return place, done


REPORT = {"before", "after", "der", "cost", "arguments", "seed", "versions"}
COST = {"seconds", "seconds_per_step", "trainable_parameters", "peak_memory_bytes", "processes", "file_bytes"}


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
    assert left_in("outputs/purify_vit") == FILES - {"attack"}
    assert left_in("outputs/purify_vit/plots") == {"purification.png"}
    assert "not measured" in Path("outputs/purify_vit/README.md").read_text()


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


DIVERGING = ["--model_name_or_path", "VICTIM", "--learning_rate", "1e30"]
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
    "NaN": ([*DIVERGING, "--max_dropped_updates", "0"], "loss is nan|not finite"),
    "NaN again and again": ([*DIVERGING, "--max_steps", "9"], "in the 5 updates before"),
    "NaN after a checkpoint": (
        [*DIVERGING, "--max_dropped_updates", "0", "--save_steps", "1", "--eta_f", "0"],
        "loss is nan|not finite",
    ),
    "no such argument": (["--learning_rat", "1"], "unknown: --learning_rat 1 .*--help"),
    "not a number": (["--max_steps", "many"], "argument --max_steps.*'many'"),
    "not a choice": (["--trace_form", "square"], "square.*log_trace"),
    "a wrong setting": (["--eta_f", "-1"], "eta_f=-1.0"),
    "held out below zero": (
        ["--held_out_clean_samples", "-3"],
        "--held_out_clean_samples=-3 has to be at least 0",
    ),
    "curvature before each update": (["--curvature_every", "-1"], "--curvature_every=-1 has to be at least 0"),
    "all held out": (
        ["--model_name_or_path", "VICTIM", "--held_out_clean_samples", "12"],
        "_samples=12 leaves none of",
    ),
    "no such tracker here": (["--model_name_or_path", "VICTIM", "--report_to", "wandb"], "wandb to be installed"),
    "pushing without a token": (["--push_to_hub"], "no token for the Hub"),
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
        from hf_fip.tasks.image_architectures import small_vit

        model, processor = small_vit(["a", "b"], 8, 1)
        model.save_pretrained("binary")
        processor.save_pretrained("binary")
    found = {str(path) for path in Path().rglob("*")}
    code, _, err = run("purify_vit", *SHORT, *[victim if value == "VICTIM" else value for value in arguments])
    assert code == 1
    assert err.startswith("error: ") and err.count("\n") == 1
    assert re.search(message, err)
    assert {str(path) for path in Path().rglob("*")} - found <= {"outputs", "outputs/victims"}


def test_held_out_images_that_cannot_be_read_end_the_run_before_it_trains(victim, run, monkeypatch):
    def unreadable(*args):
        raise ValueError("Image 0 of the data set cannot be read")

    monkeypatch.setattr(ImageTask, "clean_test", unreadable)
    monkeypatch.setattr(FIPTrainer, "train", None)
    code, _, err = run("purify_vit", *SHORT, "--model_name_or_path", victim, "--held_out_clean_samples", "3")
    assert code == 1 and err == "error: Image 0 of the data set cannot be read\n"


def test_a_given_model_becomes_a_victim(victim, run):
    given = ["--num_train_epochs", "1", "--attack", "blend", "--output_dir", "out"]
    code, out, err = run("backdoor_image", *SMALL, *given, "--model_name_or_path", victim, "--learning_rate", "0")
    assert (code, err) == (0, "") and "saved to out" in out
    assert_same_weights("out", victim)
    assert report_of("out")["attack"] == "blend"


def test_a_real_command_ends_with_code_1_and_its_one_line(tmp_path):
    done = spawn(RECIPES / "purify_vit.py", "--model_name_or_path", "nobody/nothing", *SHORT, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: No model at 'nobody/nothing'") and done.stderr.count("\n") == 1
    assert left_in(tmp_path) == set()


def test_a_full_disk_is_one_line(victim, tmp_path):
    arguments = [*SHORT, "--model_name_or_path", victim, "--output_dir", "out"]
    code, err = fork("purify_vit", *arguments, cwd=tmp_path, largest_file=100_000)  # the weights take 300 kB
    assert code == 1 and err.startswith("error: ") and err.count("\n") == 1
    assert left_in(tmp_path) == set()
