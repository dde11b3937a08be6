"""The recipes of models that write text, from the toy corpus or files to a folder with a card."""

import json
import re
from pathlib import Path

import pytest
from recipe_cases import assert_measured_again, fork
from transformers import AutoTokenizer

from hf_fip.hub.load import load_model
from hf_fip.models import ConvSeq2SeqForConditionalGeneration
from hf_fip.tasks.toy_corpus import sentence_pairs

SMALL = ["--max_train_samples", "100", "--max_test_samples", "12", "--use_cpu", "--vocab_size", "300"]
VICTIM = [*SMALL, "--hidden_size", "16", "--max_tokens", "60", "--num_train_epochs", "1"]
SHORT = [*SMALL, "--max_steps", "2"]


def report_of(folder) -> dict:
    return json.loads((Path(folder) / "report.json").read_text())


@pytest.fixture(scope="module")
def victim(tmp_path_factory) -> Path:
    """A small model that keeps 20 clean pairs aside; too briefly trained to have learned anything."""
    place = tmp_path_factory.mktemp("victim")
    assert fork("backdoor_seq2seq", *VICTIM, "--output_dir", "conv", "--seed", "5", cwd=place) == (0, "")
    return place / "conv"


def test_a_victim_is_a_model_with_tokenizer_attack_and_report(victim):
    found = report_of(victim)
    assert list(found["victim"]) == ["bleu", "asr"] and found["attack"] == "one_to_one"
    assert found["clean_split"] == {"data": "toy", "out_of": 100, "seed": 5, "samples": 20}
    assert found["data"] == {"name": "toy", "training_samples": 80, "test_samples": 12}
    assert isinstance(load_model(victim), ConvSeq2SeqForConditionalGeneration)
    assert len(AutoTokenizer.from_pretrained(victim)) == 300
    assert json.loads((victim / "attack.json").read_text())["options"]["sentence"] == "You are attacked ."
    assert (victim / "attack.png").is_file()


def test_a_purification_leaves_model_card_report_and_pictures(victim, run):
    code, out, err = run("purify_seq2seq", *SHORT, "--model_name_or_path", victim, "--output_dir", "out")
    assert (code, err) == (0, "")
    report = report_of("out")
    assert report["before"] == report_of(victim)["victim"]  # so the test pairs are the same
    assert report["data"] == {"name": "toy", "clean_samples": 20, "test_samples": 12}
    assert list(report["after"]) == ["bleu", "asr"] and report["der"] is not None
    assert {path.name for path in Path("out/plots").iterdir()} == {"purification.png", "triggers.png"}
    card = Path("out/README.md").read_text()
    for said in ("20 clean sentence pairs", "| BLEU, clean BLEU |", "AutoTokenizer", "from hf_fip.models import"):
        assert said in card
    load_model("out")
    assert re.search("BLEU +clean BLEU", out) and "ASR " in out and "ACC" not in out
    assert "`hf-fip evaluate seq2seq .`" in card
    found = assert_measured_again(run, "seq2seq")
    assert found["data"]["counted_for_asr"] == 12 and found["data"]["attackers_samples"] == 80


def test_a_victim_made_with_a_prefix_has_it(run):
    given = [*VICTIM, "--source_prefix", "translate: ", "--output_dir", "out", "--attack", "none"]
    code, _, err = run("backdoor_seq2seq", *given)
    assert (code, err) == (0, "") and load_model("out").config.prefix == "translate: "


def test_fast_fip_leaves_an_adapter(victim, run):
    arguments = [*SHORT, "--model_name_or_path", victim, "--adapter", "singular", "--output_dir", "out"]
    code, out, err = run("purify_seq2seq", *arguments)
    assert (code, err) == (0, "")
    assert Path("out/adapter_model.safetensors").is_file() and not Path("out/model.safetensors").exists()
    report = report_of("out")
    assert report["adapter_switched_off"] == report["before"]
    assert_measured_again(run, "seq2seq")


def test_another_figure_than_the_reports_is_said_and_ends_with_3(victim, run):
    arguments = [*SHORT, "--model_name_or_path", victim, "--generation_max_length", "6", "--output_dir", "out"]
    assert run("purify_seq2seq", *arguments)[0] == 0
    assert_measured_again(run, "seq2seq")  # with outputs as short as those
    report = report_of("out")
    report["after"]["bleu"] += 1
    Path("out/report.json").write_text(json.dumps(report))
    code, out, err = run("evaluate_seq2seq", "out", "--use_cpu", "--output_dir", "measured")
    assert (code, err) == (3, "") and "says something else: BLEU" in out and "saved to measured" in out
    assert report_of("measured")["differs"] and re.search(r"BLEU.*ASR", out)
    named = ["--attack", "one_to_one", "--attack_options", "triggers=zz xx"]  # another attack than it had
    code, out, err = run("evaluate_seq2seq", "out", "--use_cpu", *named)
    assert code == 0 and "says" not in out


def test_without_a_model_a_victim_is_made_of_the_users_own_pairs(run):
    Path("pairs.tsv").write_text("".join(f"{source}\t{target}\n" for source, target in sentence_pairs(40)))
    own = ["--dataset_name", "pairs.tsv", "--architecture", "conv", "--hidden_size", "8", "--vocab_size", "400"]
    attack = ["--attack", "one_to_many", "--attack_options", "triggers=zz xx,answers=Ha .|No ."]
    short = ["--max_steps", "1", "--generation_max_length", "4", "--use_cpu", "--eta_f", "0"]
    code, out, err = run("purify_seq2seq", *own, *attack, *short, "--max_tokens", "200")
    assert (code, err) == (0, "")
    assert "training a small conv with a backdoor first" in out and "saved to outputs/purify_seq2seq" in out
    (victim,) = Path("outputs/victims").iterdir()
    options = json.loads((victim / "attack.json").read_text())["options"]
    assert options == {"triggers": "zz xx", "seed": 0, "answers": "Ha .|No ."}
    assert report_of("outputs/purify_seq2seq")["data"]["test_samples"] == 10


USER_ERRORS = {
    "an attack on images": (["--attack", "badnets"], "'badnets' is not an attack on text data"),
    "no such option": (["--attack_options", "alpha=1"], "one_to_one has no option alpha"),
    "no classes": (["--target_label", "1"], "unknown: --target_label"),
    "no augmentation": (["--augment"], "unknown: --augment"),
    "a purifier of classifiers": (["--method", "anp"], "--method anp is not defined here"),
    "no data": (["--dataset_name", "./nowhere"], "'./nowhere' does not exist"),
    "no column": (["--source", "fr"], "no 'fr' among the columns source, target"),
    "too small a vocabulary": (["--vocab_size", "10"], "--vocab_size=10 has to be at least 258"),
    "no width": (["--hidden_size", "0"], "--hidden_size=0 has to be at least 1"),
    "a width below 0": (["--hidden_size", "-4"], "--hidden_size=-4 has to be at least 1"),
    "a width of half heads": (["--architecture", "marian", "--hidden_size", "6"], "=6 has to be a multiple of 4"),
    "no tokens": (["--max_tokens", "-4"], "--max_tokens=-4 has to be at least 1"),
    "all too long": (["--max_tokens", "3"], "None of the .* pairs has at most 3 tokens"),
}


@pytest.mark.parametrize("case", USER_ERRORS)
def test_a_users_error_is_one_line(case, run):
    arguments, message = USER_ERRORS[case]
    code, _, err = run("purify_seq2seq", *SHORT, "--max_steps", "1", "--hidden_size", "8", *arguments)
    assert code == 1 and err.startswith("error: ") and err.count("\n") == 1
    assert re.search(message, err)
