"""Fast FIP from the recipes: an adapter comes out, is switched off and merged, and is compared with FIP."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel
from recipe_cases import FILES, SHORT, assert_measured_again, left_in, report_of
from safetensors.numpy import load_file
from transformers import AutoModelForImageClassification

from hf_fip import FIPConfig, FIPTrainer, SingularValueConfig
from hf_fip.config import FAST_FIP
from hf_fip.hub.load import load_model
from hf_fip.scripts.demo_app import contents
from hf_fip.scripts.evaluation import OTHER_FIGURES
from hf_fip.scripts.purify_image import FAST_FIP_SETTINGS

ADAPTER = ["--adapter", "singular"]


@pytest.fixture
def purified(victim, run) -> tuple[Path, str]:
    """The folder of an adapter, and what making it printed."""
    code, out, err = run("purify_vit", *SHORT, *ADAPTER, "--model_name_or_path", victim)
    assert (code, err) == (0, "")
    return Path("outputs/purify_vit"), out


def test_the_folder_holds_the_adapter_in_place_of_the_model(purified):
    folder, out = purified
    assert left_in(folder) == {"adapter_model.safetensors", "adapter_config.json", *FILES} - {
        "model.safetensors",
        "config.json",
    }
    assert "saved to outputs/purify_vit: the adapter," in out


def test_the_report_counts_what_is_trained_and_saved(purified, victim):
    folder, out = purified
    report, tensors = report_of(folder), load_file(folder / "adapter_model.safetensors")
    sigma = sum(tensor.size for name, tensor in tensors.items() if name.endswith(".basis.sigma"))
    assert sum(tensor.size for name, tensor in tensors.items() if name.endswith(".singular_delta")) == sigma
    assert report["cost"]["trainable_parameters"] == sum(tensor.size for tensor in tensors.values()) - sigma
    assert report["cost"]["file_bytes"] == (folder / "adapter_model.safetensors").stat().st_size
    assert report["cost"]["file_bytes"] < (victim / "model.safetensors").stat().st_size / 4
    assert report["adapter_switched_off"] == report["before"]
    expected = FAST_FIP | FAST_FIP_SETTINGS["vit"]
    left_out = {"max_steps", "optim"}  # given by this test; FIPConfig's own, and only what differs is recorded
    assert all(report["arguments"][name] == expected[name] for name in expected.keys() - left_out)
    assert PeftConfig.from_pretrained(folder).relative is expected["adapter_relative"]
    assert f"ASR is {report['before']['asr']:.1f} % again" in out


def test_the_defaults_of_fast_fip_give_way_to_arguments(victim, run):
    given = ["--model_name_or_path", victim, "--learning_rate", "0.02", "--adapter_rank", "4"]
    code, _, err = run("purify_vit", *SHORT, "--adapter=singular", *given, "--no_adapter_train_norms")
    assert (code, err) == (0, "")
    arguments = report_of("outputs/purify_vit")["arguments"]
    assert arguments["learning_rate"] == 0.02 and arguments["eta_f"] == FAST_FIP["eta_f"]
    tensors = load_file("outputs/purify_vit/adapter_model.safetensors")
    assert {tensor.shape for tensor in tensors.values()} == {(4,)}


def test_the_cards_code_loads_switches_off_and_merges_the_adapter(purified, victim):
    folder, _ = purified
    card = (folder / "README.md").read_text()
    assert "library_name: peft" in card
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    code = code.replace('place = "."', f'place = "{folder}"').replace("path/to/the/received/model", str(victim))
    pixels = torch.rand(3, 1, 8, 8)
    adapted = PeftModel.from_pretrained(AutoModelForImageClassification.from_pretrained(victim), folder).eval()
    expected = adapted(pixels).logits
    names = {}
    exec(code.replace("    ...", "    off = model.eval()(pixels).logits"), {"pixels": pixels}, names)
    received = AutoModelForImageClassification.from_pretrained(victim).eval()
    assert torch.equal(names["off"], received(pixels).logits)
    torch.testing.assert_close(names["model"].eval()(pixels).logits, expected, rtol=1e-4, atol=1e-5)
    assert type(names["model"]) is type(received)


HUB_ID, COMMITS = "someone/received", {"v1": "1" * 40, "main": "2" * 40}


@pytest.fixture
def downloads(victim, monkeypatch) -> Path:
    """Where the Hub's downloads are kept, with two revisions of a model: the victim, and one of other weights."""
    model = AutoModelForImageClassification.from_pretrained(victim)
    folder = Path("downloads", f"models--{HUB_ID.replace('/', '--')}").absolute()
    for revision, commit in COMMITS.items():
        model.save_pretrained(folder / "snapshots" / commit)
        shutil.copy(victim / "preprocessor_config.json", folder / "snapshots" / commit)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / revision).write_text(commit)
        model.vit.embeddings.position_embeddings.data.neg_()
        model.classifier.weight.data.neg_()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder.parent))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return folder


