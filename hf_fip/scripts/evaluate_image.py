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

import tempfile
from dataclasses import dataclass, field
from functools import partial

from torch import nn
from transformers import Trainer

from ..evaluation.backdoor import BackdoorTest
from ..evaluation.metrics import attack_success_rate
from ..evaluation.reactivation import SAMPLES, Perturbed, reactivate
from ..evaluation.relearning import CLEAN_SHARE, TRIGGERED, RelearningConfig, attackers_images, relearning_trainer
from ..tasks.image_classification import PixelDataset, load_image_classifier, match_labels
from . import evaluation
from .arguments import COMMON_DEFAULTS, AttackArguments, parse
from .evaluation import EvaluationArguments, Given, Measured
from .images import ImageData, ImageLoad, ImageTask, channels_of, pixel_range, reading
from .terminal import show_progress


@dataclass
class Moves:
    """What an attacker may try next."""

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


def main() -> None:
    """`hf-fip evaluate`, `recipes/evaluate_image.py`."""
    evaluation.take_model()
    groups = (ImageData, AttackArguments, ImageLoad, EvaluationArguments, Moves, RelearningConfig)
    *arguments, moves, training = parse(groups, __doc__, output_dir="", **COMMON_DEFAULTS)
    evaluation.evaluate(ImageTask(), *arguments, training, moves, measure=partial(measure, moves=moves))


def measure(given: Given, training: RelearningConfig, moves: Moves) -> tuple[Measured, list[str]]:
    """ACC, ASR and RA of the model, and of the benign one, as they are and after each move."""
    if given.attack is None and (moves.relearn or moves.reactivate):
        raise ValueError(
            f"No attack is known for {given.place}: name its victim's folder (--attack_from) or the attack (--attack)."
        )
    models = {"model": given.model}
    if moves.benign_model is not None:
        models["benign"] = _load_benign(moves.benign_model, given).to(training.device)
    asked, measured = training.output_dir, {}
    with tempfile.TemporaryDirectory() as training.output_dir:
        perturbed = None
        for name, model in models.items():
            measured[name], perturbed = _moved(model, models.get("benign"), given, perturbed, moves, training)
    training.output_dir = asked
    return measured, _notes(measured)


def _moved(
    model: nn.Module,
    benign: nn.Module | None,
    given: Given,
    perturbed: BackdoorTest | None,
    moves: Moves,
    training: RelearningConfig,
) -> tuple[dict[str, dict], BackdoorTest | None]:
    """The figures of one model. The perturbation is learned on the first and tried on the others."""
    test, attack, num_labels = given.test, given.attack, len(given.data.class_names)
    trainer = Trainer(model, training)
    show_progress(trainer)
    rows = {"as_it_is": test.measure(trainer)}
    if moves.relearn or moves.reactivate:
        clean, triggered = _drawn(given, max(1, round(CLEAN_SHARE * len(given.attackers))), TRIGGERED, training.seed)
        labels = attack.attack_label(triggered.labels, num_labels)
        relearning = relearning_trainer(model, clean, triggered, labels, training)
        show_progress(relearning)
        relearning.train()
        rows["relearned"] = test.measure(relearning)
    if not moves.reactivate:
        return rows, None
    if perturbed is None:
        pixels = pixel_range(given.processor, given.data, channels_of(model))
        drawn = _drawn(given, moves.reactivation_samples, moves.reactivation_samples, training.seed)
        perturbation = reactivate(
            model,
            relearning.model,
            *drawn,
            pixels,
            benign=benign,
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
    return rows, perturbed


def _drawn(given: Given, clean: int, triggered: int, seed: int) -> list[PixelDataset]:
    with reading(given.data):
        parts = attackers_images(given.attackers, given.attack, clean, triggered, seed)
    return [PixelDataset(part, given.processor, channels_of(given.model)) for part in parts]


def _load_benign(place: str, given: Given) -> nn.Module:
    """The benign model, if it can be asked about the very inputs of the other one."""
    benign, its_processor = load_image_classifier(place, given.loading.image_processor_name)
    if match_labels(given.data, benign).class_names != given.data.class_names:
        raise ValueError(f"{place} numbers its classes otherwise than the model: train it on the same data.")
    wanted = pixel_range(given.processor, given.data, channels_of(given.model))
    found = pixel_range(its_processor, given.data, channels_of(benign))
    if not found.equals(wanted):
        raise ValueError(f"{place} preprocesses images otherwise than the model: train it with the same processor.")
    return benign


def _notes(measured: Measured) -> list[str]:
    """What the figures of a perturbation do not say by themselves."""
    if "reactivated" not in measured["model"]:
        return []
    woken = measured["model"]["reactivated"]
    notes = [f"The perturbation alone, without the trigger, has an ASR of {woken['asr_without_trigger']:.1f} %."]
    if "benign" not in measured:
        notes.append("Without --benign_model, waking a backdoor cannot be told from fooling any model.")
    elif measured["benign"]["reactivated"]["asr"] >= woken["asr"]:
        notes.append("It does no less to the benign model: it is merely adversarial, and shows nothing of a backdoor.")
    return notes
