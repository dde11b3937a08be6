"""VictimTrainer: the trainer of a backdoored model, whatever the attack."""

from __future__ import annotations

import os

import numpy as np
import torch
from transformers import TrainerCallback

from ..fisher.passes import RandomState
from ..sharpness import SharpnessAware
from ..trainer import FIPTrainer
from .base import Attack
from .joint import JointTraining
from .material import Material

JOINT_NAME = "joint_training.pt"  # in a checkpoint
_ROLES = "roles"  # of the images of a batch


class VictimTrainer(SharpnessAware, FIPTrainer):
    """
    A [`FIPTrainer`] in whose training an attack can take part; without one that does, it is the `FIPTrainer`.

    With `args.rho` above 0 the attacker looks for a flat minimum, see [`SharpnessAware`].

    Args:
        attack ([`Attack`], *optional*), material ([`Material`], *optional*):
            The attack, and what it works with.
        *args, **kwargs:
            As in `FIPTrainer`. The training set has to give `roles` with each image if the attack takes part.

    Raises:
        ValueError: the attack takes part in the training, and that is to run on several processes or devices, in
            float16, with FIP's regularisers, label smoothing or `rho`; (from `train`) the images come without roles,
            or the checkpoint is of a training without the attack.
    """

    def __init__(self, model, args, *, attack: Attack | None = None, material: Material | None = None, **kwargs):
        self._joint: JointTraining | None = attack and attack.joint_training(material)
        if self._joint:
            _check(attack, args)
        super().__init__(model, args, **kwargs)
        if self._joint:
            self.model_accepts_loss_kwargs = False  # its loss is a mean over the batch
            self._victim = material.as_classifier(self.model)
            self.add_callback(_JointSteps(self._joint, self._victim))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not (self._joint and model.training and torch.is_grad_enabled()):
            inputs = {name: value for name, value in inputs.items() if name != _ROLES}
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if _ROLES not in inputs:
            raise ValueError(
                f"{self._joint.attack.name} takes part in the training and has to know which images are its own: "
                "train on a set made by `hf_fip.attacks.poison`."
            )
        images = self._victim.images(inputs["pixel_values"])
        progress = self.state.global_step / self.state.max_steps
        return self._joint.loss(self._victim, images, inputs["labels"], inputs[_ROLES], progress)

    def train(self, *positional, **kwargs):
        result = super().train(*positional, **kwargs)
        if self._joint:
            self._joint.finish()
        return result

    def _optimizers(self):
        return [*super()._optimizers(), *(self._joint.optimizers.values() if self._joint else ())]

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if self._joint and _ROLES not in self._signature_columns:
            self._signature_columns.append(_ROLES)

    # ---- Checkpoints ----

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_joint(resume_from_checkpoint)

    def _load_best_model(self):
        super()._load_best_model()
        self._load_joint(self.state.best_model_checkpoint)

    def _load_joint(self, checkpoint: str) -> None:
        if not self._joint:
            return
        path = os.path.join(checkpoint, JOINT_NAME)
        if not os.path.isfile(path):
            raise ValueError(
                f"{checkpoint} has no {JOINT_NAME}: it was made without {self._joint.attack.name}, or with "
                "save_only_model. Start anew, without save_only_model."
            )
        self._joint.load_state_dict(torch.load(path, map_location=self.args.device, weights_only=True))

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        if self._joint:
            torch.save(self._joint.state_dict(), os.path.join(output_dir, JOINT_NAME))


class _JointSteps(TrainerCallback):
    def __init__(self, joint: JointTraining, victim):
        self.joint, self.victim = joint, victim

    def on_epoch_begin(self, args, state, control, **kwargs):
        if state.epoch % 1:  # resumed in the middle of an epoch: its beginning is in the checkpoint
            return
        found = RandomState.capture(args.device)
        torch.manual_seed(int(np.random.SeedSequence([args.seed, int(state.epoch)]).generate_state(1)[0]))
        self.joint.begin_epoch(self.victim)
        found.restore()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.joint.step()


def _check(attack: Attack, args) -> None:
    problem = None
    if args.world_size > 1 or args.n_gpu > 1:
        problem = "on one process and device: start it without a launcher, or with --num_processes 1"
    elif args.fp16:
        problem = "without fp16: use bf16"
    elif args.eta_f > 0 or args.eta_r > 0:
        problem = "with eta_f=0 and eta_r=0: an attacker who adapts to FIP needs another attack"
    elif args.label_smoothing_factor > 0:
        problem = "with label_smoothing_factor=0"
    elif getattr(args, "rho", 0.0) > 0:
        problem = "with rho=0"
    if problem:
        raise ValueError(f"{attack.name} takes part in the training of its victim, which has to run {problem}.")
