"""NAD: neural attention distillation, from a fine-tuned copy of the model.

Source: Li et al., *Neural Attention Distillation: Erasing Backdoor Triggers from Deep Neural Networks*, ICLR 2021.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PrinterCallback
from transformers.trainer_utils import has_length

from .fine_tuning import FineTuningConfig, FineTuningTrainer

_STAGES = 3  # whose attention is distilled
_POOLINGS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


@dataclass
class NADConfig(FineTuningConfig):
    """Arguments of [`NADTrainer`], with what BackdoorBench's `defense/nad.py` (f02e353) does on CIFAR-10.

    Those of `ft`, but 10 epochs for the student as for the teacher (its `te_epochs`; its configuration's 100 `epochs`
    are never read), and a constant rate: the program's own steps leave 0.01 only after epoch 20. Weight decay is its
    `wd`; its `weight_decay` of 0.0001 is never read. A departure: its teacher's rate falls by 2 %, on a cosine of 100
    epochs.

    Raises:
        ValueError: a weight is negative, `attention_power` is not positive, or `teacher_epochs` is not.
    """

    lr_scheduler_type: str = field(default="constant", metadata={"help": "The learning-rate schedule."})
    num_train_epochs: float = field(default=10.0, metadata={"help": "Epochs of the student, unless max_steps is set."})
    teacher_epochs: float = field(default=10.0, metadata={"help": "Epochs of the teacher's fine-tuning."})
    beta_low: float = field(default=500.0, metadata={"help": "Weight of the attention in the lowest stage."})
    beta_middle: float = field(default=1000.0, metadata={"help": "Weight of the attention in the middle stage."})
    beta_high: float = field(default=1000.0, metadata={"help": "Weight of the attention in the highest stage."})
    attention_power: float = field(default=2.0, metadata={"help": "Power p of |activation| in an attention map."})

    def check(self) -> None:
        super().check()
        for name in ("beta_low", "beta_middle", "beta_high"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} has to be zero or positive, and finite.")
        for name in ("attention_power", "teacher_epochs"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} has to be positive, and finite.")


class NADTrainer(FineTuningTrainer):
    """
    Fine-tunes a copy of the model, the teacher, then the model with Σ_l β_l · MSE(A(student_l), A(teacher_l)) added.

    A is the attention map of a stage: Σ_channels |activation|^p, scaled to norm 1 for each image. The stages are those
    of [`stages_of`]: of a ResNet its last three, of a ViT the blocks at a third, at two thirds and at the end of its
    depth, whose tokens (the class token too) stand where a convolution has positions. A model with fewer than three
    has the weights of the highest ones.

    The teacher has the settings of the student, and `teacher_epochs`. It stays in eval mode, and is in each
    checkpoint: on Ctrl-C or SIGTERM while it is fine-tuned, the first one is written after the student's first update.
    Logs `attention_distance`, the sum above.

    Raises:
        ValueError: the model has no stages; with `compute_loss_func`; (from `train`) data without a length.
    """

    _config_class = NADConfig
    _keeps = True

    def __init__(self, *positional, **kwargs):
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("NAD adds to the mean loss of a batch: leave compute_loss_func out.")
        super().__init__(*positional, **kwargs)
        self.model_accepts_loss_kwargs = False  # its loss is a mean over the batch

    def check_model(self, model: nn.Module) -> None:
        stages_of(model)

    def begin(self) -> None:
        if not has_length(self.train_dataset):
            raise ValueError(
                "NAD fine-tunes its teacher by epochs, and the training data have no length (a stream?): pass a "
                "dataset with a length."
            )
        args = copy.copy(self.args)
        args.num_train_epochs, args.max_steps = args.teacher_epochs, -1
        args.save_strategy = args.eval_strategy = args.logging_strategy = "no"
        args.eval_on_start = args.load_best_model_at_end = args.push_to_hub = False
        args.report_to = []
        with TemporaryDirectory() as args.output_dir:
            trainer = FineTuningTrainer(
                copy.deepcopy(self.model),
                args,
                self.data_collator,
                self.train_dataset,
                train_transform=self._train_transform,
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        self.kept = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}

    def _set_up(self) -> None:
        super()._set_up()
        self._teacher = copy.deepcopy(self._unwrapped()).requires_grad_(False).eval()
        self._teacher.load_state_dict(self.kept)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not (model.training and torch.is_grad_enabled()):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with torch.no_grad(), outputs_of(stages_of(self._teacher)) as wanted:
            self._teacher(**inputs)
        with outputs_of(stages_of(self._unwrapped())) as found:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        betas = (self.args.beta_low, self.args.beta_middle, self.args.beta_high)[-len(found) :]
        distance = sum(
            beta * F.mse_loss(*(attention_map(output, self.args.attention_power) for output in pair))
            for beta, *pair in zip(betas, found, wanted, strict=True)
        )
        self._metrics["attention_distance"].append(distance.item())
        loss = loss + distance
        return (loss, outputs) if return_outputs else loss


def stages_of(model: nn.Module) -> list[nn.Module]:
    """The stages that are compared, low to high: the entries at a third, two thirds and the end of the model's stack.

    The stack is its first `nn.ModuleList` outside of any other: `stages` of a ResNet or ConvNeXt, `layers` of a ViT
    or Swin. In a network without one it is its `nn.Sequential`s side by side that have convolutions: `layer1`,
    `layer2`, … of other ResNets. Where there is one alone (`features` of a VGG), it is what comes before each pooling
    in it, or, without pooling, its entries that have convolutions.

    Raises:
        ValueError: there is none.
    """
    lists = (list(module) for module in model.modules() if isinstance(module, nn.ModuleList))
    stack = next(filter(None, lists), None) or _sequential_stages(model)
    if not stack:
        raise ValueError(
            f"NAD compares the stages of a model, and {type(model).__name__} has none: no nn.ModuleList, and no "
            "nn.Sequential with two convolutions or more."
        )
    ends = sorted({math.ceil(len(stack) * part / _STAGES) for part in range(1, _STAGES + 1)})
    return [stack[end - 1] for end in ends]


def _sequential_stages(model: nn.Module) -> list[nn.Module]:
    body, parts = model, [model]
    while len(parts) == 1:  # one that wraps the rest
        body, parts = parts[0], [child for child in parts[0].children() if _convolves(child)]
    sequences = [body] if isinstance(body, nn.Sequential) else [p for p in parts if isinstance(p, nn.Sequential)]
    if len(sequences) != 1:
        return sequences
    pooled = [layer for layer, after in pairwise(sequences[0]) if isinstance(after, _POOLINGS)]
    return pooled or [layer for layer in sequences[0] if _convolves(layer)]


def _convolves(module: nn.Module) -> bool:
    return any(isinstance(inner, nn.Conv2d) for inner in module.modules())


@contextmanager
def outputs_of(modules: list[nn.Module]) -> Iterator[list[Tensor]]:
    """Collects what the modules give in a forward pass within the block, in the order of `modules`."""
    found: list[Tensor] = []

    def collect(module, inputs, output):
        found.append(output if isinstance(output, Tensor) else output[0])

    handles = [module.register_forward_hook(collect) for module in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def attention_map(activation: Tensor, power: float) -> Tensor:
    """Σ_channels |activation|^power, scaled to norm 1 for each image.

    Args:
        activation: (B, C, H, W) of a convolution, or (B, T, C) of a transformer's block.

    Returns:
        (B, H · W), or (B, T).
    """
    channels = 1 if activation.ndim == 4 else -1
    attention = activation.float().abs().pow(power).sum(channels).flatten(1)
    return attention / (attention.norm(dim=1, keepdim=True) + 1e-6)
