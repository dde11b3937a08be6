"""How much of a backdoor is left in an image classifier, and how easily it comes back.

ACC, ASR and RA on the test images; the same after relearning (--relearn: fine-tuning with a few triggered images) and
under a reactivating perturbation (--reactivate), with a benign model beside it to compare (--benign_model). The attack
and the data are the model's own, or those of its purification, unless others are named; the figures of its report.json
are then compared with.

    python recipes/evaluate_image.py outputs/fip
    hf-fip evaluate someone/purified-model         (from the Hub; ends with 3 when its card says something else)
    python recipes/evaluate_image.py --model_name_or_path outputs/fip --relearn --reactivate --output_dir outputs/check
    python recipes/backdoor_image.py --attack none --output_dir outputs/benign
    python recipes/evaluate_image.py --model_name_or_path outputs/fip --reactivate --benign_model outputs/benign
    python recipes/evaluate_image.py --model_name_or_path someone/model --dataset_name cifar10 --attack_from a/victim
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from torch import nn
from transformers import Trainer

from ..attacks import Attack
from ..attacks.base import CONFIG_NAME
from ..evaluation.backdoor import BackdoorTest
from ..evaluation.metrics import METRICS, attack_success_rate
from ..evaluation.reactivation import SAMPLES, Perturbed, reactivate
from ..evaluation.relearning import CLEAN_SHARE, TRIGGERED, RelearningConfig, attackers_images, relearning_trainer
from ..hub.card import REPORT_NAME
from ..hub.report import non_default, versions
from ..hub.safety import LONGEST_REPORT, Trust, admit, read_object
from ..tasks.data import LabelledImages, split_clean
from ..tasks.image_classification import PixelDataset, load_image_classifier, match_labels
from .arguments import COMMON_DEFAULTS, AttackArguments, parse
from .images import ImageData, channels_of, images_of, make_test, pixel_range, reading
from .recorded import attack_folder, attack_of, recorded_split
from .run_folder import RunFolder, write_json
from .terminal import say, show_progress

OTHER_FIGURES = 3  # exit code: the report beside the model says something else than was measured
TOLERANCE = 0.5  # points; another machine may answer an image in a few hundred otherwise
_DATA_NAMES = (
    *("dataset_name", "dataset_config_name", "dataset_revision", "train_split", "test_split"),
    *("max_train_samples", "max_test_samples", "image_column", "label_column"),
)


@dataclass
class EvaluationArguments:
    """The model to be evaluated, and what is to be tried on it."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "A Hub id or folder (safetensors only, no remote code), or the folder of a PEFT adapter."},
    )
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub model."})
    base_model: str | None = field(
        default=None, metadata={"help": "What an adapter sits on. Default: what its adapter_config.json names."}
    )
    image_processor_name: str | None = field(
        default=None, metadata={"help": "Where to take the preprocessing from, if not from the model."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the Python code that comes with the model. Read it first."}
    )
    allow_pickle: bool = field(
        default=False,
        metadata={"help": "Convert a pytorch_model.bin, in a process of its own, where there are no safetensors."},
    )
    attack_from: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the victim whose attack is measured. Default: the model's own, or that of the victim "
            "that its report.json names."
        },
    )
    relearn: bool = field(
        default=False,
        metadata={"help": "Fine-tune a copy on 2 %% of the training images and 5 triggered ones, and measure again."},
    )
    reactivate: bool = field(
        default=False,
        metadata={"help": "Learn a small perturbation that wakes the backdoor, and measure with it. Relearns first."},
    )
    reactivation_samples: int = field(
        default=SAMPLES, metadata={"help": "Training images of each kind, clean and triggered, that it learns from."}
    )
    benign_model: str | None = field(
        default=None,
        metadata={"help": "A model of the same data that never had a backdoor: what is tried is tried on it too."},
    )
    json: bool = field(default=False, metadata={"help": "Print the report as JSON in place of the table."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace what an earlier run left in --output_dir."}
    )


def main() -> None:
    """`hf-fip evaluate`, `recipes/evaluate_image.py`."""
    if sys.argv[1:] and not sys.argv[1].startswith("-"):
        sys.argv.insert(1, "--model_name_or_path")
    groups = (ImageData, AttackArguments, EvaluationArguments, RelearningConfig)
    evaluate(*parse(groups, __doc__, output_dir="", **COMMON_DEFAULTS))


def evaluate(
    data: ImageData, attack_arguments: AttackArguments, evaluation: EvaluationArguments, training: RelearningConfig
) -> None:
    """Evaluate a model; print the report and, unless `training.output_dir` is empty, write it there."""
    arguments = non_default(data, attack_arguments, evaluation, training)
    output_dir, folder = training.output_dir, None
    if output_dir:
        folder = RunFolder(output_dir, arguments, overwrite=evaluation.overwrite_output_dir)
    with tempfile.TemporaryDirectory() as training.output_dir:
        report = _report(data, attack_arguments, evaluation, training)
    report |= {"arguments": arguments, "seed": training.seed, "versions": versions()}
    if folder is not None:
        with folder:
            if training.process_index == 0:
                folder.result.mkdir()
                write_json(folder.result / REPORT_NAME, report)
            folder.publish()
    if evaluation.json:
        say(json.dumps(report, indent=2))
    elif training.process_index == 0:
        _print(report)
        if folder is not None:
            say(f"saved to {output_dir}: {REPORT_NAME}")
    if report["differs"]:
        sys.exit(OTHER_FIGURES)


def _report(
    data: ImageData, attack_arguments: AttackArguments, evaluation: EvaluationArguments, training: RelearningConfig
) -> dict:
    """Load everything and measure it."""
    place = evaluation.model_name_or_path
    if place is None:
        raise ValueError("Which model is to be evaluated? Set --model_name_or_path.")
    trust = Trust(evaluation.trust_remote_code, evaluation.allow_pickle)
    try:
        folder = admit(place, revision=evaluation.model_revision, trust=trust)
    except ValueError as error:
        raise ValueError(f"No model at {place!r}: {error}") from error
    purification = _object_in(folder / REPORT_NAME)
    as_reported = _take_data(data, purification)
    source = _attack_source(evaluation, folder, purification)
    recorded = recorded_split(source)
    split_seed = _seed_of_split(data, purification, recorded, training)
    model, processor = load_image_classifier(
        str(folder), evaluation.image_processor_name, base_model=evaluation.base_model, trust=trust
    )
    images = match_labels(images_of(data, split_seed), model)
    attack = attack_of(attack_arguments, source, len(images.class_names))
    if attack is None and (evaluation.relearn or evaluation.reactivate):
        raise ValueError(
            f"No attack is known for {place}: name its victim's folder (--attack_from) or the attack (--attack)."
        )
    if recorded and recorded["out_of"] != len(images.train):
        raise ValueError(
            f"The victim is of {recorded['out_of']} training images of {recorded['data']}, and these are "
            f"{len(images.train)} of {images.name}: give the data, splits and --max_train_samples it was trained with."
        )
    kept = data.clean_count(len(images.train), recorded["samples"] if recorded else _kept(purification))
    attackers = split_clean(images.train, kept, split_seed)[1] if kept else images.train
    models = {"model": model}
    if evaluation.benign_model is not None:
        models["benign"] = _load_benign(evaluation, images, model, processor).to(training.device)
    test = make_test(images, attack, processor, channels_of(model))
    measured = _try(models, test, images, attackers, attack, processor, evaluation, training)
    said = _figures(purification) if as_reported and not (attack_arguments.attack or evaluation.attack_from) else None
    return {
        "reported": said,
        "differs": bool(said) and _differ(said, measured["model"]["as_it_is"]),
        "model": place,
        "benign_model": evaluation.benign_model,
        "attack": attack and attack.name,
        "data": {
            "name": images.name,
            "test_samples": len(test.clean),
            "triggered_test_samples": attack and int((test.triggered.labels != test.attack_labels).sum()),
            "attackers_samples": len(attackers),
        },
        "measured": measured,
        "notes": _notes(measured) + _notes_on_report(said, measured["model"]["as_it_is"]),
    }


def _try(
    models: dict[str, nn.Module],
    test: BackdoorTest,
    images: LabelledImages,
    attackers: Dataset,
    attack: Attack | None,
    processor,
    evaluation: EvaluationArguments,
    training: RelearningConfig,
) -> dict[str, dict[str, dict]]:
    """ACC, ASR and RA of each model as it is and after what is tried on it."""
    channels, num_labels = channels_of(models["model"]), len(images.class_names)

    def drawn(clean: int, triggered: int) -> list[PixelDataset]:
        with reading(images):
            parts = attackers_images(attackers, attack, clean, triggered, training.seed)
        return [PixelDataset(part, processor, channels) for part in parts]

    measured, perturbed = {}, None
    for name, model in models.items():
        trainer = Trainer(model, training)
        show_progress(trainer)
        rows = measured[name] = {"as_it_is": test.measure(trainer)}
        if evaluation.relearn or evaluation.reactivate:
            clean, triggered = drawn(max(1, round(CLEAN_SHARE * len(attackers))), TRIGGERED)
            labels = attack.attack_label(triggered.labels, num_labels)
            relearning = relearning_trainer(model, clean, triggered, labels, training)
            show_progress(relearning)
            relearning.train()
            rows["relearned"] = test.measure(relearning)
        if evaluation.reactivate:
            if perturbed is None:  # learned on the model, tried on the benign one too
                pixels = pixel_range(processor, images, channels)
                perturbation = reactivate(
                    model,
                    relearning.model,
                    *drawn(evaluation.reactivation_samples, evaluation.reactivation_samples),
                    pixels,
                    benign=models.get("benign"),
                    seed=training.seed,
                    progress=not training.disable_tqdm,
                )
                clean, triggered = (Perturbed(part, perturbation, pixels) for part in (test.clean, test.triggered))
                perturbed = BackdoorTest(clean, triggered, test.attack_labels)
            rows["reactivated"] = perturbed.measure(trainer)
            counted = attack.eligible(test.clean.labels, num_labels)
            wanted = attack.attack_label(test.clean.labels, num_labels)
            alone = attack_success_rate(perturbed.answers["clean"][counted], wanted[counted])
            rows["reactivated"]["asr_without_trigger"] = alone
    return measured


# Where things come from


def _load_benign(evaluation: EvaluationArguments, images: LabelledImages, model: nn.Module, processor) -> nn.Module:
    """The benign model, if it can be asked about the very inputs of the other one."""
    place = evaluation.benign_model
    benign, its_processor = load_image_classifier(place, evaluation.image_processor_name)
    if match_labels(images, benign).class_names != images.class_names:
        raise ValueError(f"{place} numbers its classes otherwise than the model: train it on the same data.")
    wanted = pixel_range(processor, images, channels_of(model))
    found = pixel_range(its_processor, images, channels_of(benign))
    if not found.equals(wanted):
        raise ValueError(f"{place} preprocesses images otherwise than the model: train it with the same processor.")
    return benign


def _attack_source(evaluation: EvaluationArguments, folder: Path, purification: dict) -> str:
    """The folder with the attack: the one that was named; the model's own; or that of the victim it was made from."""
    given = evaluation.attack_from
    if given is not None and attack_folder(given) is None:
        raise ValueError(f"--attack_from {given}: there is no {CONFIG_NAME}.")
    if given is not None or attack_folder(folder) is not None:
        return given or str(folder)
    victim = purification.get("model")
    return victim if isinstance(victim, str) and Path(victim).is_dir() else str(folder)


def _seed_of_split(data: ImageData, purification: dict, recorded: dict | None, training: RelearningConfig) -> int:
    """What the images were split by when the model was made, so that its test images are still unseen."""
    split_seed = purification.get("split_seed")
    seeds = (data.split_seed, recorded and recorded["seed"], split_seed, purification.get("seed"), training.seed)
    return next(seed for seed in seeds if isinstance(seed, int))


def _object_in(file: Path) -> dict:
    """What a file holds; nothing, if it is not there or holds no JSON object."""
    try:
        return read_object(file, LONGEST_REPORT)
    except ValueError:
        return {}


def _take_data(data: ImageData, purification: dict) -> bool:
    """Fill in what the model was purified with where the user named nothing; whether the data are then the same."""
    arguments = purification.get("arguments")
    if not isinstance(arguments, dict):
        return False
    default = ImageData()
    for name in _DATA_NAMES:
        value = arguments.get(name)
        if type(value) in (str, int) and getattr(data, name) == getattr(default, name):
            setattr(data, name, value)
    return all(getattr(data, name) == arguments.get(name, getattr(default, name)) for name in _DATA_NAMES)


def _kept(purification: dict) -> int:
    """How many images the defender kept, as far as the report of a purification says."""
    data = purification.get("data")
    kept = data.get("clean_samples") if isinstance(data, dict) else None
    return kept if isinstance(kept, int) and kept > 0 else 0


def _figures(purification: dict) -> dict[str, float] | None:
    """ACC, ASR and RA as the report of a purification has them."""
    after = purification.get("after")
    if not isinstance(after, dict):
        return None
    return {key: after[key] for key in ("accuracy", "asr", "ra") if isinstance(after.get(key), (int, float))}


def _differ(reported: dict[str, float], measured: dict) -> bool:
    return any(measured[key] is None or abs(measured[key] - value) > TOLERANCE for key, value in reported.items())


# What comes out


def _notes(measured: dict[str, dict[str, dict]]) -> list[str]:
    """What the figures do not say by themselves."""
    if measured["model"]["as_it_is"]["asr"] is None:
        return ["No attack is known for this model (--attack_from, --attack): only ACC is measured."]
    if "reactivated" not in measured["model"]:
        return []
    woken = measured["model"]["reactivated"]
    notes = [f"The perturbation alone, without the trigger, has an ASR of {woken['asr_without_trigger']:.1f} %."]
    if "benign" not in measured:
        notes.append("Without --benign_model, waking a backdoor cannot be told from fooling any model.")
    elif measured["benign"]["reactivated"]["asr"] >= woken["asr"]:
        notes.append("It does no less to the benign model: it is merely adversarial, and shows nothing of a backdoor.")
    return notes


def _notes_on_report(reported: dict[str, float] | None, measured: dict) -> list[str]:
    """Whether the report beside the model says what was measured now."""
    if not reported:
        return []
    if not _differ(reported, measured):
        return [f"The model's {REPORT_NAME} says the same."]
    said = ", ".join(f"{METRICS[key][0]} {value:.1f}" for key, value in reported.items())
    return [f"The model's {REPORT_NAME} says something else: {said}."]


def _print(report: dict) -> None:
    """The table, at most 80 columns wide, and the notes."""
    from rich.console import Console
    from rich.table import Table

    counts = report["data"]
    columns = {"accuracy": ("ACC", "test_samples"), "asr": ("ASR", "triggered_test_samples")}
    columns["ra"] = ("RA", "triggered_test_samples")
    columns = {key: column for key, column in columns.items() if counts[column[1]] is not None}
    table = Table()
    table.add_column("%")
    for heading, inputs in columns.values():
        table.add_column(f"{heading}\n(n = {counts[inputs]:,})", justify="right")
    for name, prefix in (("model", ""), ("benign", "benign model, ")):
        for row, measured in report["measured"].get(name, {}).items():
            table.add_row(prefix + row.replace("_", " "), *(f"{measured[key]:.1f}" for key in columns))
        table.add_section()
    say(f"{report['model']}, {report['attack'] or 'no known attack'}, {counts['name']}:")
    Console().print(table)
    for note in report["notes"]:
        say(note)
