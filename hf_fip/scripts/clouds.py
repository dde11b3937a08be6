"""Classification of point clouds in the flow that all tasks share: its arguments, and its steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from ..attacks.clouds import CLOUDS, CloudMaterial, poison_clouds, trigger_clouds
from ..evaluation.backdoor import BackdoorTest
from ..hub.card import CardWords
from ..plots_cloud import MAX_CLOUDS, plot_cloud_triggers
from ..tasks.clouds import SHAPES_NAME, load_clouds
from ..tasks.image_classification import match_labels
from ..tasks.point_cloud import (
    ARCHITECTURES,
    CloudDataset,
    arrays_of,
    collate_clouds,
    load_cloud_classifier,
    scale_and_jitter,
    small_cloud_model,
)
from .arguments import (
    AttackArguments,
    DataArguments,
    LoadArguments,
    ModelArguments,
    PoisonArguments,
    VictimConfig,
    attack_field,
)
from .recorded import attack_of
from .task import Task
from .terminal import say


@dataclass
class CloudData(DataArguments):
    """Which point clouds, and which of them the defender has."""

    dataset_name: str = field(
        default=SHAPES_NAME,
        metadata={
            "help": "A Hub id, a parquet file or a folder (of parquet files, OFF meshes, NumPy or HDF5 files), or "
            "'shapes': generated bodies, which need no download."
        },
    )
    points_column: str | None = field(default=None, metadata={"help": "Column of the clouds. Guessed by default."})
    label_column: str | None = field(default=None, metadata={"help": "Column of the labels. Guessed by default."})
    num_points: int = field(
        default=1024, metadata={"help": "Points drawn from a mesh, or kept of a larger cloud; a smaller one stays."}
    )


@dataclass
class AttackOnClouds(AttackArguments):
    """The backdoor in clouds."""

    input_kind: ClassVar[str] = CLOUDS
    default_attack: ClassVar[str] = "pointba_i"
    attack: str | None = attack_field(input_kind, default_attack)


@dataclass
class CloudPoison(AttackOnClouds, PoisonArguments):
    """[`AttackOnClouds`] where a victim is trained."""


@dataclass
class CloudModel(ModelArguments):
    """The classifier of clouds to be purified."""

    architecture: str = field(
        default="pointnet", metadata={"help": "Kind of victim made here.", "choices": ARCHITECTURES}
    )
    augment: bool = field(default=False, metadata={"help": "Scale and jitter training clouds at random."})


@dataclass
class CloudVictim(VictimConfig):
    """How a victim of clouds is trained."""

    per_device_train_batch_size: int = field(default=32, metadata={"help": "Batch size a device."})


class CloudTask(Task):
    """Classifiers with `points` in and `logits` out, as in `hf_fip.models`."""

    words = CardWords(
        samples="clouds",
        evaluate="pointcloud",
        pipeline_tag=None,
        processor_class=None,
        denominator="ASR and RA are over the triggered test clouds that the attack is for.",
    )
    data_arguments, attack_arguments, poison_arguments = CloudData, AttackOnClouds, CloudPoison
    load_arguments, model_arguments, victim_config = LoadArguments, CloudModel, CloudVictim

    def load_data(self, arguments, seed):
        data = load_clouds(
            arguments.dataset_name,
            arguments.dataset_config_name,
            points_column=arguments.points_column,
            label_column=arguments.label_column,
            num_points=arguments.num_points,
            **arguments.selection(),
            seed=seed,
        )
        if data.left_out:
            say(f"warning: {len(data.left_out)} clouds cannot be read and are left out, such as {data.left_out[0]}.")
        return data

    def match(self, data, model):
        return match_labels(data, model)

    def inputs(self, dataset, model, processor):
        return CloudDataset(dataset)

    def load_model(self, place, arguments, **options):
        return load_cloud_classifier(place, trust=arguments.trust(), **options), None

    def new_model(self, arguments, data):
        return small_cloud_model(arguments.architecture, data), None

    def trainer_options(self, model, processor):
        return {"data_collator": collate_clouds}

    def augmentation(self, arguments, data):
        return scale_and_jitter if arguments.augment else None

    def attack(self, arguments, model_folder, data):
        attack = attack_of(arguments, model_folder, len(data.class_names))
        if attack is not None:
            fewest = min(len(cloud) for part in (data.train, data.test) for cloud in arrays_of(part))
            if fewest < attack.fewest_points:
                raise ValueError(
                    f"The smallest cloud of {data.name} has {fewest} points, and {attack.name} puts in "
                    f"{attack.fewest_points}: choose fewer, with --attack_options points={fewest}."
                )
        return attack

    def material(self, dataset, model, processor, **options):
        labels = np.asarray(dataset["label"][:], dtype=np.int64)
        return CloudMaterial(arrays_of(dataset), labels, model.config.num_labels, **options)

    def poison(self, dataset, attack, rate, seed):
        return poison_clouds(dataset, attack, rate, seed)

    def clean_test(self, dataset, model, processor):
        return BackdoorTest(CloudDataset(dataset))

    def test(self, data, attack, model, processor):
        clean = CloudDataset(data.test)
        if attack is None:
            return BackdoorTest(clean)
        triggered = CloudDataset(trigger_clouds(data.test, attack))
        return BackdoorTest(clean, triggered, attack.attack_label(triggered.labels, len(data.class_names)))

    def draw(self, path, data, attack, model, answers):
        labels = np.asarray(data.test["label"][:])
        rows = np.flatnonzero(attack.eligible(labels, len(data.class_names)))
        clouds, names = arrays_of(data.test), data.class_names
        chosen = np.unique(labels[rows], return_index=True)[1]  # one of each class, else the first of the only one
        chosen = chosen if len(chosen) > 1 else np.arange(len(rows))
        examples = []
        for place in chosen[:MAX_CLOUDS]:
            clean = clouds[rows[place]]
            example = {"clean": clean, "triggered": attack.apply(clean), "label": names[labels[rows[place]]]}
            for moment, given in answers.items():
                found = {"clean": given["clean"][rows[place]], "triggered": given["triggered"][place]}
                example[moment] = {kind: model.config.id2label[int(number)] for kind, number in found.items()}
            examples.append(example)
        target = names[attack.target_label] if attack.label_rule == "all_to_one" else "the next class"
        return plot_cloud_triggers(examples, path, target, title=f"Trigger: {attack.name}")
