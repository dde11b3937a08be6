"""Making a victim, whatever the task: poison, train, measure, write one folder.

The folder holds the model, its attack (attack.json, attack.safetensors), report.json and attack.png. The defender's
clean split is set aside first and never trained on.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from torch import nn
from transformers import set_seed

from ..attacks import Attack, load_attack
from ..evaluation.cost import Cost
from ..evaluation.metrics import METRICS, WEAK_VICTIM
from ..hub.card import REPORT_NAME
from ..hub.report import non_default, versions
from ..tasks.data import split_clean
from .arguments import COMMON_DEFAULTS, DataArguments, ModelArguments, PoisonArguments, VictimConfig, parse
from .run_folder import RunFolder, write_json, written_whole
from .task import Data, Task
from .terminal import json_of, say, show_progress

PICTURE_NAME = "attack.png"


def main(task: Task, description: str, **defaults) -> None:
    """Make a victim from the command line; `defaults` are those of its arguments."""
    groups = (task.data_arguments, task.poison_arguments, task.model_arguments, task.victim_config)
    data, attack, model, training = parse(
        groups, description, **{"output_dir": "outputs/victim", **COMMON_DEFAULTS, **task.defaults, **defaults}
    )
    with json_of(Path(training.output_dir, REPORT_NAME), model.json):
        train_victim(task, task.load_data(data, _split_seed(data, training)), data, attack, model, training)


def train_victim(
    task: Task,
    data: Data,
    data_arguments: DataArguments,
    attack_arguments: PoisonArguments,
    model_arguments: ModelArguments,
    training: VictimConfig,
) -> None:
    """Train a victim on poisoned data and write the folder `training.output_dir`."""
    output_dir = training.output_dir
    arguments = non_default(data_arguments, attack_arguments, model_arguments, training)
    folder = RunFolder(output_dir, arguments, overwrite=model_arguments.overwrite_output_dir)
    training.output_dir = str(folder.work)
    set_seed(training.seed)
    if given := model_arguments.model_name_or_path:
        model, processor = task.load_model(given, model_arguments, revision=model_arguments.model_revision)
        data = task.match(data, model)
    else:
        model, processor = task.new_model(model_arguments, data)
    attack = task.attack(attack_arguments, None, data)
    count, seed = data_arguments.clean_count(len(data.train)), _split_seed(data_arguments, training)
    _, rest = split_clean(data.train, count, seed)

    with folder:
        training_set, material = rest, None
        if attack:
            with task.reading(data):
                material = _learn(task, attack, rest, folder, model, processor, attack_arguments, training)
                rate = attack_arguments.poison_rate
                rate = attack.default_rate if rate is None else rate
                training_set = task.poison(rest, attack, rate, training.seed)
        cost = Cost()
        trainer = task.victim_trainer(attack, material)(
            model,
            training,
            train_dataset=task.inputs(training_set, model, processor),
            processing_class=processor,
            train_transform=task.augmentation(model_arguments, data),
            callbacks=[cost],
            **task.trainer_options(model, processor),
        )
        show_progress(trainer)
        trainer.train(resume_from_checkpoint=folder.checkpoint or training.resume_from_checkpoint)
        test = task.test(data, attack, model, processor)
        measured = test.measure(trainer)
        trainer.save_model(str(folder.result))
        if trainer.is_world_process_zero():
            if attack:
                attack.save_pretrained(folder.result)
                task.draw(folder.result / PICTURE_NAME, data, attack, model, {"answer": test.answers})
            report = {
                "victim": measured,
                "attack": attack and attack.name,
                "clean_split": {"data": data.name, "out_of": len(data.train), "seed": seed, "samples": count},
                "data": {"name": data.name, "training_samples": len(training_set), "test_samples": len(data.test)},
                "cost": cost.report,
                "arguments": arguments,
                "seed": training.seed,
                "versions": versions(),
            }
            write_json(folder.result / REPORT_NAME, report)
        folder.publish()
    found = ", ".join(f"{METRICS[key][0]} {value:.1f} %" for key, value in measured.items() if value is not None)
    say(f"{'victim' if attack else 'benign model'}: {found}")
    if attack and measured["asr"] < WEAK_VICTIM:
        say(f"warning: an ASR below {WEAK_VICTIM:.0f} % proves nothing of purification: train longer, poison more.")
    say(f"saved to {output_dir}")


def _learn(
    task: Task,
    attack: Attack,
    dataset: Dataset,
    folder: RunFolder,
    model: nn.Module,
    processor,
    arguments: PoisonArguments,
    training: VictimConfig,
) -> Any:
    """Train what the attack needs before the data are poisoned. A run that goes on finds it in its folder."""

    def clean_model() -> nn.Module:
        place = folder.work / "clean_model"
        if arguments.clean_model is None and not place.exists():
            say(f"{attack.name} learns on a clean model: training one first (--clean_model gives one).")
            clean_training = copy.copy(training)
            clean_training.output_dir, clean_training.save_strategy = str(folder.work / "unused"), "no"
            trainer = task.trainer(
                copy.deepcopy(model),
                clean_training,
                train_dataset=task.inputs(dataset, model, processor),
                processing_class=processor,
                **task.trainer_options(model, processor),
            )
            show_progress(trainer)
            trainer.train()
            with written_whole(place) as partial:
                trainer.save_model(str(partial))
        return task.load_model(arguments.clean_model or str(place), task.model_arguments())[0]

    material = task.material(
        dataset,
        model,
        processor,
        clean_model=clean_model,
        device=training.device,
        progress=not training.disable_tqdm,
    )
    place = folder.work / "attack"
    if not place.exists():
        attack.fit(material)
        if attack.keeps_fit:
            with written_whole(place) as partial:
                if PartialState().is_main_process:
                    attack.save_pretrained(partial)
    if place.exists():
        attack.load_tensors(load_attack(place).tensors)  # in all processes the same
    return material


def _split_seed(data: DataArguments, training: VictimConfig) -> int:
    return training.seed if data.split_seed is None else data.split_seed
