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
from ..tasks.image_classification import ARCHITECTURES, PixelDataset, check_labels, load_image_classifier
from ..trainer import FIPTrainer
from .arguments import COMMON_DEFAULTS, AttackArguments, DataArguments, ModelArguments, VictimConfig, parse
from .images import attack_of, augmentation, channels_of, images_of, make_test
from .report import REPORT_NAME, Cost, non_default, versions
from .run_folder import RunFolder, write_json
from .terminal import quiet, say


def main() -> None:
    """`recipes/backdoor_image.py`."""
    groups = (DataArguments, AttackArguments, ModelArguments, VictimConfig)
    data, attack, model, training = parse(groups, __doc__, output_dir="outputs/victim", **COMMON_DEFAULTS)
    output_dir = training.output_dir
    images = images_of(data, training.seed if data.split_seed is None else data.split_seed)
    train_victim(images, data, attack, model, training)
    say(f"saved to {output_dir}")


def train_victim(
    images: LabelledImages,
    data: DataArguments,
    attack_arguments: AttackArguments,
    model_arguments: ModelArguments,
    training: VictimConfig,
) -> None:
    """Train a victim on poisoned images and write the folder `training.output_dir`."""
    attack = attack_of(attack_arguments, None, len(images.class_names))
    split = {
        "seed": training.seed if data.split_seed is None else data.split_seed,
        "samples": data.clean_count(len(images.train)),
    }
    _, rest = split_clean(images.train, **split)
    poisoned = poison(rest, attack, attack_arguments.poison_rate, training.seed)
    set_seed(training.seed)
    if model_arguments.model_name_or_path:
        model, processor = load_image_classifier(
            model_arguments.model_name_or_path,
            model_arguments.image_processor_name,
            revision=model_arguments.model_revision,
        )
        check_labels(model, images.class_names, images.name)
    else:
        first = images.train[0]["image"]
        build = ARCHITECTURES[model_arguments.architecture]
        model, processor = build(images.class_names, max(first.size), 1 if first.mode in ("L", "1", "I;16") else 3)

    arguments = non_default(data, attack_arguments, model_arguments, training)
    folder = RunFolder(training.output_dir, arguments, overwrite=model_arguments.overwrite_output_dir)
    training.output_dir = str(folder.work)
    with folder:
        test = make_test(images, attack, processor, channels_of(model))
        trainer = FIPTrainer(
            model,
            training,
            train_dataset=PixelDataset(poisoned, processor, channels_of(model)),
            processing_class=processor,
            train_transform=augmentation(model_arguments.augment, images),
        )
        quiet(trainer)
        with Cost(model, training.device) as cost:
            trainer.train(resume_from_checkpoint=training.resume_from_checkpoint or folder.checkpoint)
        measured = test.measure(trainer)
        say(f"victim: ACC {measured['accuracy']:.1f} %, ASR {measured['asr']:.1f} %, RA {measured['ra']:.1f} %")
        if measured["asr"] < WEAK_VICTIM:
            say(
                f"warning: an ASR below {WEAK_VICTIM} % proves nothing about purification: "
                "train longer or poison more."
            )
        trainer.save_model(str(folder.work))
        if trainer.is_world_process_zero():
            attack.save_pretrained(folder.work)
            report = {
                "victim": measured,
                "attack": attack.name,
                "clean_split": split,
                "data": {"name": images.name, "training_samples": len(poisoned), "test_samples": len(images.test)},
                "cost": cost.report(trainer.state.global_step),
                "arguments": arguments,
                "seed": training.seed,
                "versions": versions(),
            }
            write_json(folder.work / REPORT_NAME, report)
        folder.publish()
