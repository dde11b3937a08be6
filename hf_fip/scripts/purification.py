"""Purifying a model, whatever the task: measure, train, measure, write one folder.

The folder holds the purified model or its adapter, README.md (its card), report.json (everything measured) and plots/.
"""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path

from torch.utils.data import DataLoader, Subset
from transformers import set_seed

from ..attacks import Attack
from ..baselines import method
from ..config import FAST_FIP, FIPConfig
from ..curvature.callback import CurvatureCallback
from ..curvature.plots import plot_curvature
from ..evaluation.backdoor import PurificationCurve
from ..evaluation.cost import Cost
from ..evaluation.metrics import METRICS, WEAK_VICTIM, defense_effectiveness_rating
from ..hub.card import CARD_NAME, REPORT_NAME, card_of, loading_of, provenance
from ..hub.push import push_folder, require_token
from ..hub.report import collapses_of, non_default, versions
from ..hub.safety import ATTACK_FOLDER, admit
from ..plots import plot_purification
from ..tasks.augmentation import both
from ..tasks.data import split_clean
from .arguments import (
    COMMON_DEFAULTS,
    FIP,
    AdapterArguments,
    DataArguments,
    MethodArguments,
    ModelArguments,
    PoisonArguments,
    chosen,
    parse,
)
from .backdooring import train_victim
from .recorded import split_behind
from .run_folder import RunFolder, write_json
from .task import Data, Task
from .terminal import json_of, print_comparison, say, show_progress, warn_if_costly

RUN_DEFAULTS = {"save_steps": 100, "save_total_limit": 1, "hub_strategy": "end"}
CURVATURE_SAMPLES = 500  # clean ones, behind each measurement of the curvature
CURVE_SAMPLES = 500  # test samples of each kind behind each point of the picture


def main(task: Task, description: str, fip: dict, fast_fip: dict, **defaults) -> None:
    """Purify a model from the command line.

    Args:
        task: the task.
        description: what --help says.
        fip, fast_fip: defaults of the training arguments for FIP and, on top of them and of `FAST_FIP`, for Fast FIP.
        defaults: those of the other arguments, with `output_dir`.

    Raises:
        ValueError: for arguments that cannot be.
    """
    name = chosen("--method") or FIP
    if name in task.methods and name != FIP:
        config, fip, of_adapter = method(name)[1], {}, None
    else:
        config, of_adapter = task.config, FAST_FIP | fast_fip
    groups = (task.data_arguments, task.poison_arguments, task.model_arguments)
    arguments = parse(
        (*groups, task.method_arguments, AdapterArguments, config),
        description,
        adapter_defaults=of_adapter,
        pushes=True,
        **{**RUN_DEFAULTS, **COMMON_DEFAULTS, **task.defaults, **fip, **defaults},
    )
    model_arguments = next(group for group in arguments if isinstance(group, task.model_arguments))
    with json_of(Path(arguments[-1].output_dir, REPORT_NAME), model_arguments.json):
        purify(task, *arguments)


