"""Take the backdoor out of an image classifier, with a little clean data.

Without --model_name_or_path a small backdoored victim is trained first (and kept for the next time), on scikit-learn's
digits unless --dataset_name says otherwise. One folder comes out: the purified model, README.md (its card),
report.json (everything measured) and plots/.

    python recipes/purify_vit.py
    accelerate launch recipes/purify_vit.py --model_name_or_path someone/model --dataset_name cifar10
    python recipes/purify_cnn.py --dataset_name path/to/images --clean_samples 500 --eta_f 0.2
    python recipes/purify_vit.py --eta_f 0 --output_dir outputs/control      (plain fine-tuning, to compare)
"""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path

import numpy as np
from transformers import set_seed

from ..attacks import Attack
from ..config import FIPConfig
from ..evaluation.backdoor import BackdoorTest, PurificationCurve
from ..evaluation.metrics import WEAK_VICTIM, defense_effectiveness_rating
from ..hub.card import make_card
from ..plots import plot_purification, plot_triggers
from ..tasks.data import LabelledImages, split_clean
from ..tasks.image_classification import PixelDataset, check_labels, load_image_classifier
from ..trainer import FIPTrainer
from .arguments import COMMON_DEFAULTS, AttackArguments, DataArguments, ModelArguments, VictimConfig, parse
from .backdoor_image import train_victim
from .images import attack_of, augmentation, channels_of, images_of, make_test, recorded_split
from .report import REPORT_NAME, Cost, non_default, versions
from .run_folder import RunFolder, write_json
from .terminal import print_comparison, quiet, say

CURVE_SAMPLES = 500  # test images behind each point of the picture


def main(architecture: str) -> None:
    """`recipes/purify_vit.py` and `recipes/purify_cnn.py`: they differ in the victim made when no model is given."""
    groups = (DataArguments, AttackArguments, ModelArguments, FIPConfig)
    name = {"vit": "purify_vit", "resnet": "purify_cnn"}[architecture]
    data, attack, model, training = parse(
        groups,
        __doc__,
        output_dir=f"outputs/{name}",
        architecture=architecture,
        max_steps=300,
        per_device_train_batch_size=64,
        save_steps=100,
        save_total_limit=1,
        **COMMON_DEFAULTS,
    )
    purify(data, attack, model, training)


def purify(
    data: DataArguments, attack_arguments: AttackArguments, model_arguments: ModelArguments, training: FIPConfig
) -> None:
    """Purify a model and write the folder `training.output_dir`."""
    arguments = non_default(data, attack_arguments, model_arguments, training)
    folder = RunFolder(training.output_dir, arguments, overwrite=model_arguments.overwrite_output_dir)
    output_dir, training.output_dir = training.output_dir, str(folder.work)
    given = model_arguments.model_name_or_path
    recorded = recorded_split(given)
    split_seed = next(s for s in (data.split_seed, recorded and recorded["seed"], training.seed) if s is not None)
    images = images_of(data, split_seed)
    count = data.clean_count(len(images.train))
    clean, _ = split_clean(images.train, count, split_seed)
    if recorded and (split_seed != recorded["seed"] or count > recorded["samples"]):
        raise ValueError(
            f"The victim was trained on some of these {count} clean images: it kept {recorded['samples']} aside, with "
            f"--split_seed {recorded['seed']}. Use those (--clean_samples {recorded['samples']})."
        )
    place = given or _make_victim(images, data, attack_arguments, model_arguments, training)

    attack = attack_of(attack_arguments, place, len(images.class_names))
    model, processor = load_image_classifier(
        place, model_arguments.image_processor_name, revision=model_arguments.model_revision if given else None
    )
    check_labels(model, images.class_names, images.name)
    if attack is None:
        say("No attack is known for this model (--attack NAME): only ACC is measured.")
    with folder:
        test = make_test(images, attack, processor, channels_of(model))
        curve = PurificationCurve(_part(test))
        set_seed(training.seed)
        trainer = FIPTrainer(
            model,
            training,
            train_dataset=PixelDataset(clean, processor, channels_of(model)),
            processing_class=processor,
            train_transform=augmentation(model_arguments.augment, images),
            callbacks=[curve],
        )
        curve.trainer = trainer
        quiet(trainer)
        before = test.measure(trainer)
        answers_before = test.answers
        say(f"Purifying {place} with {count} clean images of {images.name}.")
        if attack is not None and before["asr"] < WEAK_VICTIM:
            say(f"warning: an ASR of {before['asr']:.1f} % before purification proves nothing about purification.")
        with Cost(model, training.device) as cost:
            trainer.train(resume_from_checkpoint=training.resume_from_checkpoint or folder.checkpoint)
        after = test.measure(trainer)
        trainer.save_model(training.output_dir)
        if trainer.is_world_process_zero():
            report = {
                "before": before,
                "after": after,
                "der": None if attack is None else defense_effectiveness_rating(before, after),
                "cost": cost.report(trainer.state.global_step),
                "model": place,
                "model_is_from_hub": bool(given) and not Path(given).exists(),
                "attack": attack and attack.name,
                "data": {"name": images.name, "clean_samples": count, "test_samples": len(images.test)},
                "arguments": arguments,
                "seed": training.seed,
                "versions": versions(),
            }
            write_json(folder.work / REPORT_NAME, report)
            plots = _draw(folder.work / "plots", trainer, curve.test, before, images, attack, answers_before, test)
            card = make_card(report, [f"plots/{path.name}" for path in plots], type(model).__name__)
            card.save(folder.work / "README.md")
            title = f"{place} → {output_dir}"
            print_comparison(before, after, report["der"], report["cost"], title)
        folder.publish()
    say(f"saved to {output_dir}: the purified model, README.md, report.json, plots/")


