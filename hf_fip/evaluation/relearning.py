"""Relearning: how fast a purified model takes its backdoor back.

Whoever fine-tunes the purified model later may do so on data with a few triggered images among them. A model that only
hid its backdoor learns it again from those at once; a benign model, attacked in the same way, is the comparison.

Source: Min et al., *Uncovering, Explaining, and Mitigating the Superficial Safety of Backdoor Defense*, NeurIPS 2024
(the retuning attack: 2 % clean images, 5 triggered ones, 5 epochs of SGD at 0.01). Gradients are clipped to norm 1
here, the Trainer's default, and not in the authors' `ft_poison.py`.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field

import numpy as np
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import ConcatDataset
from torch.utils.data import Dataset as TorchDataset
from transformers import Trainer, TrainingArguments

from ..attacks import Attack, trigger
from ..fisher.likelihood import at_least_float32, get_logits
from ..lone_sample import lone_sample

CLEAN_SHARE = 0.02  # of the attacker's images
TRIGGERED = 5  # images
_UPDATES_PER_EPOCH = 8  # on little data; as with the 1,000 images that are 2 % of CIFAR-10


@dataclass
class RelearningConfig(TrainingArguments):
    """A `TrainingArguments` with the defaults of the attack; everything can be chosen otherwise."""

    num_train_epochs: float = field(default=5.0, metadata={"help": "Passes over the images of the relearning."})
    per_device_train_batch_size: int = field(
        default=128, metadata={"help": "Largest batch size a device; smaller on little data."}
    )
    learning_rate: float = field(default=0.01, metadata={"help": "The learning rate of the relearning."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "The learning-rate schedule."})
    optim: str = field(default="sgd", metadata={"help": "The optimizer to use."})
    optim_args: str | None = field(
        default=None, metadata={"help": "Arguments of the optimizer (for sgd, momentum=0.9 unless you set them)."}
    )
    save_strategy: str = field(default="no", metadata={"help": "When to save a checkpoint."})
    logging_strategy: str = field(default="no", metadata={"help": "When to log."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Drop what the model's forward lacks."})
    label_names: list[str] | None = field(
        default_factory=lambda: ["labels"], metadata={"help": "Keys of the labels among the inputs."}
    )

    def __post_init__(self):
        if self.optim == "sgd" and self.optim_args is None:
            self.optim_args = "momentum=0.9"
        super().__post_init__()


def relearning_trainer(
    model: nn.Module, clean: TorchDataset, triggered: TorchDataset, attack_labels: np.ndarray, args: RelearningConfig
) -> Trainer:
    """A trainer whose `train()` teaches a copy of a model the backdoor again: all its weights are trained.

    On little data the batch is made smaller, so that an epoch has 8 updates as it has on CIFAR-10, or 5 to 7 where the
    images do not divide so: 7 of 27 images.

    Args:
        model: any classifier whose output has `.logits`; left as it is. Of a PEFT model the copy is merged.
        clean: model inputs with true labels, `{"pixel_values": (C, H, W), "labels": int}`.
        triggered: the same kind, with the trigger; their labels are not read.
        attack_labels: `(len(triggered),)`, what the attacker wants for those.
        args: with `seed`, which decides everything.

    Raises:
        ValueError: when there are no triggered inputs, or other than one attack label for each.
    """
    if not 0 < len(triggered) == len(attack_labels):
        raise ValueError(
            f"Relearning needs triggered inputs with a label each, and got {len(triggered)} inputs and "
            f"{len(attack_labels)} labels."
        )
    student = copy.deepcopy(model)
    if hasattr(student, "merge_and_unload"):
        student = student.merge_and_unload()
    data = ConcatDataset([clean, _Relabelled(triggered, attack_labels)])
    args = copy.copy(args)
    batch_size = math.ceil(len(data) / _UPDATES_PER_EPOCH / args.world_size)
    args.per_device_train_batch_size = min(batch_size, args.per_device_train_batch_size)
    return _Relearning(student.requires_grad_(True), args, train_dataset=data, compute_loss_func=_cross_entropy)


def attackers_images(
    images: Dataset, attack: Attack, clean: int, triggered: int, seed: int = 0
) -> tuple[Dataset, Dataset]:
    """Draw what an attacker uses after purification: some images as they are, and others with the trigger.

    Args:
        images: with the columns `image` and `label`, a `ClassLabel`; none of those that are measured on.
        attack: puts the trigger on images whose label it would change.
        clean, triggered: how many, one or more. No image is in both.
        seed: of the draw.

    Returns:
        Two data sets of such rows, both with the true labels.

    Raises:
        ValueError: when there are too few images.
    """
    if min(clean, triggered) < 1:
        raise ValueError(f"clean={clean} and triggered={triggered} have to be at least 1 (--reactivation_samples).")
    order = np.random.default_rng(seed).permutation(len(images))
    labels, num_labels = np.asarray(images["label"][:])[order], images.features["label"].num_classes
    eligible = order[clean:][attack.eligible(labels, num_labels)[clean:]]
    if clean > len(images) or triggered > len(eligible):
        raise ValueError(
            f"The attack needs {clean} clean images and {triggered} others that can carry the trigger, and of these "
            f"{len(images)} that leaves {len(eligible)}: give it more, or ask for fewer (--reactivation_samples)."
        )
    return images.select(np.sort(order[:clean])), trigger(images.select(np.sort(eligible[:triggered])), attack)


class _Relearning(Trainer):
    """Its last batch may be one image."""

    def training_step(self, model, inputs, *positional, **kwargs):
        with lone_sample(self.model, inputs):
            return super().training_step(model, inputs, *positional, **kwargs)


class _Relabelled(TorchDataset):
    """The same inputs with other labels."""

    def __init__(self, dataset: TorchDataset, labels: np.ndarray):
        self.dataset, self.labels = dataset, labels

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> dict:
        return {**self.dataset[row], "labels": int(self.labels[row])}


def _cross_entropy(outputs, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
    """The mean over all micro-batches of an update."""
    total = F.cross_entropy(at_least_float32(get_logits(outputs)), labels, reduction="sum")
    return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)
