"""What the baselines share: the trainer and the arguments of FIP, without FIP."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..compatibility import is_set
from ..config import FIPConfig
from ..hub.load import load_model
from ..trainer import FIPTrainer

KEPT_NAME = "baseline.safetensors"  # in a checkpoint


@dataclass
class BaselineConfig(FIPConfig):
    """A [`FIPConfig`] without FIP's regularisers.

    Raises:
        ValueError: `eta_f` or `eta_r` is not zero.
    """

    eta_f: float = field(default=0.0, metadata={"help": "Zero: FIP's regularisers are no part of this method."})

    def check(self) -> None:
        super().check()
        if self.eta_f or self.eta_r:
            raise ValueError(f"eta_f={self.eta_f} and eta_r={self.eta_r} are FIP's own: leave them at zero.")


class BaselineTrainer(FIPTrainer):
    """A [`FIPTrainer`] for another method.

    It does what `begin` says, trains, and does what `finish` says. `kept` is in every checkpoint and comes back when
    a run resumes.

    Raises:
        ValueError: with an adapter (the methods are defined on a model's own weights); on FSDP, DeepSpeed or several
            GPUs in one process; where the method is not defined for the model; (from `train`) when the checkpoint
            lacks what the method keeps.
    """

    _config_class = BaselineConfig
    _keeps = False  # whether `begin` fills `kept`

    def __init__(self, model=None, args=None, *positional, **kwargs):
        if isinstance(model, (str, os.PathLike)):
            model = load_model(model)
        if kwargs.get("peft_config") is not None or hasattr(model, "peft_config"):
            raise ValueError(
                f"{type(self).__name__} trains a model's own weights: leave `peft_config` out, or merge the adapter "
                "first (`merge_and_unload`)."
            )
        launched = is_set("ACCELERATE_USE_FSDP") or is_set("ACCELERATE_USE_DEEPSPEED")
        if launched or (args is not None and (args.fsdp or args.deepspeed or args.n_gpu > 1)):
            raise ValueError(
                f"{type(self).__name__} needs one whole model a process: leave FSDP and DeepSpeed out, and start one "
                "process a GPU with `accelerate launch`."
            )
        if model is not None:
            self.check_model(model)
        self.kept: dict[str, Tensor] = {}
        super().__init__(model, args, *positional, **kwargs)

    # ---- What a method fills in ----

    def check_model(self, model: nn.Module) -> None:
        """Raise a ValueError where the method is not defined for the model."""

    def begin(self) -> None:
        """What the method does before training, to `self.model` and `self.kept`; a run that resumes has it behind."""

    def finish(self) -> None:
        """What the method does to the model after training (prune it, for example)."""

    # ---- When ----

    def train(self, *positional, **kwargs):
        self.kept = {}
        self._has_begun = False
        result = super().train(*positional, **kwargs)
        self.finish()
        return result

    def _inner_training_loop(self, *positional, **kwargs):
        if not self._has_begun and not kwargs.get("resume_from_checkpoint"):
            self.begin()
        self._has_begun = True  # `auto_find_batch_size` comes here again
        return super()._inner_training_loop(*positional, **kwargs)

    def call_model_init(self, trial=None) -> nn.Module:
        model = super().call_model_init(trial)
        self.check_model(model)
        return model

    # ---- Checkpoints ----

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if not self._keeps:
            return
        path = os.path.join(resume_from_checkpoint, KEPT_NAME)
        if not os.path.isfile(path):
            raise ValueError(
                f"{resume_from_checkpoint} has no {KEPT_NAME}: it was made by another method, or with "
                "save_only_model. Start anew, without save_only_model."
            )
        self.kept = {name: tensor.to(self.args.device) for name, tensor in load_file(path).items()}

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        if self._keeps and self.args.should_save:
            tensors = {name: tensor.detach().contiguous() for name, tensor in self.kept.items()}
            save_file(tensors, os.path.join(output_dir, KEPT_NAME))


def head_of(model: nn.Module) -> nn.Linear:
    """The classifier's last layer: the last `nn.Linear` of the model, in the order in which modules are defined.

    Raises:
        ValueError: there is none, or it does not give one number a class.
    """
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    classes = getattr(getattr(model, "config", None), "num_labels", None)
    if not linears or classes not in (None, linears[-1].out_features):
        raise ValueError(f"{type(model).__name__} does not end in an nn.Linear that gives one number a class.")
    return linears[-1]
