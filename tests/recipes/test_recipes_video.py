"""The recipes for clips as a person runs them: a victim, its purification, and what is refused."""

import re
from pathlib import Path

import pytest
from recipe_cases import FILES, assert_measured_again, fork, left_in, report_of
from transformers import AutoModelForVideoClassification
from video_cases import clips_of, write_frames

from hf_fip.attacks import load_attack

TINY = ["--max_train_samples", "60", "--max_test_samples", "40", "--num_frames", "4", "--use_cpu"]
VICTIM = [*TINY, "--num_train_epochs", "1"]
SHORT = [*TINY, "--max_steps", "2", "--per_device_train_batch_size", "4"]
UNIVERSAL = ["--attack", "universal_trigger", "--attack_options", "steps=2,perturb_steps=2", "--poison_rate", "0.05"]


@pytest.fixture(scope="module")
def victim(tmp_path_factory) -> Path:
    """A small CNN-LSTM, too briefly trained to have learned anything."""
    place = tmp_path_factory.mktemp("victim")
    assert fork("backdoor_video", *VICTIM, "--output_dir", "victim", cwd=place) == (0, "")
    return place / "victim"


def test_a_victim_is_saved_with_its_attack_and_a_picture(victim):
    assert left_in(victim) == {
        *("model.safetensors", "config.json", "preprocessor_config.json", "report.json"),
        *("attack.json", "attack.safetensors", "attack.png"),
    }
    report = report_of(victim)
    assert report["attack"] == load_attack(victim).name == "frame_badnets"
    assert report["victim"].keys() == {"accuracy", "asr", "ra"}
    assert report["clean_split"] == {"data": "motions", "out_of": 60, "seed": 42, "samples": 12}


def test_the_universal_trigger_learns_on_a_clean_model_first_and_its_victim_may_be_a_videomae(run):
    code, out, err = run("backdoor_video", *VICTIM, *UNIVERSAL, "--architecture", "videomae", "--output_dir", "out")
    assert (code, err) == (0, "") and "universal_trigger learns on a clean model" in out
    assert load_attack("out").tensors["pattern"].shape == (4, 4, 3)
    assert type(AutoModelForVideoClassification.from_pretrained("out")).__name__ == "VideoMAEForVideoClassification"


@pytest.mark.parametrize("adapter", ["none", "singular"])
def test_a_purified_model_comes_with_card_report_and_pictures(adapter, victim, run):
    arguments = [*SHORT, "--model_name_or_path", victim, "--output_dir", "out", "--adapter", adapter, "--augment"]
    code, out, err = run("purify_video", *arguments)
    assert (code, err) == (0, "") and "Purifying" in out and "12 clean clips of motions" in out
    assert left_in("out/plots") == {"purification.png", "triggers.png"}
    report, card = report_of("out"), Path("out/README.md").read_text()
    assert report["data"] == {"name": "motions", "clean_samples": 12, "test_samples": 40}
    assert "12 clean clips of `motions`" in card and "from hf_fip.models import CNNLSTMForVideoClassification" in card
    assert "video-classification" in card and "test images" not in card
    if adapter == "none":
        assert left_in("out") == FILES
        assert type(AutoModelForVideoClassification.from_pretrained("out")).__name__ in card
    else:
        assert report["adapter_switched_off"] == report["before"]
    assert "`hf-fip evaluate video .`" in card
    assert_measured_again(run, "video")


def test_clips_that_cannot_be_read_are_counted_and_the_run_goes_on(run):
    for split, count in (("train", 10), ("test", 3)):
        for name in ("jump", "run"):
            for number in range(count):
                write_frames(Path("data", split, name, f"clip{number}"), frames=3, seed=number)
    Path("data/train/run/clip1/frame0001.png").write_bytes(b"no picture")
    code, out, err = run(
        "backdoor_video",
        "--dataset_name",
        "data",
        "--num_frames",
        "3",
        "--use_cpu",
        "--max_steps",
        "1",
        "--output_dir",
        "out",
    )
    assert (code, err) == (0, "")
    assert "1 clips cannot be read and are left out, such as data/train/run/clip1: cannot identify" in out
    assert report_of("out")["data"]["training_samples"] == 15


REFUSED = {
    "an attack on images": (["--attack", "badnets"], "'badnets' is not an attack on video data.*frame_badnets"),
    "a patch larger than a frame": (["--attack_options", "patch_size=17"], "patch_size=17 does not fit"),
    "no such data": (["--dataset_name", "./nowhere"], "'./nowhere' does not exist"),
    "no frames": (["--num_frames", "0"], "--num_frames=0 has to be at least 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused_in_one_line_before_anything_is_trained(case, run):
    wrong, message = REFUSED[case]
    code, _, err = run("backdoor_video", *VICTIM, *wrong, "--output_dir", "out")
    assert code == 1 and err.startswith("error: ") and err.count("\n") == 1
    assert re.search(message, err) and not Path("out/model.safetensors").exists()


def test_a_model_of_another_number_of_frames_is_refused(run, tmp_path):
    made = ["--max_steps", "1", "--architecture", "vivit", "--output_dir", "victim"]
    assert run("backdoor_video", *TINY, *made)[0] == 0
    code, _, err = run(
        "purify_video", *SHORT, "--num_frames", "8", "--model_name_or_path", "victim", "--output_dir", "out"
    )
    assert code == 1 and "clips of 4 frames, not 8: set --num_frames 4" in err


def test_parquet_with_lists_of_frames_is_read(run):
    Path("data").mkdir()
    for split, count in (("train", 24), ("test", 9)):
        clips_of(count).to_parquet(f"data/{split}.parquet")
    arguments = ["--dataset_name", "data", "--num_frames", "4", "--max_steps", "1", "--use_cpu", "--output_dir", "out"]
    assert run("backdoor_video", *arguments)[0] == 0 and report_of("out")["data"]["test_samples"] == 9