def purify(
    task: Task,
    data_arguments: DataArguments,
    attack_arguments: PoisonArguments,
    model_arguments: ModelArguments,
    method_arguments: MethodArguments,
    adapter_arguments: AdapterArguments,
    training: FIPConfig,
) -> None:
    """Purify a model and write the folder `training.output_dir`."""
    if method_arguments.method not in task.methods:
        raise ValueError(
            f"--method {method_arguments.method} is not defined here: choose one of {', '.join(task.methods)}."
        )
    arguments = non_default(
        data_arguments, attack_arguments, model_arguments, method_arguments, adapter_arguments, training
    )
    adapter_config = adapter_arguments.make()
    pushing = training.push_to_hub
    if pushing:
        require_token(training.hub_token)
        training.hub_model_id = training.hub_model_id or Path(training.output_dir).absolute().name
        training.push_to_hub = training.hub_strategy != "end"
    folder = RunFolder(training.output_dir, arguments, overwrite=model_arguments.overwrite_output_dir)
    output_dir, training.output_dir = training.output_dir, str(folder.work)
    given = model_arguments.model_name_or_path
    recorded = split_behind(given)
    seeds = (data_arguments.split_seed, recorded and recorded["seed"], training.seed)
    split_seed = next(seed for seed in seeds if seed is not None)
    data = task.load_data(data_arguments, split_seed)
    if recorded and _is_other_data(recorded, data):
        recorded = None
    everything = len(data.train) if given else None
    count = data_arguments.clean_count(len(data.train), recorded["samples"] if recorded else everything)
    if recorded:
        _check_split(recorded, data, split_seed, count, task.words.samples)
    place = given or _make_victim(task, data, data_arguments, attack_arguments, model_arguments, training)
    model, processor = task.load_model(
        place, model_arguments, revision=model_arguments.model_revision if given else None
    )
    data = task.match(data, model)
    attack = task.attack(attack_arguments, given, data)
    clean = data.train if count == everything else split_clean(data.train, count, split_seed)[0]
    held_out = None
    if method_arguments.held_out_clean_samples:
        if method_arguments.held_out_clean_samples >= len(clean):
            raise ValueError(
                f"--held_out_clean_samples={method_arguments.held_out_clean_samples} leaves none of the {len(clean)} "
                f"clean {task.words.samples} to purify with: hold fewer out."
            )
        held_out, clean = split_clean(clean, method_arguments.held_out_clean_samples, split_seed)
    if attack is None:
        say(f"No attack is known for this model (--attack NAME): only {METRICS[task.metric][0]} is measured.")
    revision = model_arguments.model_revision if given else None
    received = provenance(admit(place, revision=revision, trust=model_arguments.trust()))
    with folder:
        test = task.test(data, attack, model, processor)
        validation = held_out and task.clean_test(held_out, model, processor)
        curve = PurificationCurve(test.part(CURVE_SAMPLES))
        watching = [curve]
        cost = Cost(excluded=lambda: sum(watcher.seconds for watcher in watching))
        described = loading_of(model, task.words)
        set_seed(training.seed)
        inputs = task.inputs(clean, model, processor)
        trainer_class = task.trainer if method_arguments.method == FIP else method(method_arguments.method)[0]
        trainer = trainer_class(
            model,
            training,
            train_dataset=inputs,
            processing_class=processor,
            train_transform=both(
                task.augmentation(model_arguments, data), task.disturbance(method_arguments, data, model, processor)
            ),
            peft_config=adapter_config,
            callbacks=[cost, curve],
            **task.trainer_options(model, processor),
        )
        curve.trainer = trainer
        if method_arguments.curvature_every:
            part = Subset(inputs, range(min(len(inputs), CURVATURE_SAMPLES)))
            batches = DataLoader(part, training.per_device_eval_batch_size, collate_fn=trainer.data_collator)
            watching.append(CurvatureCallback(batches, method_arguments.curvature_every))
            trainer.add_callback(watching[-1])
        show_progress(trainer)
        before = test.measure(trainer)
        answers_before = test.answers
        say(f"Purifying {place} with {len(clean)} clean {task.words.samples} of {data.name}.")
        if attack is not None and before["asr"] < WEAK_VICTIM:
            say(f"warning: an ASR of {before['asr']:.1f} % before purification proves nothing about purification.")
        trainer.train(resume_from_checkpoint=folder.checkpoint or training.resume_from_checkpoint)
        switched_off = None
        if adapter_config is not None:
            with trainer.model.disable_adapter():
                switched_off = test.measure(trainer)
        after = test.measure(trainer)
        validated = validation and validation.measure(trainer)
        training.push_to_hub = False
        trainer.save_model(str(folder.result))
        if trainer.is_world_process_zero():
            der = None if attack is None else defense_effectiveness_rating(before, after, task.metric)
            report = {
                "method": method_arguments.method,
                "before": before,
                "after": after,
                "der": der,
                f"validation_{task.metric}": validated and validated[task.metric],
                "adapter_switched_off": switched_off,
                "curvature": _first_and_last(trainer.state.log_history),
                "cost": cost.report | {"file_bytes": _weight_bytes(folder.result)},
                "collapses": collapses_of(trainer.state.log_history),
                "model": place,
                "model_is_from_hub": bool(given) and not Path(given).exists(),
                "received": received,
                "attack": attack and attack.name,
                "data": {"name": data.name, "clean_samples": len(clean), "test_samples": len(data.test)},
                "card": described,
                "arguments": arguments,
                "seed": training.seed,
                "split_seed": split_seed,
                "versions": versions(),
            }
            write_json(folder.result / REPORT_NAME, report)
            if attack is not None:  # so that ASR can be measured again where the victim is not
                attack.save_pretrained(folder.result / ATTACK_FOLDER)
            answers = {"before": answers_before, "after": test.answers}
            _draw(task, folder.result / "plots", trainer.state.log_history, data, attack, model, answers)
            card_of(folder.result, name=Path(output_dir).name).save(folder.result / CARD_NAME)
            say(f"{place}, purified:")
            print_comparison(before, after, report["der"], report["cost"])
            if method_arguments.method == FIP:
                warn_if_costly(before, after, task.metric, training.learning_rate)
            if attack is not None and switched_off is not None:
                say(f"with the adapter switched off, ASR is {switched_off['asr']:.1f} % again")
        folder.publish()
    what = "the purified model" if adapter_config is None else "the adapter"
    say(f"saved to {output_dir}: {what}, README.md, report.json, plots/")
    if pushing and trainer.is_world_process_zero():
        address = push_folder(
            output_dir,
            training.hub_model_id,
            token=training.hub_token,
            private=training.hub_private_repo,
            revision=training.hub_revision,
            create_pr=model_arguments.hub_create_pr,
            base_model=model_arguments.hub_base_model,
        )
        say(f"pushed: {address}")