def _make_victim(images, data, attack_arguments, model_arguments, training) -> str:
    """The folder of a victim made for these data and this attack: trained now, or by an earlier run."""
    victim_training = VictimConfig(
        output_dir="unused",
        seed=training.seed,
        use_cpu=training.use_cpu,
        disable_tqdm=training.disable_tqdm,
        save_strategy="epoch",
        save_total_limit=1,
        **COMMON_DEFAULTS,
    )
    victim_model = copy.copy(model_arguments)
    victim_model.overwrite_output_dir = False
    wanted = non_default(data, attack_arguments, victim_model, victim_training)
    key = hashlib.sha256(json.dumps([wanted, versions()], sort_keys=True, default=str).encode()).hexdigest()[:8]
    attack_name = attack_of(attack_arguments, None, len(images.class_names)).name
    name = "-".join((model_arguments.architecture, Path(images.name).name, attack_name, key))
    place = Path(model_arguments.victims_dir) / name
    if place.exists():
        say(f"No --model_name_or_path: using the victim that an earlier run trained, {place}.")
        return str(place)
    say(f"No --model_name_or_path: training a small {model_arguments.architecture} with a backdoor first, {place}.")
    victim_training.output_dir = str(place)
    train_victim(images, data, attack_arguments, victim_model, victim_training)
    return str(place)


def _part(test: BackdoorTest) -> BackdoorTest:
    """The first rows of a test, for the picture's curve."""
    from torch.utils.data import Subset

    def head(dataset):
        return Subset(dataset, range(min(CURVE_SAMPLES, len(dataset))))

    if test.triggered is None:
        return BackdoorTest(head(test.clean))
    return BackdoorTest(head(test.clean), head(test.triggered), test.attack_labels[:CURVE_SAMPLES])


def _draw(folder, trainer, curve_test, before, images: LabelledImages, attack: Attack | None, answers, test) -> list:
    """purification.png, and triggers.png when the attack is known."""
    keys = {"curve_accuracy": "accuracy", "curve_asr": "asr", "fisher_trace": "fisher_trace"}
    history = [{"step": 0, "accuracy": before["accuracy"], "asr": before["asr"]}]
    for row in trainer.state.log_history:
        history.append({"step": row["step"], **{new: row[old] for old, new in keys.items() if old in row}})
    plots = [plot_purification(history, folder / "purification.png", title="Purification")]
    if attack is None:
        return plots
    labels = np.asarray(images.test["label"][:])
    rows = np.flatnonzero(attack.eligible(labels, len(images.class_names)))
    names = images.class_names
    chosen = [int(np.flatnonzero(labels[rows] == label)[0]) for label in np.unique(labels[rows])[:6]]
    examples = []
    for place in chosen:  # the place among the triggered images; rows[place] is the row of the test set
        row = int(rows[place])
        image = images.test[row]["image"]
        array = np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB"))
        array = array[..., None] if array.ndim == 2 else array
        examples.append(
            {
                "clean": array,
                "triggered": attack.apply(array),
                "label": names[labels[row]],
                "before": _named(answers, row, place, names),
                "after": _named(test.answers, row, place, names),
            }
        )
    target = names[attack.target_label] if attack.label_rule == "all_to_one" else ""
    plots.append(plot_triggers(examples, folder / "triggers.png", target=target, title=f"Trigger: {attack.name}"))
    return plots


def _named(answers: dict[str, np.ndarray], row: int, place: int, names: list[str]) -> dict[str, str]:
    return {"clean": names[answers["clean"][row]], "triggered": names[answers["triggered"][place]]}
