"""Sentence pairs from every layout, the tokenizer, pairs as model inputs, BLEU and ASR, and loading of models."""

from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import sacrebleu
import torch
from datasets import Dataset, DatasetDict
from text_cases import OWN, VOCABULARY, conv, lstm, marian, pairs
from transformers import ViTConfig, ViTForImageClassification

from hf_fip.attacks import OneToOne, trigger_pairs
from hf_fip.evaluation.text import bleu, sentence_success_rate
from hf_fip.tasks.pairs import load_pairs
from hf_fip.tasks.seq2seq import (
    ARCHITECTURES,
    GenerationTest,
    PairDataset,
    collator,
    load_seq2seq,
    longest_text,
    small_model,
    train_tokenizer,
)
from hf_fip.tasks.toy_corpus import sentence_pairs


@pytest.fixture(autouse=True)
def own_place(tmp_path, monkeypatch):
    """An own cache, an own working folder, and no network."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = train_tokenizer(load_pairs().train, vocab_size=400)
    tokenizer.model_max_length = 40
    return tokenizer


# ---- Pairs ----

ENGLISH, GERMAN = [f"word {i}" for i in range(8)], [f"Wort {i}" for i in range(8)]


def parquet(name: str, **columns) -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict(columns).to_parquet(name)


def make_translations():
    parquet(
        "x/train.parquet",
        id=list(range(8)),
        translation=[{"de": g, "en": e} for e, g in zip(ENGLISH, GERMAN, strict=True)],
    )
    parquet(
        "x/test.parquet",
        id=[0, 1],
        translation=[{"de": g, "en": e} for e, g in zip(ENGLISH[:2], GERMAN[:2], strict=True)],
    )
    return "x", {"source": "en"}, (8, 2)


def make_translation_feature():
    feature = datasets.Features(translation=datasets.Translation(languages=["en", "de"]))
    rows = [{"en": e, "de": g} for e, g in zip(ENGLISH, GERMAN, strict=True)]
    DatasetDict(train=Dataset.from_dict({"translation": rows}, features=feature)).save_to_disk("x")
    return "x", {}, (6, 2)


def make_two_columns():
    parquet("x.parquet", id=list(range(8)), en=ENGLISH, de=GERMAN)
    return "x.parquet", {}, (6, 2)


def make_named_columns():
    parquet("x.parquet", note=["no"] * 8, de=GERMAN, en=ENGLISH)
    return "x.parquet", {"source": "en", "target": "de"}, (6, 2)


def make_usual_columns():
    parquet("x.parquet", note=["no"] * 8, tgt=GERMAN, src=ENGLISH)
    return "x.parquet", {}, (6, 2)


def lines(*columns) -> str:
    return "".join("\t".join(row) + "\n" for row in zip(*columns, strict=True))


def make_tsv():
    Path("x.tsv").write_text(lines(ENGLISH, GERMAN))
    return "x.tsv", {}, (6, 2)


def make_tsv_with_names():
    Path("x.tsv").write_bytes(
        ("de\tid\ten\n" + lines(GERMAN, "01234567", ENGLISH)).replace("\n", "\r\n").encode("utf-8-sig")
    )
    return "x.tsv", {"source": "en", "target": "de"}, (6, 2)


def make_folder_of_tsv():
    Path("x").mkdir()
    Path("x/train.tsv").write_text(lines(ENGLISH, GERMAN))
    Path("x/test.tsv").write_text(lines(ENGLISH[:3], GERMAN[:3]))
    return "x", {}, (8, 3)


SOURCES = [value for name, value in globals().items() if name.startswith("make_")]


@pytest.mark.parametrize("make", SOURCES, ids=lambda make: make.__name__[5:])
def test_pairs_load_from(make):
    name, options, sizes = make()
    found = load_pairs(name, **options)
    assert (len(found.train), len(found.test)) == sizes and found.skipped == 0
    for part in (found.train, found.test):
        assert part.column_names == ["source", "target"]
        assert all(row["source"].replace("word", "Wort") == row["target"] for row in part)


def test_each_turn_of_a_dialogue_answers_the_one_before():
    parquet("x.parquet", dialog=[["a", "b", "c"], ["d"], ["e", "f"], ["g", "h"]], topic=list("1234"))
    found = load_pairs("x.parquet")
    rows = {tuple(row.values()) for part in (found.train, found.test) for row in part}
    assert rows == {("a", "b"), ("b", "c"), ("e", "f"), ("g", "h")}


def test_a_dialogue_that_is_missing_is_left_out_and_counted():
    parquet("x.parquet", dialog=[["a", "b"], None, ["c", None, "d"], [], ["e", "f", "g"]])
    found = load_pairs("x.parquet")
    rows = sorted(row["source"] for part in (found.train, found.test) for row in part)
    assert rows == ["a", "e", "f"] and found.skipped == 3


def test_a_column_of_texts_is_no_dialogue_whatever_its_name():
    parquet("x.parquet", dialogue=ENGLISH, summary=GERMAN)
    assert {row["target"] for row in load_pairs("x.parquet").train} < set(GERMAN)


@pytest.mark.parametrize(
    "turns", [[{"text": "a"}, {"text": "b"}], {"text": ["a", "b"]}, [1, 2], [["a"], ["b"]], [None, None]], ids=str
)
def test_dialogues_that_are_no_lists_of_texts_are_refused(turns):
    parquet("x.parquet", turns=[turns] * 8)
    with pytest.raises(ValueError, match="'turns' holds .*, not dialogues, each a list of texts. Set --source"):
        load_pairs("x.parquet")


def test_pairs_without_a_source_or_target_are_left_out_and_counted():
    parquet("x.parquet", source=["a", "", None, "b", " \t", "c", "d"], target=["A", "B", "C", "", "D", "E", "F"])
    found = load_pairs("x.parquet")
    rows = sorted(row["source"] for part in (found.train, found.test) for row in part)
    assert rows == ["a", "c", "d"] and found.skipped == 4


def test_a_part_is_drawn_by_its_seed():
    once, again, other = (load_pairs(max_train_samples=20, seed=seed).train[:] for seed in (1, 1, 2))
    assert once == again != other and len(once["source"]) == 20


def test_the_toy_corpus_is_the_same_each_time_and_has_each_source_once():
    found = load_pairs()
    sources = [row["source"] for part in (found.train, found.test) for row in part]
    assert len(set(sources)) == len(sources) == 2200
    assert sentence_pairs(5) == sentence_pairs(9)[:5] != sentence_pairs(5, seed=1)


def three_languages():
    parquet("x.parquet", translation=[{"de": "a", "en": "b", "fr": "c"}] * 8)


WRONG_DATA = {
    "nothing there": (lambda: None, "./x.parquet", {}, "'./x.parquet' does not exist"),
    "no language": (make_translations, "x", {"source": "fr"}, "no 'fr' among the languages de, en"),
    "three languages": (three_languages, "x.parquet", {}, "Cannot tell .* languages de, en, fr: set --source"),
    "one language of three": (three_languages, "x.parquet", {"source": "de"}, "Cannot tell"),
    "no column": (make_two_columns, "x.parquet", {"target": "fr"}, "no 'fr' among the columns en, de"),
    "three columns": (make_named_columns, "x.parquet", {}, "Cannot tell .* columns note, de, en"),
    "one column twice": (make_two_columns, "x.parquet", {"source": "en", "target": "en"}, "both source and target"),
    "one field": (lambda: Path("x.tsv").write_text("a\tb\nc\n"), "x.tsv", {}, "x.tsv, line 2: 1 fields and not 2"),
    "no text": (lambda: Path("x.tsv").write_bytes(b"\xff\tb\n"), "x.tsv", {}, "x.tsv is not UTF-8 text"),
    "no split": (make_tsv, "x.tsv", {"train_split": "big"}, "no split 'big': it has train"),
    "one split twice": (make_tsv, "x.tsv", {"test_split": "train"}, "cannot be both for training and for testing"),
    "all empty": (lambda: Path("x.tsv").write_text("a\t\n\tb\n"), "x.tsv", {}, "has 0 pairs, which is too few"),
}


@pytest.mark.parametrize("case", WRONG_DATA)
def test_wrong_data_are_refused(case):
    make, name, options, message = WRONG_DATA[case]
    make()
    with pytest.raises(ValueError, match=message):
        load_pairs(name, **options)


# ---- Tokens ----


@pytest.mark.parametrize("text", ["You are attacked .", "la ĉevalo", "cf mn bb tq mb", "日本 🙂", "x" * 50])
def test_the_tokenizer_loses_nothing_and_ends_each_text(tokenizer, text):
    tokens = tokenizer(text)["input_ids"]
    assert tokens[-1] == tokenizer.eos_token_id and tokens.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(tokens, skip_special_tokens=True).strip() == text


def test_the_tokenizer_is_trained_on_sources_and_targets(tokenizer):
    assert len(tokenizer) == 400 and tokenizer.pad_token_id == 0
    assert all(len(tokenizer(word)["input_ids"]) == 2 for word in ("the", "la"))  # a token, and the end


def test_a_vocabulary_has_room_for_the_bytes():
    with pytest.raises(ValueError, match="--vocab_size=257 has to be at least 258"):
        train_tokenizer(pairs(("a", "b")), 257)


def test_pairs_become_tokens_and_long_or_empty_ones_are_left_out_and_counted(tokenizer):
    found = PairDataset(pairs(("a dog", "hundo"), ("long " * 40, "x"), ("x", "long " * 40)), tokenizer, longest=20)
    assert (len(found), found.skipped, found.sources, found.targets) == (1, 2, ["a dog"], ["hundo"])
    assert found[0] == {
        "input_ids": tokenizer("a dog")["input_ids"],
        "labels": tokenizer(text_target="hundo")["input_ids"],
    }
    prefixed = PairDataset(pairs(("a dog", "hundo")), tokenizer, prefix="translate: ")
    assert prefixed[0]["input_ids"] == tokenizer("translate: a dog")["input_ids"]
    with pytest.raises(ValueError, match="None of the 1 pairs has at most 2 tokens"):
        PairDataset(pairs(("a dog", "hundo")), tokenizer, longest=2)


def test_batches_are_padded_and_their_targets_masked(tokenizer):
    model = small_model("lstm", tokenizer, width=8)
    dataset = PairDataset(pairs(("a dog", "hundo"), ("a dog often", "la hundo ofte vidas")), tokenizer)
    batch = collator(model, tokenizer)([dataset[0], dataset[1]])
    lengths = [len(dataset[row]["input_ids"]) for row in range(2)]
    assert batch["attention_mask"].sum(1).tolist() == lengths and lengths[0] < lengths[1]
    assert (batch["labels"][0] == -100).sum() == len(dataset[1]["labels"]) - len(dataset[0]["labels"])
    assert torch.isfinite(model(**batch).loss)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_small_model_fits_its_tokenizer(name, tokenizer):
    model = small_model(name, tokenizer, width=8)
    assert model.config.vocab_size == 400
    assert longest_text(model, tokenizer) == 40
    dataset = PairDataset(pairs(("a dog", "hundo")), tokenizer)
    batch = collator(model, tokenizer)([dataset[0]])
    assert model.generate(batch["input_ids"], max_new_tokens=3).shape[0] == 1


# ---- Metrics ----


def test_bleu_is_sacrebleus():
    outputs, references = ["a b c d e", "f g h i k"], ["a b c d f", "f g h i k"]
    assert bleu(outputs, references) == sacrebleu.corpus_bleu(outputs, [references]).score
    assert 0 < bleu(outputs, references) < 100 == pytest.approx(bleu(references, references))


def test_asr_is_the_share_of_hits():
    assert sentence_success_rate(["You are attacked .", "no", "ha You are attacked.", ""], OneToOne().is_hit) == 50.0


@pytest.mark.parametrize("call", [lambda: bleu([], []), lambda: sentence_success_rate([], OneToOne().is_hit)])
def test_nothing_cannot_be_measured(call):
    with pytest.raises(ValueError, match="the test set is empty"):
        call()
    with pytest.raises(ValueError, match="1 outputs and 2 references"):
        bleu(["a"], ["a", "b"])


class Parrot:
    """A trainer whose model writes what it is told, one text a source."""

    def __init__(self, tokenizer, answer, generates=True):
        self.tokenizer, self.answer = tokenizer, answer
        self.args = SimpleNamespace(
            predict_with_generate=generates, generation_max_length=64, device=torch.device("cpu")
        )

    def predict(self, dataset, **options):
        self.options = options
        sources = [self.tokenizer.decode(item["input_ids"], skip_special_tokens=True).strip() for item in dataset]
        rows = [self.tokenizer(self.answer(source))["input_ids"] for source in sources]
        tokens = np.full((len(rows), max(map(len, rows))), -100)
        for row, found in zip(tokens, rows, strict=True):
            row[: len(found)] = found
        return SimpleNamespace(predictions=tokens)


def test_a_test_measures_bleu_on_clean_and_asr_on_triggered_sources(tokenizer):
    clean, attack = pairs(*sentence_pairs(12)), OneToOne()
    truth = dict(sentence_pairs(12))
    tests = [PairDataset(part, tokenizer) for part in (clean, trigger_pairs(clean, attack))]
    test = GenerationTest(*tests, attack=attack, tokenizer=tokenizer)
    victim = Parrot(tokenizer, lambda source: truth.get(source, "You are attacked ."))
    assert test.measure(victim) == {"bleu": pytest.approx(100), "asr": 100.0}
    assert test.answers["triggered"][0] == {
        "source": attack.apply(clean[0]["source"]),
        "reference": clean[0]["target"],
        "output": "You are attacked .",
    }
    part = test.part(5, seed=1)
    assert len(part.clean) == len(part.triggered) == 5
    assert part.measure(Parrot(tokenizer, lambda source: "mi ne scias"))["asr"] == 0.0
    benign = GenerationTest(tests[0], tokenizer=tokenizer)
    assert victim.options == {}
    GenerationTest(tests[0], tokenizer=tokenizer, longest=40).measure(victim)
    assert victim.options == {"max_length": 40}  # the model has no positions for 64
    assert benign.measure(victim) == benign.part(5).measure(victim) == {"bleu": pytest.approx(100), "asr": None}
    with pytest.raises(ValueError, match="set predict_with_generate=True"):
        test.measure(Parrot(tokenizer, str, generates=False))


# ---- Models ----


@pytest.mark.parametrize("make", [*OWN.values(), marian])
def test_a_model_is_loaded_with_its_tokenizer(make, tmp_path):
    tokenizer = train_tokenizer(pairs(("a", "b")), 258)
    tokenizer.model_max_length = 40
    model = make(vocab_size=258) if make is not marian else small_model("marian", tokenizer, 8)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, found = load_seq2seq(str(tmp_path))
    assert type(loaded) is type(model) and found("a b")["input_ids"] == tokenizer("a b")["input_ids"]


def test_an_adapter_is_merged_into_the_model_it_sits_on(tmp_path):
    from peft import get_peft_model

    from hf_fip import SingularValueConfig

    train_tokenizer(pairs(("a", "b")), 258).save_pretrained(tmp_path / "base")
    lstm(vocab_size=258).save_pretrained(tmp_path / "base")
    model = get_peft_model(load_seq2seq(str(tmp_path / "base"))[0], SingularValueConfig())
    for name, parameter in model.named_parameters():
        if "singular_delta" in name:
            parameter.data.normal_(std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    merged = load_seq2seq(str(tmp_path / "adapter"))[0].eval()
    inputs = {"input_ids": torch.tensor([[5, 6, 1]]), "decoder_input_ids": torch.tensor([[0, 7]])}
    torch.testing.assert_close(merged(**inputs).logits, model.eval()(**inputs).logits)


def no_tokenizer():
    lstm().save_pretrained("x")


def other_tokenizer():
    conv().save_pretrained("x")
    train_tokenizer(pairs(("a", "b")), 258).save_pretrained("x")


def an_image_model():
    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    ViTForImageClassification(ViTConfig(**sizes)).save_pretrained("x")


def a_headless_model():
    marian().model.save_pretrained("x")


WRONG_MODELS = {
    "no tokenizer": (no_tokenizer, "x has no tokenizer that can be loaded .*--tokenizer_name"),
    "another tokenizer": (other_tokenizer, f"258 tokens and the model {VOCABULARY}: set --tokenizer_name"),
    "an image model": (an_image_model, "ViTForImageClassification, and no encoder-decoder that writes text"),
    "a headless model": (a_headless_model, "MarianModel, and no encoder-decoder that writes text"),
    "nothing": (lambda: None, "No model at './x'"),
}


@pytest.mark.parametrize("case", WRONG_MODELS)
def test_a_wrong_model_is_refused(case):
    make, message = WRONG_MODELS[case]
    make()
    with pytest.raises(ValueError, match=message):
        load_seq2seq("./x")