def _first_and_last(log: list[dict]) -> dict[str, dict] | None:
    """What `CurvatureCallback` measured before and after training; None if it did not."""
    rows = [row for row in log if "curvature_loss" in row]
    return {"before": rows[0], "after": rows[-1], "samples_at_most": CURVATURE_SAMPLES} if rows else None


def _weight_bytes(folder: Path) -> int:
    """The size of what was saved of the model: its weights, or its adapter."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _is_other_data(recorded: dict, data: Data) -> bool:
    """Whether a victim was trained on other data than these, as far as can be told."""
    return recorded["out_of"] != len(data.train) and Path(recorded["data"]).name != Path(data.name).name


def _check_split(recorded: dict, data: Data, seed: int, count: int, samples: str) -> None:
    """Raise ValueError when the victim was trained on some of the clean split."""
    if recorded["out_of"] != len(data.train):
        raise ValueError(
            f"The victim kept its clean {samples} aside from {recorded['out_of']} training {samples}, and these are "
            f"{len(data.train)}: give the --max_train_samples and the splits that it was trained with."
        )
    if seed != recorded["seed"] or count > recorded["samples"]:
        raise ValueError(
            f"The victim was trained on some of these {count} clean {samples}: it kept {recorded['samples']} "
            f"aside, with --split_seed {recorded['seed']}. Use those (--clean_samples {recorded['samples']})."
        )


def _make_victim(
    task: Task,
    data: Data,
    data_arguments: DataArguments,
    attack_arguments: PoisonArguments,
    model_arguments: ModelArguments,
    training: FIPConfig,
) -> str:
    """The folder of a victim made for these data and this attack: trained now, or by an earlier run."""
    defaults = {**COMMON_DEFAULTS, **task.defaults, "disable_tqdm": training.disable_tqdm}
    victim_training = task.victim_config(
        output_dir="unused",
        seed=training.seed,
        use_cpu=training.use_cpu,
        save_strategy="epoch",
        save_total_limit=1,
        **defaults,
    )
    victim_model = copy.copy(model_arguments)
    victim_model.overwrite_output_dir = False
    wanted = non_default(data_arguments, attack_arguments, victim_model, victim_training)
    key = hashlib.sha256(json.dumps([wanted, versions()], sort_keys=True, default=str).encode()).hexdigest()[:8]
    attack = task.attack(attack_arguments, None, data)
    name = "-".join((model_arguments.architecture, Path(data.name).name, attack.name if attack else "benign", key))
    place = Path(model_arguments.victims_dir) / name
    if place.exists():
        say(f"No --model_name_or_path: using the victim that an earlier run trained, {place}.")
        return str(place)
    say(f"No --model_name_or_path: training a small {model_arguments.architecture} with a backdoor first, {place}.")
    victim_training.output_dir = str(place)
    train_victim(task, data, data_arguments, attack_arguments, victim_model, victim_training)
    return str(place)


def _draw(task: Task, folder: Path, log: list[dict], data: Data, attack: Attack | None, model, answers) -> None:
    """purification.png, curvature.png where it was measured, and triggers.png when the attack is known."""
    short, long = METRICS[task.metric]
    keys = {f"curve_{task.metric}": "accuracy", "curve_asr": "asr", "fisher_trace": "fisher_trace"}
    history = [{"step": row["step"], **{new: row[old] for old, new in keys.items() if old in row}} for row in log]
    title = f"Purification ({short} and ASR of at most {CURVE_SAMPLES} test {task.words.samples})"
    metric = f"{long.removeprefix('clean ')} ({short})"
    plot_purification(history, folder / "purification.png", title=title, metric=metric)
    if _first_and_last(log):
        title = f"Curvature of the loss on clean {task.words.samples}"
        plot_curvature(log, folder / "curvature.png", title)
    if attack is not None:
        task.draw(folder / "triggers.png", data, attack, model, answers)
