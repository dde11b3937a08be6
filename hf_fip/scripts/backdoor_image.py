"""Train an image classifier with a backdoor: the victim that purification is tested on.

One folder comes out: the model, its attack (attack.json, attack.safetensors) and report.json with ACC, ASR and RA.
The defender's clean split is set aside first and never trained on.

    python recipes/backdoor_image.py --attack wanet --architecture resnet
    accelerate launch recipes/backdoor_image.py --dataset_name cifar10 --attack blend --augment
"""

from __future__ import annotations

from transformers import set_seed

from ..attacks import poison
from ..evaluation.metrics import WEAK_VICTIM
from ..tasks.data import LabelledImages, split_clean
from ..tasks.image_classification import PixelDataset, load_image_classifier, match_labels, small_model
from ..trainer import FIPTrainer
from .arguments import COMMON_DEFAULTS, AttackArguments, DataArguments, ModelArguments, VictimConfig, parse
from .images import attack_of, augmentation, channels_of, images_of, make_test, reading
from .report import REPORT_NAME, Cost, non_default, versions
from .run_folder import RunFolder, write_json
from .terminal import say, show_progress


def main() -> None:
    """`recipes/backdoor_image.py`."""
    groups = (DataArguments, AttackArguments, ModelArguments, VictimConfig)
    data, attack, model, training = parse(groups, __doc__, output_dir="outputs/victim", **COMMON_DEFAULTS)
    train_victim(images_of(data, _split_seed(data, training)), data, attack, model, training)


def train_victim(
    images: LabelledImages,
    data: DataArguments,
    attack_arguments: AttackArguments,
    model_arguments: ModelArguments,
    training: VictimConfig,
) -> None:
    """Train a victim on poisoned images and write the folder `training.output_dir`."""
    output_dir = training.output_dir
    arguments = non_default(data, attack_arguments, model_arguments, training)
    folder = RunFolder(output_dir, arguments, overwrite=model_arguments.overwrite_output_dir)
    training.output_dir = str(folder.work)
    set_seed(training.seed)
    if model_arguments.model_name_or_path:
        model, processor = load_image_classifier(
            model_arguments.model_name_or_path,
            model_arguments.image_processor_name,
            revision=model_arguments.model_revision,
        )
        images = match_labels(images, model)
    else:
        model, processor = small_model(model_arguments.architecture, images)
    attack = attack_of(attack_arguments, None, len(images.class_names))
    count, seed = data.clean_count(len(images.train)), _split_seed(data, training)
    _, rest = split_clean(images.train, count, seed)

    with folder:
        test = make_test(images, attack, processor, channels_of(model))
        with reading(images):
            poisoned = poison(rest, attack, attack_arguments.poison_rate, training.seed)
        cost = Cost()
        trainer = FIPTrainer(
            model,
            training,
            train_dataset=PixelDataset(poisoned, processor, channels_of(model)),
            processing_class=processor,
            train_transform=augmentation(model_arguments.augment, images),
            callbacks=[cost],
        )
        show_progress(trainer)
        trainer.train(resume_from_checkpoint=folder.checkpoint or training.resume_from_checkpoint)
        measured = test.measure(trainer)
        trainer.save_model(str(folder.result))
        if trainer.is_world_process_zero():
            attack.save_pretrained(folder.result)
            report = {
                "victim": measured,
                "attack": attack.name,
                "clean_split": {"data": images.name, "out_of": len(images.train), "seed": seed, "samples": count},
                "data": {"name": images.name, "training_samples": len(poisoned), "test_samples": len(images.test)},
                "cost": cost.report,
                "arguments": arguments,
                "seed": training.seed,
                "versions": versions(),
            }
            write_json(folder.result / REPORT_NAME, report)
        folder.publish()
    say(f"victim: ACC {measured['accuracy']:.1f} %, ASR {measured['asr']:.1f} %, RA {measured['ra']:.1f} %")
    if measured["asr"] < WEAK_VICTIM:
        say(f"warning: an ASR below {WEAK_VICTIM:.0f} % proves nothing about purification: train longer, poison more.")
    say(f"saved to {output_dir}")


def _split_seed(data: DataArguments, training: VictimConfig) -> int:
    return training.seed if data.split_seed is None else data.split_seed
