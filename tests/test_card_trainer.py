"""The card that a trainer writes: before is of the received model, after of the model as it is, or not measured."""

import json
from pathlib import Path

import pytest
import yaml
from test_card import table_of
from trainer_cases import QUIET, Images, resnet, vit

from hf_fip import FIPConfig, FIPTrainer, SingularValueConfig
from hf_fip.baselines import method


@pytest.mark.parametrize("adapter", [False, True])
def test_a_trainer_writes_a_card_of_what_it_logged(adapter, tmp_path):
    args = FIPConfig(tmp_path / "out", max_steps=1, eta_f=0.2, hub_token="hf_secretsecret", **QUIET)
    config = SingularValueConfig() if adapter else None
    trainer = FIPTrainer(vit(), args, train_dataset=Images(), eval_dataset=Images(8, 1), peft_config=config)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    trainer.save_model()
    trainer.create_model_card(tags="mine", license="mit")
    text = (tmp_path / "out" / "README.md").read_text()
    assert ["`loss`", f"{before['eval_loss']:.4g}", f"{after['eval_loss']:.4g}"] in table_of(
        text, "|  | before | after |"
    )
    front = yaml.safe_load(text.split("---")[1])
    assert front["license"] == "mit" and {"mine", "hf_fip"} <= set(front["tags"])
    assert front["library_name"] == ("peft" if adapter else "transformers")
    assert ["`eta_f`", "`0.2`"] in table_of(text, "| argument | value |") and "24 clean samples" in text
    written = [file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert len(written) >= 4 and not any(b"secretsecret" in content for content in written)  # nor training_args.bin


def trainer_at(folder: Path, name: str | None = None, **options):
    """A trainer of a baseline, or FIP's."""
    trainer_class, config_class = (FIPTrainer, FIPConfig) if name is None else method(name)
    args = config_class(folder, **{**QUIET, "max_steps": 4, "learning_rate": 0.01, **options})
    return trainer_class(resnet(), args, train_dataset=Images(), eval_dataset=Images(8, 1))


def losses(trainer) -> list[float | None]:
    """What the card says of the loss, before and after, as its report has it."""
    trainer.create_model_card()
    folder = Path(trainer.args.output_dir)
    report = json.loads((folder / "report.json").read_text())
    found = [report[moment]["loss"] for moment in ("before", "after")]
    shown = ["not measured" if loss is None else f"{loss:.4g}" for loss in found]
    assert table_of((folder / "README.md").read_text(), "|  | before | after |") == [["`loss`", *shown]]
    return found


def test_what_was_measured_after_training_is_not_before(tmp_path):
    trainer = trainer_at(tmp_path)
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert losses(trainer) == [None, after]


def test_before_is_of_the_received_model_and_after_of_what_the_last_training_made(tmp_path):
    trainer = trainer_at(tmp_path, eval_strategy="steps", eval_steps=3, eval_on_start=True)
    received = trainer_at(tmp_path).evaluate()["eval_loss"]
    trainer.train()
    assert losses(trainer) == [received, trainer.evaluate()["eval_loss"]]
    trainer.args.eval_strategy = "no"
    trainer.train()
    assert losses(trainer) == [received, None]


def test_a_resumed_run_has_not_measured_the_received_model(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "save_strategy": "steps"}
    first = trainer_at(tmp_path, save_steps=2, **options)
    first.train()
    resumed = trainer_at(tmp_path, save_steps=2, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(resumed) == [None, pytest.approx(first.evaluations[-1]["eval_loss"])]


def test_after_is_of_the_best_checkpoint_where_that_is_loaded(tmp_path):
    often = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = trainer_at(tmp_path, load_best_model_at_end=True, metric_for_best_model="loss", **often)
    trainer.train()
    assert trainer.state.best_global_step < 4
    logged = losses(trainer)
    assert logged == [None, pytest.approx(trainer.evaluate()["eval_loss"])]
    assert "was chosen" not in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("name", ["anp", "awm", "clp", "rnp"])
def test_a_pruned_model_is_not_the_one_that_was_measured_in_training(name, tmp_path):
    trainer = trainer_at(tmp_path, name, eval_strategy="steps", eval_steps=4)
    received = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert losses(trainer) == [received, None]
    after = trainer.evaluate()["eval_loss"]
    assert losses(trainer) == [received, after]


def test_a_head_drawn_anew_is_not_the_received_one(tmp_path):
    trainer = trainer_at(tmp_path, "fst", eval_on_start=True)
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert losses(trainer) == [None, after]


def test_masks_are_what_was_trained(tmp_path):
    trainer = trainer_at(tmp_path, "anp")
    trainer.train()
    trainer.create_model_card()
    cost = json.loads((tmp_path / "report.json").read_text())["cost"]
    assert cost["trainable_parameters"] == sum(mask.numel() for mask in trainer.masks.values())
