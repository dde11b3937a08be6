"""The model card: it says what report.json says, its code runs, no name writes into it, and the examples are true."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from hf_fip.hub.card import card_of, make_card, provenance
from hf_fip.hub.text import in_markdown, one_line, visible, without_tokens
from hf_fip.scripts.detection import DetectionTask, MultiLabelTask
from hf_fip.scripts.sentences import TextTask
from hf_fip.tasks.image_architectures import small_vit

EXAMPLES = sorted(Path(__file__).parents[1].glob("model_cards/*/report.json"))


def report_of(**changes) -> dict:
    report = {
        "before": {"accuracy": 96.125, "asr": 100.0, "ra": 0.0},
        "after": {"accuracy": 91.25, "asr": 1.5, "ra": 88.75},
        "der": 96.8125,
        "cost": {
            "seconds": 12.34,
            "seconds_per_step": 0.0413,
            "trainable_parameters": 77530,
            "peak_memory_bytes": 512 * 2**20,
            "file_bytes": 310234,
        },
        "adapter_switched_off": None,
        "curvature": None,
        "method": "fip",
        "model": "someone/model",
        "model_is_from_hub": True,
        "received": {
            "revision": "0123abc",
            "sha256": "fe" * 32,
            "license": "apache-2.0",
            "license_name": None,
            "license_link": None,
        },
        "attack": "badnets",
        "data": {"name": "someone/images", "clean_samples": 135, "test_samples": 450},
        "card": {
            "class": "ViTForImageClassification",
            "library": "transformers",
            "processor_class": "AutoImageProcessor",
            "pipeline_tag": "image-classification",
            "samples": "images",
            "denominator": "ASR is over triggered images.",
        },
        "arguments": {"eta_f": 0.2, "model_name_or_path": "someone/model"},
        "seed": 7,
        "versions": {"hf_fip": "0.1.0", "torch": "2.13.0"},
    }
    return {**report, **changes}


def card_from(place: str = ".", **changes) -> ModelCard:
    return make_card(report_of(**changes), ["plots/purification.png"], "purified", place)


def metadata_of(card: ModelCard) -> dict:
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", str(card), re.DOTALL)[1])


def table_of(text: str, heading: str) -> list[list[str]]:
    """The rows of the table under a heading line."""
    lines = text[text.index(heading) :].splitlines()[2:]
    return [re.split(r" *(?<!\\)\| *", line)[1:-1] for line in lines[: lines.index("")]]


@pytest.mark.parametrize("task", [DetectionTask, MultiLabelTask, TextTask], ids=lambda task: task.__name__)
def test_what_the_measures_are_over_is_said_to_the_end(task):
    card = card_from(card={**report_of()["card"], "denominator": task.words.denominator})
    assert len(task.words.denominator) > 150 and f"\n{task.words.denominator} No setting" in str(card)


def code_of(text: str) -> str:
    return re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]


# What it says


def test_the_metadata_are_what_the_hub_reads():
    front = metadata_of(card_from())
    assert front["base_model"] == "someone/model" and front["base_model_relation"] == "finetune"
    assert front["pipeline_tag"] == "image-classification" and front["library_name"] == "transformers"
    assert front["license"] == "apache-2.0" and "hf_fip" in front["tags"]
    local = metadata_of(card_from(model_is_from_hub=False))
    assert not {"base_model", "base_model_relation"} & local.keys()
    adapter = metadata_of(card_from(adapter_switched_off={"asr": 100.0}))
    assert adapter["base_model_relation"] == "adapter" and adapter["library_name"] == "peft"


def test_the_model_index_holds_the_figures_of_the_report():
    (model,) = metadata_of(card_from())["model-index"]
    (result,) = model["results"]
    assert model["name"] == "purified" and result["task"]["type"] == "image-classification"
    assert result["dataset"]["type"] == "someone/images"
    found = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert found == {
        "accuracy": 91.25,
        "attack_success_rate": 1.5,
        "robust_accuracy": 88.75,
        "defense_effectiveness_rating": 96.8125,
    }


def test_the_numbers_are_those_of_the_report():
    text = str(card_from())
    assert table_of(text, "| on 450 test images |") == [
        ["ACC, clean accuracy", "96.1 %", "91.2 %"],
        ["ASR, attack success rate", "100.0 %", "1.5 %"],
        ["RA, robust accuracy", "0.0 %", "88.8 %"],
        ["DER, defense effectiveness (50 is no effect)", "", "96.8 %"],
    ]
    words = (
        "135 clean images",
        "| seed | 7",
        "77,530 trainable",
        "512 MiB",
        "12.3 s",
        "0.041 s a step",
        "torch 2.13.0",
    )
    for said in (*words, "`badnets`", "`someone/images`", "(plots/purification.png)", "`0123abc`", "fe" * 32):
        assert said in " ".join(text.split())
    assert table_of(text, "| argument | value |") == [["`eta_f`", "`0.2`"]]


@pytest.mark.parametrize("place", [".", "someone/purified"])
def test_the_command_that_measures_again_names_the_model(place):
    words = report_of()["card"] | {"evaluate": "detection --answers labels"}
    assert f"`hf-fip evaluate detection {place} --answers labels` measures" in str(card_from(place, card=words))


def test_what_was_not_measured_is_said_to_be_so():
    unknown = {"accuracy": 90.0, "asr": None, "ra": None}
    card = card_from(before=unknown, after=unknown, der=None, attack=None)
    rows = table_of(str(card), "| on 450")
    assert rows[1:] == [
        [name, "not measured", "not measured"] for name in ("ASR, attack success rate", "RA, robust accuracy")
    ]
    assert "`not known`" in str(card) and len(metadata_of(card)["model-index"][0]["results"][0]["metrics"]) == 1


def test_places_on_the_makers_disk_are_not_told(tmp_path):
    data = {"name": str(tmp_path), "clean_samples": 1, "test_samples": 2}
    text = str(card_from(model=str(tmp_path), model_is_from_hub=False, data=data))
    assert f"`{tmp_path.name}`" in text and str(tmp_path.parent) not in text


def test_an_adapters_card_says_how_to_switch_it_off():
    text = str(card_from(adapter_switched_off={"accuracy": 96.125, "asr": 98.25, "ra": 0.0}))
    assert "backdoor and all (ASR 98.2 %)" in text and "310,234 bytes saved" in text
    assert 'from_pretrained("someone/model", revision="0123abc", use_safetensors=True)' in text
    assert "disable_adapter" in text and "merge_and_unload" in text
    assert "disable_adapter" not in str(card_from())


def test_the_curvature_stands_in_the_table_where_it_was_measured():
    assert "λ_max" not in str(card_from())
    moments = ({"curvature_lambda_max": largest, "curvature_trace": 1234.5} for largest in (56.78, 1.25))
    text = str(card_from(curvature=dict(zip(("before", "after"), moments, strict=True))))
    assert "| λ_max of the clean loss, by what was trained | 56.78 | 1.25 |" in text
    assert "| Tr H of the same | 1234 | 1234 |" in text


@pytest.mark.parametrize(
    ("said", "license"),
    {
        "license: mit": "mit",
        "license: other\nlicense_name: x y": "other",
        "license: [1": None,
        "license: a b": None,
    }.items(),
)
def test_the_licence_is_that_of_the_received_model(said, license, tmp_path):
    (tmp_path / "README.md").write_text(f"---\n{said}\n---\n# A model\n")
    found = provenance(tmp_path)
    assert found["license"] == license and found["revision"] is None and len(found["sha256"]) == 64


# What names can do to it: nothing

HOSTILE = {
    "a table cell": "x | y | 100 %",
    "a code span": "x` **bold** `y",
    "HTML": "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "a new heading": "x\n\n# Certified free of backdoors\n",
    "front matter": "x\n---\nlicense: mit\n---\n",
    "a template": "{{ 7 * 7 }}{% raw %}{{ cycler.__init__.__globals__ }}",
    "YAML": "x: !!python/object/apply:os.system ['true']",
    "ANSI": "\x1b[2J\x1b]0;title\x07x\x9b31m",
    "right to left": "x\u202egnp.exe\u2066",
    "a code fence": "x\n```\n# out\n```python\n",
    "much text": "x" * 10_000_000,
}


@pytest.mark.parametrize("case", HOSTILE)
def test_names_stay_names(case):
    name = HOSTILE[case]

    def card_named(name: str) -> ModelCard:
        data = {"name": name, "clean_samples": 1, "test_samples": 2}
        return card_from(model=name, model_is_from_hub=False, data=data, attack=name, arguments={"eta_f": name})

    text, plain = str(card_named(name)), str(card_named("x"))

    def shape(text: str) -> list[str]:
        return [line for line in text.splitlines() if line.startswith(("#", "|--", "---", "```"))]

    assert shape(text) == shape(plain) and metadata_of(card_named(name)).keys() == metadata_of(card_named("x")).keys()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x9b\u202e\u2066]", text) and len(text) < len(plain) + 3000
    body, plain_body = (text.split("\n---\n", 1)[1] for text in (text, plain))
    assert "<script" not in body and "<img" not in body and "49" not in body
    assert body.count("`") == plain_body.count("`")
    assert len(table_of(text, "| argument | value |")[0]) == 2


@pytest.mark.parametrize("text", ["![x](http://evil.example/x.png)", "[x](//evil.example)", "[[x]](//evil)"])
def test_no_text_of_a_card_makes_a_picture_or_a_link(text):
    words = report_of()["card"] | {"samples": text, "denominator": text}
    card = make_card(report_of(card=words, versions={text: text}), [], text)
    assert not places_in(str(card).split("\n---\n", 1)[1])


def test_no_text_gives_the_place_of_a_picture_that_stands_elsewhere():
    text, picture = "[x]: //evil", "\n\n![x]"
    assert places_in(text + picture) and not places_in(in_markdown(text) + picture)


def test_pictures_with_other_names_are_left_out(tmp_path):
    (tmp_path / "plots").mkdir()
    for name in ("triggers.png", "x](https:evil) ![y.png", "a b.png"):
        (tmp_path / "plots" / name).touch()
    (tmp_path / "report.json").write_text(json.dumps(report_of()))
    assert places_in(str(card_of(tmp_path)).split("\n---\n", 1)[1]) == ["plots/triggers.png"]


def places_in(text: str) -> list[str]:
    """What a page made of Markdown loads or links to."""
    page = pytest.importorskip("markdown_it").MarkdownIt().enable("table").render(text)
    return re.findall(r'<(?:img src|a href)="([^"]*)"', page)


@pytest.mark.parametrize("name", ['x");import os#', "../up", "a\nb"])
def test_only_a_hub_id_goes_into_code(name):
    for card in (card_from(adapter_switched_off={"asr": None}, model=name), card_from(place=name)):
        code = code_of(str(card))
        assert "import os" not in code and name not in code
        compile(code, "card", "exec")


CODE = {"class": "X\nimport os", "library": "os", "processor_class": "exit();X"}


@pytest.mark.parametrize("key", CODE)
def test_nothing_but_a_class_goes_into_code(key):
    with pytest.raises(ValueError, match="is no name of a class|is not a library"):
        card_from(card=report_of()["card"] | {key: CODE[key]})


def test_text_that_a_terminal_would_obey_is_made_visible():
    assert visible("a\x1b[31mb\n\tc") == "a�[31mb\n\tc" and one_line("a \x00\n\nb\u202e") == "a � b�"
    assert len(one_line("y" * 10_000_000)) == 200


def test_no_token_is_told(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "my own token")
    assert without_tokens("my own token, hf_abcdefghijkl") == "hf_***, hf_***"


# What it is for: its code runs, and the examples are true


def test_the_code_in_the_card_runs_in_its_folder(tmp_path):
    model, processor = small_vit(["a", "b"], 8, 1)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    code = code_of(str(card_from()))
    code += "\nassert type(model).__name__ == 'ViTForImageClassification' and processor.size['height'] == 8"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=300, cwd=tmp_path)


def test_a_card_claims_no_blind_choice_where_a_checkpoint_was_chosen():
    chosen = {"metric_for_best_model": "loss", "load_best_model_at_end": True}
    assert "was chosen by ASR or on the test" in str(card_from())
    assert "was chosen" not in str(card_from(arguments=chosen))


def test_a_report_of_another_kind_is_refused(tmp_path):
    (tmp_path / "report.json").write_text('{"victim": {}}')
    with pytest.raises(ValueError, match="not the report of a purification by this version"):
        card_of(tmp_path)


@pytest.mark.parametrize("report", EXAMPLES, ids=lambda path: path.parent.name)
def test_the_examples_are_what_is_written_today(report, tmp_path):
    place = tmp_path / report.parent.name
    shutil.copytree(report.parent, place)
    assert str(card_of(place)) == (report.parent / "README.md").read_text(encoding="utf-8")


def test_there_are_examples_of_a_model_and_of_an_adapter():
    assert {json.loads(path.read_text())["adapter_switched_off"] is None for path in EXAMPLES} == {True, False}
