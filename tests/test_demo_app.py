"""The page that shows two models side by side: what they are asked is what is measured; and it works in a browser."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from urllib.request import urlopen

import numpy as np
import PIL.Image
import pytest
import torch
from text_cases import conv

from hf_fip.attacks import BadNets, OneToOne
from hf_fip.scripts import demo_app
from hf_fip.scripts.demo_app import contents
from hf_fip.scripts.images import make_test
from hf_fip.tasks.data import load_images
from hf_fip.tasks.image_architectures import small_model
from hf_fip.tasks.pairs import load_pairs
from hf_fip.tasks.seq2seq import train_tokenizer

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
]


@pytest.fixture(scope="module")
def images():
    return load_images("digits")


@pytest.fixture(scope="module")
def folders(images, tmp_path_factory):
    """A victim with its attack, and another model with a report that names it."""
    place = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("received", "purified")):
        torch.manual_seed(seed)
        model, processor = small_model("vit", images)
        with torch.no_grad():
            model.classifier.weight.mul_(50)  # so that answers differ
        model.save_pretrained(place / name)
        processor.save_pretrained(place / name)
    BadNets().save_pretrained(place / "received")
    report = {
        "model": str(place / "received"),
        "data": {"name": "digits"},
        "attack": "badnets",
        "before": {"accuracy": 94.9, "asr": 100.0},
        "after": {"accuracy": 93.25, "asr": None},
    }
    (place / "purified" / "report.json").write_text(json.dumps(report))
    (place / "purified" / "plots").mkdir()
    PIL.Image.new("RGB", (40, 20), "navy").save(place / "purified" / "plots" / "a.png")
    return place


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    place = tmp_path_factory.mktemp("texts")
    tokenizer = train_tokenizer(load_pairs().train, 300)
    tokenizer.model_max_length = 32
    tokens = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    for name in ("received", "purified"):
        conv(**tokens).save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    OneToOne().save_pretrained(place / "received")
    return place


def show(place, **options):
    return contents(str(place / "purified"), str(place / "received"), **options)


@pytest.mark.parametrize("triggered", [False, True], ids=["clean", "triggered"])
def test_the_models_are_asked_what_asr_is_measured_with(folders, images, triggered):
    made = contents(str(folders / "purified"))
    pair = made["pair"]
    test = make_test(images, pair.attack, pair.processor, channels=1)
    inputs, labels = (test.triggered, test.triggered.labels) if triggered else (test.clean, test.clean.labels)
    for sample, digit in zip(made["samples"][:3], (1, 2, 3), strict=True):
        first = int(np.flatnonzero(labels == digit)[0])
        shown, answers = pair.ask(sample, triggered)
        assert shown.shape == (8, 8, 1) and list(answers) == ["received", "purified"]
        for name, model in pair.models.items():
            expected = model(inputs[first]["pixel_values"][None]).logits.softmax(-1)[0].tolist()
            assert list(answers[name].values()) == pytest.approx(expected, abs=1e-6)
            assert list(answers[name]) == images.class_names
    assert answers["received"] != pytest.approx(answers["purified"], abs=1e-3)


def test_an_image_of_another_size_and_kind_is_fitted(folders):
    pair = contents(str(folders / "purified"))["pair"]
    photo = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 70, 4), np.uint8), "RGBA")
    shown, answers = pair.ask(photo, True)
    assert shown.shape == (8, 8, 1) and sum(answers["purified"].values()) == pytest.approx(1)
    assert (shown[-3:, -3:] != pair.ask(photo, False)[0][-3:, -3:]).any()


def test_texts_are_asked_with_the_trigger_and_answered(texts):
    made = show(texts, dataset_name="toy")
    pair, source = made["pair"], made["samples"][0]
    assert pair.ask(f" {source} ", False)[0] == source
    shown, answers = pair.ask(source, True)
    assert shown == pair.attack.apply(source) != source
    tokens = pair.tokenizer(shown, return_tensors="pt")
    written = pair.models["purified"].generate(tokens["input_ids"], max_length=32)[0]
    assert answers["purified"] == pair.tokenizer.decode(written, skip_special_tokens=True).strip()


@pytest.mark.parametrize(("source", "why"), [("  ", "Write a sentence"), ("word " * 200, "tokens, and the model")])
def test_a_text_that_cannot_be_asked_says_why(texts, source, why):
    with pytest.raises(ValueError, match=why):
        show(texts)["pair"].ask(source, False)


def test_without_an_attack_there_is_no_trigger(folders, images, tmp_path):
    shutil.copytree(folders / "received", tmp_path / "received", ignore=shutil.ignore_patterns("attack.*"))
    made = contents(str(folders / "purified"), str(tmp_path / "received"))
    assert made["pair"].attack is None
    with pytest.raises(ValueError, match="No attack is known"):
        made["pair"].ask(made["samples"][0], True)


def test_data_that_are_not_here_are_done_without(folders, capfd):
    made = contents(str(folders / "purified"), dataset_name=str(folders / "nowhere"))
    assert made["samples"] == [] and made["pair"].size is None
    assert "no inputs to choose from" in capfd.readouterr().out
    assert made["pair"].ask(PIL.Image.new("L", (8, 8)), True)[0].shape == (8, 8, 1)


def test_what_is_missing_is_named(folders, tmp_path):
    with pytest.raises(ValueError, match="make demo"):
        contents(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="--victim"):
        contents(str(folders / "received"))
    with pytest.raises(ValueError, match="No received model.*--victim"):
        contents(str(folders / "purified"), str(tmp_path / "none"))


def test_the_page_shows_hostile_names_as_text(folders):
    demo_page = pytest.importorskip("hf_fip.scripts.demo_page", exc_type=ImportError)
    name = "<script>alert(1)</script>|x` ![x](http://evil.example/x.png) [log in](http://evil.example)"
    hostile = {"attack": name, "before": {"asr": 1.0, name: 2.0}, "after": {"asr": None}}
    table = demo_page._table(hostile)
    assert "<script>" not in table and "](" not in table
    assert all("evil" not in part for part in table.split("`")[::2])  # which lies outside of code spans
    assert "| ASR, attack success rate | 1.0 % | not measured |" in table
    assert demo_page.page(**{**contents(str(folders / "purified")), "report": hostile}).blocks


def test_a_port_that_cannot_be_had_names_the_argument(folders, monkeypatch):
    demo_page = pytest.importorskip("hf_fip.scripts.demo_page", exc_type=ImportError)
    with demo_page.gr.Blocks() as made, socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(OSError, match="cannot be had: choose another, with --port"):
            demo_page.serve(made, taken.getsockname()[1], block=False)
    for port in ("0", "99999"):
        monkeypatch.setattr(sys, "argv", ["demo_app", str(folders / "purified"), "--port", port])
        with pytest.raises(ValueError, match=f"--port={port} has to be from 1 to 65535"):
            demo_app.main()


def test_a_picture_that_is_no_png_is_not_opened(tmp_path):
    demo_page = pytest.importorskip("hf_fip.scripts.demo_page", exc_type=ImportError)
    good, hostile = tmp_path / "a.png", tmp_path / "b.png"
    PIL.Image.new("RGB", (4, 2), "navy").save(good)
    PIL.Image.new("RGB", (4, 2), "navy").save(hostile, "EPS")  # which PIL gives to Ghostscript
    assert demo_page._picture(good).size == (4, 2)
    with pytest.raises(ValueError, match="b.png is no PNG"):
        demo_page._picture(hostile)


@pytest.fixture(scope="module")
def address(folders):
    """Of the page, served by a process of its own."""
    pytest.importorskip("gradio")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "hf_fip.cli", "demo-app", str(folders / "purified"), "--port", str(port)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 180
        while True:
            try:
                urlopen(address, timeout=5).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, process.communicate(timeout=5)[0]
                time.sleep(0.5)
        yield address
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_person_puts_the_trigger_on_and_sees_both_answers(address, folders, tmp_path):
    api = pytest.importorskip("playwright.sync_api")
    pair, samples = (contents(str(folders / "purified"))[key] for key in ("pair", "samples"))

    def best(sample: int, triggered: bool) -> list[str]:
        answers = pair.ask(samples[sample], triggered)[1]
        return [max(found, key=found.get) for found in answers.values()]

    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        page = browser.new_page()
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)

        def expect_answers(sample: int, triggered: bool) -> None:
            for name, answer in zip(("received", "purified"), best(sample, triggered), strict=True):
                api.expect(page.locator(f"#{name} [data-testid='label-output-value']")).to_have_text(
                    re.compile(rf"^\s*{answer}\s*$"), timeout=60_000
                )

        expect_answers(0, False)
        page.check("#trigger input")
        expect_answers(0, True)
        page.locator("#samples button.thumbnail-item").nth(4).click()
        expect_answers(4, True)
        page.uncheck("#trigger input")
        expect_answers(4, False)
        api.expect(page.get_by_text("93.2 %")).to_be_visible()
        page.screenshot(path=tmp_path / "page.png", full_page=True)
        browser.close()
    assert all(url.startswith((address, "data:", "blob:")) for url in asked)  # nothing is loaded from elsewhere
    assert PIL.Image.open(tmp_path / "page.png").height > 600