@pytest.mark.parametrize("recorded_in", ["adapter_config.json", "report.json"])
def test_an_adapter_is_loaded_on_the_commit_it_was_made_on(recorded_in, downloads, run):
    given = ["--model_name_or_path", HUB_ID, "--model_revision", "v1", "--attack", "badnets", "--output_dir", "out"]
    code, _, err = run("purify_vit", *SHORT, *ADAPTER, *given)
    assert code == 0, err
    config = json.loads(Path("out/adapter_config.json").read_text())
    assert config["revision"] == report_of("out")["received"]["revision"] == COMMITS["v1"]
    assert f'from_pretrained("{HUB_ID}", revision="{COMMITS["v1"]}", use_safe' in Path("out/README.md").read_text()
    if recorded_in == "report.json":  # as an older version left it
        Path("out/adapter_config.json").write_text(json.dumps(config | {"revision": None}))
    assert_measured_again(run, "image")
    shown = contents("out")["pair"].models["received"].classifier.weight
    first = load_file(downloads / "snapshots" / COMMITS["v1"] / "model.safetensors")
    assert torch.equal(shown, torch.from_numpy(first["classifier.weight"]))
    assert run("evaluate_image", "out", "--use_cpu", "--model_revision", "main")[0] == OTHER_FIGURES


def test_a_trainers_adapter_and_card_name_the_commit_of_the_model(downloads):
    model = load_model(HUB_ID, revision="v1")
    trainer = FIPTrainer(model, FIPConfig("out", eta_f=0.0, use_cpu=True), peft_config=SingularValueConfig())
    trainer.save_model()
    trainer.create_model_card()
    assert PeftConfig.from_pretrained("out").revision == report_of("out")["received"]["revision"] == COMMITS["v1"]


def test_runs_are_compared_side_by_side(purified, victim, run):
    folder, _ = purified
    shutil.move(folder, "fast")
    assert run("purify_vit", *SHORT, "--model_name_or_path", victim, "--output_dir", "full")[0] == 0
    code, out, err = run("compare_runs", "full", "fast")
    assert (code, err) == (0, "") and "warning" not in out
    assert max(map(len, out.splitlines())) <= 80
    for name in ("full", "fast"):
        report = report_of(name)
        row = next(line for line in out.splitlines() if name in line)
        for shown in (f"{report['after']['accuracy']:.1f}", f"{report['cost']['trainable_parameters']:,}"):
            assert shown in row
    received = next(line for line in out.splitlines() if "received" in line)
    assert f"{report_of('full')['before']['asr']:.1f}" in received


WRONG = {
    "options of no adapter": (["--adapter_rank", "3"], "--adapter singular"),
    "no such layer": ([*ADAPTER, "--adapter_target_modules", "nowhere"], "nowhere"),
    "no such adapter": (["--adapter", "lora"], "lora.*singular"),
    "too large a rank": ([*ADAPTER, "--adapter_rank", "1000"], "rank=1000"),
    "no rank": ([*ADAPTER, "--adapter_rank", "0"], "rank=0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_adapter_is_one_line_and_leaves_nothing(case, victim, run):
    arguments, message = WRONG[case]
    code, _, err = run("purify_vit", *SHORT, *arguments, "--model_name_or_path", victim)
    assert code == 1 and err.startswith("error: ") and err.count("\n") == 1
    assert re.search(message, err) and left_in(".") <= {"outputs"}


def test_runs_of_one_name_are_told_apart_and_the_folder_here_has_one(purified, run, monkeypatch):
    for place in ("a/fip", "b/fip", "other"):
        shutil.copytree(purified[0], place)
    _, out, _ = run("compare_runs", "a/fip", "b/fip", "other")
    assert [name in out for name in ("│ a/fip ", "│ b/fip ", "│ other ")] == 3 * [True]
    monkeypatch.setenv("COLUMNS", "40")
    assert run("compare_runs", "a/fip", "b/fip", "other")[1] == out  # and no figure is cut
    monkeypatch.chdir("a/fip")
    assert "│ fip " in run("compare_runs", ".")[1]


def test_comparing_what_is_no_run_is_refused(victim, run):
    code, _, err = run("compare_runs", "nowhere")
    assert code == 1 and "nowhere is not what a purify recipe left" in err and err.count("\n") == 1
    assert run("compare_runs", victim)[0] == 1
