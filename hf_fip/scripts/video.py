"""Video classification in the flow that all tasks share: its arguments, and its steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from ..attacks.clips import FRAMES_COLUMN, VIDEO, poison_clips, to_clip, trigger_clips
from ..attacks.pixels import fitted
from ..evaluation.backdoor import BackdoorTest
from ..evaluation.reactivation import PixelRange
from ..hub.card import CardWords
from ..plots_video import MAX_CLIPS, plot_clip_triggers
from ..tasks.augmentation import disturb, shift_and_flip
from ..tasks.video_classification import (
    ARCHITECTURES,
    ClipDataset,
    FrameProcessor,
    clip_material,
    collate_clips,
    load_video_classifier,
    match_clips,
    on_frames,
    small_video_model,
)
from ..tasks.video_data import MOTIONS_NAME, load_clips
from .arguments import AttackArguments, DataArguments, ModelArguments, PoisonArguments, VictimConfig, attack_field
from .images import ImageLoad, ImageMethod, channels_of, wanted
from .recorded import attack_of
from .task import Task
from .terminal import say


@dataclass
class VideoData(DataArguments):
    """Which clips, and which of them the defender has."""

    dataset_name: str = field(
        default=MOTIONS_NAME,
        metadata={
            "help": "A Hub id, a parquet file, or a folder (of parquet files, of videos, or of frames; UCF101 and "
            "HMDB51 as they are shared), or 'motions': generated clips, which need no download."
        },
    )
    clip_column: str | None = field(default=None, metadata={"help": "Column of the clips. Guessed by default."})
    label_column: str | None = field(default=None, metadata={"help": "Column of the labels. Guessed by default."})
    num_frames: int = field(
        default=8, metadata={"help": "Frames of each clip, evenly spaced in time; shorter clips are stretched."}
    )
    frame_size: int = field(
        default=112, metadata={"help": "Shorter side in pixels that larger frames are brought to when read."}
    )
    fold: int = field(default=1, metadata={"help": "Which of the official splits of UCF101 or HMDB51."})


@dataclass
class AttackOnClips(AttackArguments):
    """The backdoor in clips."""

    input_kind: ClassVar[str] = VIDEO
    default_attack: ClassVar[str] = "frame_badnets"
    attack: str | None = attack_field(input_kind, default_attack)


@dataclass
class VideoPoison(AttackOnClips, PoisonArguments):
    """[`AttackOnClips`] where a victim is trained."""


@dataclass
class VideoModel(ModelArguments, ImageLoad):
    """The classifier of clips to be purified."""

    architecture: str = field(
        default="cnn_lstm",
        metadata={"help": "Kind of victim made here, small and untrained.", "choices": tuple(ARCHITECTURES)},
    )
    augment: bool = field(default=False, metadata={"help": "Shift training clips at random, all frames alike."})


@dataclass
class VideoVictim(VictimConfig):
    """How a victim of clips is trained."""

    per_device_train_batch_size: int = field(default=32, metadata={"help": "Batch size a device."})


class VideoTask(Task):
    """Any `AutoModelForVideoClassification`."""

    words = CardWords(
        samples="clips",
        pipeline_tag="video-classification",
        evaluate="video",
        denominator="ASR and RA are over the triggered test clips whose true class is not the target.",
    )
    data_arguments, attack_arguments, poison_arguments = VideoData, AttackOnClips, VideoPoison
    load_arguments, model_arguments = ImageLoad, VideoModel
    method_arguments, victim_config = ImageMethod, VideoVictim

    def load_data(self, arguments, seed):
        data = load_clips(
            arguments.dataset_name,
            arguments.dataset_config_name,
            clip_column=arguments.clip_column,
            label_column=arguments.label_column,
            num_frames=arguments.num_frames,
            frame_size=arguments.frame_size,
            fold=arguments.fold,
            **arguments.selection(),
            seed=seed,
        )
        if data.left_out:
            say(f"warning: {len(data.left_out)} clips cannot be read and are left out, such as {data.left_out[0]}.")
        return data

    def match(self, data, model):
        return match_clips(data, model)

    def inputs(self, dataset, model, processor):
        return ClipDataset(dataset, processor, channels_of(model))

    def load_model(self, place, arguments, **options):
        return load_video_classifier(place, arguments.image_processor_name, trust=arguments.trust(), **options)

    def new_model(self, arguments, data):
        return small_video_model(arguments.architecture, data)

    def trainer_options(self, model, processor):
        return {"data_collator": collate_clips}

    def augmentation(self, arguments, data):
        # No mirror images: of a motion or a sign they may show another class.
        return on_frames(shift_and_flip(1 / 8, flip=False)) if arguments.augment else None

    def disturbance(self, arguments, data, model, processor):
        if not arguments.disturb:
            return None
        height, width = to_clip(data.train[0][FRAMES_COLUMN]).shape[1:3]
        return on_frames(disturb(PixelRange.of(FrameProcessor(processor), height, width, channels_of(model))))

    def attack(self, arguments, model_folder, data):
        return attack_of(arguments, model_folder, len(data.class_names))

    def material(self, dataset, model, processor, **options):
        return clip_material(dataset, model.config.num_labels, processor, channels_of(model), **options)

    def poison(self, dataset, attack, rate, seed):
        return poison_clips(dataset, attack, rate, seed)

    def clean_test(self, dataset, model, processor):
        return BackdoorTest(self.inputs(dataset, model, processor))

    def test(self, data, attack, model, processor):
        clean = self.inputs(data.test, model, processor)
        if attack is None:
            return BackdoorTest(clean)
        triggered = self.inputs(trigger_clips(data.test, attack), model, processor)
        return BackdoorTest(clean, triggered, attack.attack_label(triggered.labels, len(data.class_names)))

    def draw(self, path, data, attack, model, answers):
        labels = np.asarray(data.test["label"][:])
        rows = np.flatnonzero(attack.eligible(labels, len(data.class_names)))
        names = {**model.config.id2label, **dict(enumerate(data.class_names))}
        examples = []
        for place in np.unique(labels[rows], return_index=True)[1][:MAX_CLIPS]:  # one of each class
            row = int(rows[place])
            clean = to_clip(data.test[row][FRAMES_COLUMN])
            triggered = attack.apply(clean)
            clean = np.stack([fitted(frame, *triggered.shape[1:]) for frame in clean])
            example = {"clean": clean, "triggered": triggered, "label": names[labels[row]]}
            for moment, given in answers.items():
                example[moment] = {"clean": names[given["clean"][row]], "triggered": names[given["triggered"][place]]}
            examples.append(example)
        target = wanted(attack, data.class_names)
        return plot_clip_triggers(examples, path, target, title=f"Trigger: {attack.name}")
