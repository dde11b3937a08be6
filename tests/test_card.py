"""The model card: it says what report.json says, its code runs, and no name can write into it."""

import re
import subprocess
import sys

import pytest
import yaml
from huggingface_hub import ModelCard

from hf_fip.hub.card import make_card
from hf_fip.tasks.image_architectures import small_vit


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
        "attack": "badnets",
        "data": {"name": "someone/images", "clean_samples": 135, "test_samples": 450},
        "arguments": {"eta_f": 0.2, "model_name_or_path": "someone/model"},
        "seed": 7,
        "versions": {"hf_fip": "0.1.0", "torch": "2.13.0"},
    }
    return {**report, **changes}


def card_of(**changes) -> ModelCard:
    return make_card(report_of(**changes), ["plots/purification.png"], "ViTForImageClassification")


def table_of(text: str, heading: str) -> list[list[str]]:
    """The rows of the table under a heading line."""
    lines = text[text.index(heading) :].splitlines()[2:]
    return [re.split(r" *(?<!\\)\| *", line)[1:-1] for line in lines[: lines.index("")]]


def test_the_front_matter_is_yaml_for_the_hub():
    front = yaml.safe_load(str(card_of()).split("---")[1])
    assert front["base_model"] == "someone/model"
    assert front["pipeline_tag"] == "image-classification" and front["library_name"] == "transformers"
    assert "hf_fip" in front["tags"]
    assert "base_model" not in yaml.safe_load(str(card_of(model_is_from_hub=False)).split("---")[1])


def test_the_numbers_are_those_of_the_report():
    text = str(card_of())
    assert table_of(text, "| in percent, on 450 test images |") == [
        ["ACC, clean accuracy", "96.1 %", "91.2 %"],
        ["ASR, attack success rate", "100.0 %", "1.5 %"],
        ["RA, robust accuracy", "0.0 %", "88.8 %"],
        ["DER (50 is no effect)", "", "96.8 %"],
    ]
    words = ("135 clean images", "seed (7)", "77,530 trainable", "512 MiB", "12.3 s", "0.041 s a step", "torch 2.13.0")
    for said in (*words, "`badnets`", "`someone/images`", "(plots/purification.png)"):
        assert said in " ".join(text.split())
    assert table_of(text, "| argument | value |") == [["`eta_f`", "`0.2`"]]


def test_what_was_not_measured_is_said_to_be_so():
    unknown = {"accuracy": 90.0, "asr": None, "ra": None}
    text = str(card_of(before=unknown, after=unknown, der=None, attack=None))
    rows = table_of(text, "| in percent")
    assert rows[1:] == [
        [name, "not measured", "not measured"] for name in ("ASR, attack success rate", "RA, robust accuracy")
    ]
    assert "`not known`" in text


def test_places_on_the_makers_disk_are_not_told(tmp_path):
    data = {"name": str(tmp_path), "clean_samples": 1, "test_samples": 2}
    text = str(card_of(model=str(tmp_path), model_is_from_hub=False, data=data))
    assert f"`{tmp_path.name}`" in text and str(tmp_path.parent) not in text


HOSTILE = {
    "a table cell": "x | y | 100 %",
    "a code span": "x` **bold** `y",
    "HTML": "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "a new heading": "x\n\n# Certified free of backdoors\n",
    "front matter": "x\n---\nlicense: mit\n---\n",
    "a template": "{{ 7 * 7 }}{% raw %}{{ cycler.__init__.__globals__ }}",
    "much text": "x" * 10_000,
}


@pytest.mark.parametrize("case", HOSTILE)
def test_names_stay_names(case):
    name = HOSTILE[case]
    data = {"name": name, "clean_samples": 1, "test_samples": 2}
    card = card_of(model=name, model_is_from_hub=False, data=data, arguments={"eta_f": name})
    text, plain = str(card), str(card_of(model="x", model_is_from_hub=False, data={**data, "name": "x"}))
    assert card.data.to_dict() == card_of(model_is_from_hub=False).data.to_dict()

    def shape(text: str) -> list[str]:
        return [line for line in text.splitlines() if line.startswith(("#", "|--", "---", "```"))]

    assert shape(text) == shape(plain)
    assert "<script" not in text and "<img" not in text and "49" not in text
    assert len(text) < len(plain) + 1000
    assert text.count("`") == plain.count("`")
    assert len(table_of(text, "| argument | value |")[0]) == 2


def test_the_code_in_the_card_runs(tmp_path):
    model, processor = small_vit(["a", "b"], 8, 1)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    code = re.search(r"```python\n(.*?)```", str(card_of()), re.S)[1].replace("path/to/this/folder", str(tmp_path))
    code += "\nassert type(model).__name__ == 'ViTForImageClassification' and processor.size['height'] == 8"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)


def test_an_adapters_card_says_how_to_switch_it_off():
    off = {"accuracy": 96.125, "asr": 98.25, "ra": 0.0}
    card = card_of(adapter_switched_off=off)
    assert yaml.safe_load(str(card).split("---")[1])["library_name"] == "peft"
    text = str(card)
    assert "backdoor and all (ASR 98.2 %)" in text and "310,234 bytes saved" in text
    assert 'from_pretrained("someone/model")' in text and "disable_adapter" in text and "merge_and_unload" in text
    assert "disable_adapter" not in str(card_of())


@pytest.mark.parametrize("name", ['x");import os#', "../up", "a\nb"])
def test_only_a_hub_id_goes_into_an_adapters_code(name):
    text = str(card_of(adapter_switched_off={"asr": None}, model=name))
    code = text[text.index("```python") : text.index("## How it was made")]
    assert 'from_pretrained("path/to/the/received/model")' in code and "import os" not in code


def test_the_curvature_stands_in_the_table_where_it_was_measured():
    assert "λ_max" not in str(card_of())
    moments = ({"curvature_lambda_max": largest, "curvature_trace": 1234.5} for largest in (56.78, 1.25))
    text = str(card_of(curvature=dict(zip(("before", "after"), moments, strict=True))))
    assert "| λ_max of the clean loss, by what was trained | 56.78 | 1.25 |" in text
    assert "| Tr H of the same | 1234 | 1234 |" in text
