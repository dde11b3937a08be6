"""Collapse to one class: a strong η_F flattens a classifier into a constant. Noticed on clean data, and taken back.

A constant has Tr F = 0, the best that the trace term can ask for, and nothing leads back from there by itself.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from .fisher.likelihood import IGNORE_INDEX
from .fisher.scores import trainable_parameters
from .fisher.sharded import any_sharded, is_sharded, reshard
from .processes import sum_over_processes

COLLAPSE_NAME = "fip_collapse.safetensors"
SHARD_NAME = "fip_collapse_{}_of_{}.safetensors"  # each process's own, where parameters are sharded
WINDOW = 128  # predictions that are judged together, at least,
OTHERS = 32  # and among them samples whose label is not the commonest
NEARLY_ALL = 0.95  # of a window's predictions are of one class
NO_SKILL = 0.05  # or less
BETWEEN_COPIES = 32  # updates at least, so that copying the weights costs little
FACTOR = 0.1  # of η_F, for each collapse

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Copy:
    """What a training moves, on the CPU, as it was at a step: trainable parameters and buffers, by name.

    Of sharded parameters each process has its own shard.
    """

    step: int
    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module, step: int) -> Copy:
        reshard(model)
        moving = {**trainable_parameters(model), **dict(model.named_buffers())}
        return cls(step, {name: _own(tensor.detach()).to("cpu", copy=True) for name, tensor in moving.items()})

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        reshard(model)
        places = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for name, tensor in self.tensors.items():
            _own(places[name]).copy_(tensor)


def _own(tensor: Tensor) -> Tensor:
    """What of a tensor this process holds; it shares the storage."""
    return tensor.to_local() if is_sharded(tensor) else tensor


class CollapseGuard(TrainerCallback):
    """Takes back a collapse to one class: weights and buffers go back, the optimizer starts anew, and η_F is reduced.

    It watches the predictions that the task loss is made of, and judges them in windows of a few updates by their
    *skill*: of the samples that naming always the commonest label gets wrong, the share that the model gets right,
    (right − commonest) / (samples − commonest). A constant has a skill of 0 at best, also where 97 % of the labels are
    one class; such labels make a window longer.

    A window is *healthy* if its skill is more than half of the best so far, and *collapsed* if it has none and nearly
    all its predictions are one class. A healthy window vouches for the weights it began with, not for those it ends
    with, which have predicted nothing yet: a copy of such weights is kept on the CPU (for a while two), and after a
    collapsed window they come back. A model without a healthy window so far is left alone, as when it is trained from
    scratch.

    Only classifiers are watched (`Categorical`); for other outputs there is `max_loss_rise`. What happens after the
    last full window goes unnoticed.

    Attributes:
        watching: whether the model is watched; the trainer says so.
        collapses: how many were taken back.
    """

    def __init__(self):
        self._forget()

    @property
    def factor(self) -> float:
        """What η_F is to be multiplied by."""
        return FACTOR**self.collapses

    def begin_run(self, args: TrainingArguments, checkpoint: str | None) -> None:
        """Forget everything, or go on from a checkpoint that `save` has written to."""
        self._forget()
        for name in (COLLAPSE_NAME, SHARD_NAME.format(args.process_index, args.world_size)):
            if checkpoint is not None and os.path.isfile(os.path.join(checkpoint, name)):
                self._is_sharded = name != COLLAPSE_NAME
                self._load(os.path.join(checkpoint, name))

    def _forget(self) -> None:
        self.collapses, self._best = 0, 0.0
        self.watching = False
        self._update: Tensor | None = None
        self._window: Tensor | None = None  # of each class: times predicted, times the label, times both
        self._healthy: Copy | None = None
        self._candidate: Copy | None = None  # the beginning of the present window
        self._is_sharded = False

    # ---- An update ----

    def begin_update(self, model: nn.Module, step: int) -> None:
        self._update = None
        if not self.watching or self._window is not None:
            return
        self._is_sharded = any_sharded(model.parameters())
        if self._healthy is None or step - self._healthy.step >= BETWEEN_COPIES:
            self._candidate = Copy.of(model, step)

    def see(self, logits: Tensor, labels: Tensor) -> None:
        """Count a micro-batch: logits `(batch, classes)`, labels `(batch,)`. Rows that are not finite do not count."""
        counted = logits.isfinite().all(-1) & (labels != IGNORE_INDEX)
        predicted, labels = logits.detach().argmax(-1)[counted], labels[counted].long()
        rows = (predicted, labels, labels[predicted == labels])
        counts = torch.stack([torch.bincount(row, minlength=logits.shape[-1]) for row in rows])
        self._update = counts if self._update is None else self._update + counts

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        if self._update is None:
            return
        update = sum_over_processes(self._update).cpu()
        self._window = update if self._window is None else self._window + update
        predicted, labelled, right = self._window
        seen, commonest = labelled.sum().item(), labelled.max().item()
        if seen < WINDOW or seen - commonest < OTHERS:
            return
        skill = (right.sum().item() - commonest) / (seen - commonest)
        share = predicted.max().item() / seen
        if skill > max(NO_SKILL, self._best / 2):
            self._healthy = self._candidate or self._healthy
        elif share >= NEARLY_ALL and skill <= NO_SKILL and self._healthy is not None:
            self._take_back(state, model, optimizer, share)
        self._best = max(self._best, skill)
        self._window = self._candidate = None

    def _take_back(self, state, model: nn.Module, optimizer, share: float) -> None:
        self._healthy.restore(model)
        optimizer.state.clear()  # momentum leads back to where it came from
        self.collapses += 1
        if state.is_world_process_zero:
            logger.warning(
                f"Step {state.global_step}: {share:.0%} of the last predictions on clean data were one class. The "
                f"model collapsed; it goes on from its weights of step {self._healthy.step}, with {self.factor:g} of "
                "eta_f. Next time, choose a lower eta_f or learning_rate."
            )

    # ---- Checkpoints ----

    def save(self, args: TrainingArguments, folder: str) -> None:
        """Write what a resumed run needs to `folder`, which is made when it is not there; on all processes."""
        if not (args.should_save or self._is_sharded):
            return
        os.makedirs(folder, exist_ok=True)
        tensors = {} if self._window is None else {"window": self._window}
        known: dict[str, float] = {"collapses": self.collapses, "best": self._best}
        for kind, copy in (("healthy", self._healthy), ("candidate", self._candidate)):
            if copy is not None:
                known[kind] = copy.step
                tensors |= {f"{kind}.{name}": tensor.contiguous() for name, tensor in copy.tensors.items()}
        name = SHARD_NAME.format(args.process_index, args.world_size) if self._is_sharded else COLLAPSE_NAME
        save_file(tensors, os.path.join(folder, name), {"known": json.dumps(known)})

    def _load(self, path: str) -> None:
        copies: dict[str, dict[str, Tensor]] = {"healthy": {}, "candidate": {}}
        with safe_open(path, "pt") as file:
            known = json.loads(file.metadata()["known"])
            for key in file.keys():  # noqa: SIM118
                kind, _, name = key.partition(".")
                if kind == "window":
                    self._window = file.get_tensor(key)
                else:
                    copies[kind][name] = file.get_tensor(key)
        self.collapses, self._best = known["collapses"], known["best"]
        self._healthy, self._candidate = (
            Copy(known[kind], tensors) if kind in known else None for kind, tensors in copies.items()
        )
