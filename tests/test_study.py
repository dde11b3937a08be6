"""The study's bookkeeping: what identifies a run, what is repeated, and the tables made of the rows."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import study
import study_run
from study_published import GivenTrigger, ResNet20, SmallVGG, load_published
from study_released import train as train_by_released_code
from study_suites import SUITES, Places
from study_tables import write
from study_typeset import typeset_digits

from hf_fip.baselines.awm import AWMConfig
from hf_fip.tasks.data import load_images
from hf_fip.tasks.image_architectures import small_model

PLACES = Places("somewhere/on/a/disk/cifar10", "elsewhere/victims", "a/clone")


def row(cell, seed_shift: float = 0.0, **changed) -> dict:
    before = {"accuracy": 90.0, "asr": 99.0, "ra": 1.0}
    after = {"accuracy": 88.0 + seed_shift, "asr": 3.0 + seed_shift, "ra": 80.0}
    measured = {"before": before, "after": after, "der": 97.0, "cpu_seconds": 2.0, "trained": 1234, "device": "cpu"}
    return {"cell": cell.key, "versions": {"torch": "1"}, **measured, **changed}


@pytest.mark.parametrize("suite", SUITES)
def test_the_runs_of_a_suite_differ_and_their_rows_name_no_place_on_a_disk(suite):
    cells = SUITES[suite](PLACES)
    keys = [study._key(cell) for cell in cells]
    assert len(set(keys)) == len(keys) > 0
    assert not any(part in "".join(keys) for part in ("somewhere", "elsewhere", "a/clone"))


def test_victims_of_the_tables_are_no_development_victims():
    cells = [cell for suite in SUITES.values() for cell in suite(PLACES)]
    assert {cell.victim.seed for cell in cells} == {1, 2, 3}


@pytest.mark.parametrize("suite", ["cifar10", "published"])
def test_a_suite_that_needs_data_says_so(suite):
    with pytest.raises(SystemExit, match="--cifar10"):
        SUITES[suite](Places())


def test_rows_of_other_settings_and_half_a_line_are_dropped(tmp_path):
    cells = SUITES["digits"](Places())[:2]
    other = replace(cells[0], method=replace(cells[0].method, arguments={"eta_f": 9.0}))
    path = tmp_path / "digits.jsonl"
    path.write_text("".join(json.dumps(row(cell)) + "\n" for cell in (cells[0], other)) + '{"cell": {"vic')
    assert list(study._rows(path, cells)) == [study._key(cells[0])]
    assert study._rows(tmp_path / "none.jsonl", cells) == {}


def test_settings_that_are_defaults_are_part_of_a_run(monkeypatch):
    cells = {cell.method.name: cell for cell in SUITES["digits"](Places())}
    before = {name: study._key(cell) for name, cell in cells.items()}
    assert cells["FIP"].key["method"]["arguments"]["trace_interval"] == 4
    assert cells["Fast FIP"].key["method"]["adapter"]["floor"] == 0.1
    monkeypatch.setattr(AWMConfig.__dataclass_fields__["awm_alpha"], "default", 0.5)
    assert {name for name, cell in cells.items() if study._key(cell) != before[name]} == {"awm"}


def test_rows_of_the_released_code_stay_when_it_is_not_given(tmp_path, monkeypatch, capsys):
    cells = [cell for cell in SUITES["digits"](PLACES) if cell.victim.family == "resnet"]
    rows = [row(cell) for cell in cells if cell.method.name in ("FIP", "released code, 0.5")]
    file = tmp_path / "digits.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in rows))
    given = ["study.py", "--suite", "digits", "--results", str(tmp_path), "--tables_only"]
    monkeypatch.setattr(sys, "argv", given)
    study.main()
    assert sorted(file.read_text().splitlines()) == sorted(json.dumps(one) for one in rows)
    assert "| released code, 0.5 |" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "trained"), [("awm", "weights"), ("anp", "channels"), ("clp", "nothing")])
def test_a_run_knows_the_pixels_of_its_images_and_what_it_trained(name, trained):
    images = load_images("digits", max_train_samples=40, max_test_samples=20)
    model, processor = small_model("resnet", images)
    given = study_run._Given(model, processor, None, images, images.train, images.train)
    (cell,) = [cell for cell in SUITES["digits"](Places()) if cell.method.name == name][:1]
    cell = replace(cell, method=replace(cell.method, arguments={"num_train_epochs": 1, "use_cpu": True}))
    trainer = study_run._trainer(cell, given, model, images.train, {})
    assert trainer.processing_class is processor
    trainer.train()
    kernels = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear)))
    channels = sum(layer.num_features for layer in model.modules() if isinstance(layer, nn.BatchNorm2d))
    expected = {"weights": kernels, "channels": channels, "nothing": 0}[trained]
    assert study_run._trained_numbers(trainer, name) == pytest.approx(expected, rel=0.02)


def test_the_table_has_the_means_over_attacks_then_seeds(tmp_path):
    chosen = [cell for cell in SUITES["digits"](Places()) if cell.method.name == "FIP"]
    rows = [row(cell, seed_shift=cell.victim.seed) for cell in chosen if cell.victim.family == "resnet"]
    failed = {"cell": chosen[-1].key, "versions": {}, "failed": "it is not defined"}
    text = write(tmp_path, "digits", "a command", "A title", [*rows, failed], missing=7)
    assert "| FIP | 90.0 ± 1.0 | 0.0 ± 1.0 | 5.0 ± 1.0 | 80.0 ± 0.0 | 97.0 ± 0.0 |" in text
    assert "7 of 20 runs have not been made" in text and "1 × vit, FIP: it is not defined" in text
    assert (tmp_path / "digits.md").read_text() == text and (tmp_path / "digits.png").stat().st_size > 0


def test_a_table_of_benign_models_has_no_asr(tmp_path):
    cells = [cell for cell in SUITES["digits_benign"](Places()) if cell.method.name == "FIP"]
    nothing = {"asr": None, "ra": None}
    rows = [
        row(cell, before={"accuracy": 95.0, **nothing}, after={"accuracy": 94.0, **nothing}, der=None)
        for cell in cells
    ]
    text = write(tmp_path, "digits_benign", "a command", "A title", rows, missing=0)
    assert "| method | ACC | ΔACC | CPU s |" in text and "| FIP | 94.0 ± 0.0 | -1.0 ± 0.0 | 2.0" in text
    assert not (tmp_path / "digits_benign.png").exists()


def test_a_victim_of_each_kind_of_attacker_has_a_table_of_its_own(tmp_path):
    cells = [cell for cell in SUITES["digits_adaptive"](Places()) if cell.method.name == "FIP"]
    text = write(tmp_path, "digits_adaptive", "a command", "A title", [row(cell) for cell in cells], missing=0)
    assert "## vit, attacker's eta_f 0.01" in text and "## vit, attacker's rho 0.5" in text


def test_typeset_digits_are_digits_of_the_same_size_that_nobody_wrote():
    handwritten = load_images("digits").train
    printed = typeset_digits(handwritten)
    assert len(printed) == 200 and printed.features == handwritten.features
    assert {image.size for image in printed["image"]} == {handwritten[0]["image"].size}
    flat = np.stack([np.asarray(image, float).ravel() for image in printed["image"]])
    assert len(np.unique(flat, axis=0)) > 150 and flat.max() > 200
    labels = np.array(printed["label"])
    means = np.stack([flat[labels == digit].mean(0) for digit in range(10)])
    nearest = np.linalg.norm(flat[:, None] - means, axis=-1).argmin(1)
    assert (nearest == labels).mean() > 0.9  # a digit looks like the same digit in other fonts


@pytest.mark.parametrize(("kind", "head"), [(SmallVGG, "classifier"), (ResNet20, "fc"), (ResNet20, "linear")])
@pytest.mark.parametrize("mode", ["replace", "add"])
def test_a_published_victim_is_read_with_its_head_its_preprocessing_and_its_trigger(tmp_path, kind, head, mode):
    model = kind(head).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    card = {"preprocess": {"mean": [0.5] * 3, "std": [0.25] * 3}, "target": 4}
    (tmp_path / "card.json").write_text(json.dumps(card))
    mask, pattern = np.zeros((2, 32, 32, 3), np.float32)
    mask[:2, :2], pattern[:2, :2] = 1, 0.6
    np.savez(tmp_path / "trigger.npz", mask=mask, pattern=pattern, mode=mode)
    loaded, processor, attack = load_published(tmp_path)
    pixels = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded.eval()(pixel_values=pixels).logits, model(pixel_values=pixels).logits)
    assert list(processor.image_std) == [0.25] * 3 and attack.target_label == 4
    image = np.full((32, 32, 3), 51, np.uint8)
    changed = attack.apply(image)
    assert (changed[2:] == 51).all() and (changed[:2, :2] == {"replace": 153, "add": 204}[mode]).all()


def test_a_published_benign_model_has_no_trigger_and_another_network_is_refused(tmp_path):
    save_file(ResNet20("fc").state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "card.json").write_text(json.dumps({"preprocess": {"mean": None, "std": None}, "target": None}))
    assert load_published(tmp_path)[2] is None
    save_file({"weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="neither a small VGG nor a ResNet-20"):
        load_published(tmp_path)
    assert GivenTrigger().eligible(np.array([0, 1]), 10).tolist() == [False, True]


def test_a_folder_without_the_released_code_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Regularizer.py"):
        train_by_released_code(None, None, None, str(tmp_path), 0.5)
