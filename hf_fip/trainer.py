"""FIPTrainer and FIPSeq2SeqTrainer: the Hugging Face trainers with FIP's two regularisers.

One update of the Trainer becomes, when the trace is due:

    each micro-batch   task forward → score of drawn labels (an extra backward) → task backward
    the last one       Tr F and its gradient over the whole update → + (η_r / 2) Σ F̄ (θ − θ̄)² → added to `.grad`

and the Trainer then clips and steps as always. Because the trace is taken once over all micro-batches and processes of
an update, it does not depend on how the batch is split.
"""

from __future__ import annotations

import copy
import math
import os
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate.utils import DynamoBackend
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedModel, Seq2SeqTrainer, Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .anchor import Anchor, check_anchor
from .checkpoint import check_adapter, last_complete_checkpoint, load_weights, seal, unseal, warn_of_spoilt, writing
from .collapse import CollapseGuard
from .compatibility import check_arguments, check_dataset, make_trace
from .config import FIPArguments, FIPConfig, FIPSeq2SeqConfig
from .evaluation.sealed import SealedEvaluation
from .fisher.diagonal import fisher_diagonal
from .fisher.likelihood import Categorical, Likelihood, infer_likelihood
from .fisher.passes import RandomState, preserved_buffers
from .fisher.scores import trainable_parameters
from .fisher.trace import TraceEstimator
from .guard import StopAtCheckpoint, UpdateGuard
from .hub.load import load_model
from .hub.publishing import Publishing
from .lone_sample import lone_sample
from .processes import any_process, sum_over_processes
from .sharding import ShardedTraining

FIRST_LOSS = "first_task_loss"  # in `log_history`
_FLAT = 1e-18  # a Tr F below it is rounding


class _LiftShifts(TrainerCallback):
    """Keeps the singular values of an adapter (`SingularValueConfig.floor`) from falling to zero."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        for module in model.modules():
            if hasattr(module, "singular_delta"):
                module.lift()


class FIPMixin(SealedEvaluation, Publishing, ShardedTraining):
    """What turns a Hugging Face trainer into a FIP trainer. See `FIPTrainer` for the arguments."""

    _config_class: type

    def __init__(
        self,
        model: str | os.PathLike | nn.Module | None = None,
        args: FIPConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset=None,
        *positional,
        peft_config=None,
        likelihood: Likelihood | None = None,
        train_transform: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        **kwargs,
    ):
        args = self._config_class(output_dir="fip_output") if args is None else args
        if not isinstance(args, FIPArguments):
            raise ValueError(
                f"`args` is a {type(args).__name__}; {type(self).__name__} needs a {self._config_class.__name__}."
            )
        if isinstance(model, (str, os.PathLike)):
            model = load_model(model)
        if peft_config is not None:
            if model is None:
                raise ValueError("`peft_config` needs `model`; with `model_init`, return the PEFT model from there.")
            from peft import PeftModel, get_peft_model

            if isinstance(model, PeftModel):
                raise ValueError(
                    "The model has an adapter already, and a second one around it could be neither merged nor loaded: "
                    "merge it first (`merge_and_unload`), or leave `peft_config` out to train the one that is there."
                )
            commit = getattr(getattr(model, "config", None), "_commit_hash", None)
            peft_config = copy.deepcopy(peft_config)  # PEFT writes what it found into it
            model = get_peft_model(model, peft_config, revision=peft_config.revision or commit)
        self._likelihood = likelihood
        self._train_transform = train_transform
        self._is_set_up = False  # at the first step of each `train`
        self._trace: TraceEstimator | None = None
        self._anchor: Anchor | None = None
        self._first_loss: float | None = None
        self._guard, self._signals, self._collapse = UpdateGuard(), StopAtCheckpoint(), CollapseGuard()
        self._in_update = False
        self._observing = False
        self._metrics: dict[str, list[float]] = defaultdict(list)
        # Before the Trainer makes the output folder; a model from `model_init` is checked in `call_model_init`.
        if model is not None:
            check_arguments(model, args, likelihood)
        if train_dataset is not None:
            check_dataset(train_dataset, args)
        super().__init__(model, args, data_collator, train_dataset, *positional, **kwargs)
        self.add_callback(_LiftShifts())
        self.add_callback(self._collapse)
        self.add_callback(self._signals)

    # ---- One update ----

    def training_step(self, model, inputs, num_items_in_batch=None):
        if not self._is_set_up:
            self._set_up()
        if self._train_transform is not None:
            inputs = self._train_transform(self._prepare_inputs(inputs))
        if not self._in_update:
            self._begin_update()
        with lone_sample(self.model, inputs):
            loss = super().training_step(model, inputs, num_items_in_batch)
            if not torch.isfinite(loss):
                self._guard.note(f"The loss is {loss.item()}")
            self._task_loss = self._task_loss + loss
            if self.accelerator.sync_gradients:
                loss = loss + self._add_regularisers()
                self._in_update = self._observing = False
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        watching = self._observing or self._collapse.watching
        if not watching or not (model.training and torch.is_grad_enabled()):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        batch = dict(inputs)  # the Trainer may take the labels out
        random_state = RandomState.capture(self.args.device)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self._observing and torch.isfinite(loss):  # no labels can be drawn from NaN; `_add_trace` leaves it out
            self._observe(batch, outputs, random_state)
        if self._collapse.watching:
            self._collapse.see(self._trace.likelihood.logits(outputs), batch[self._trace.label_name])
        return (loss, outputs) if return_outputs else loss

    def _begin_update(self) -> None:
        """Decide whether the trace is due, and seed this update's draws: the same after a resume."""
        self._in_update = True
        self._task_loss = 0.0
        step = self.state.global_step
        self._guard.begin(self.model)
        self._collapse.begin_update(self.model, step)
        self._observing = self._trace is not None and step % self.args.trace_interval == 0
        if self._observing:
            self._trace.reset()
            draw = np.random.SeedSequence([self.args.seed, step, self.args.process_index]).generate_state(1)
            self._generator = torch.Generator().manual_seed(int(draw[0]))

    def _observe(self, batch: dict[str, Any], outputs, random_state: RandomState) -> None:
        """Add a micro-batch to the estimate of Tr F."""
        scale = self._loss_scale()
        if self.accelerator.state.dynamo_plugin.backend == DynamoBackend.NO:
            with preserved_buffers(self._trace.model):  # a checkpointed layer runs forward again in the backward pass
                self._trace.observe(batch, self._generator, outputs=outputs, random_state=random_state, scale=scale)
        else:
            # Compiled code draws other dropout masks than the uncompiled model of the second pass, and may free the
            # graph that the score needs: the score makes an uncompiled forward pass of its own.
            with random_state.replayed():
                self._trace.observe(batch, self._generator, scale=scale)

    def _add_regularisers(self) -> Tensor | float:
        """Add the gradients of both regularisers to `.grad`; returns their value."""
        self._metrics["task_loss"].append(float(self._task_loss))
        penalty = 0.0
        faulty = self._observing and any_process(self._guard.fault is not None, self.args.device)
        if self._observing and not faulty:  # or the guard drops the update
            penalty += self._add_trace()
        if self._anchor is not None:
            penalty += self._add_drift()
        return penalty

    def _add_trace(self) -> float:
        """η_F · form(Tr F) over the whole update, its gradient added to `.grad`."""
        if not self._trace.pending:
            raise ValueError(
                f"{type(self).__name__}.compute_loss was overridden without calling super().compute_loss, so Tr F saw "
                "no batch: call it, or pass compute_loss_func instead."
            )
        if self.args.max_loss_rise is not None:
            too_high = self._loss_rise() > self.args.max_loss_rise
            self._metrics["trace_left_out"].append(float(too_high))
            if too_high:
                return 0.0
        value, gradient = self._trace.estimate()
        trace = value.item()
        if not (math.isfinite(trace) and torch.isfinite(get_total_norm(gradient))):
            # With float16 the scaler skips this update and lowers its scale, without it the guard drops it.
            self._guard.note(f"Tr F is {trace}, or its gradient is not finite,")
            self._add_to_grad(self._trace.parameters, gradient, math.inf)
            return 0.0
        self._metrics["fisher_trace"].append(trace)
        weight = self.current_eta_f() * self.args.trace_interval
        if self.args.trace_form == "trace":
            self._add_to_grad(self._trace.parameters, gradient, weight)
            return weight * trace
        if trace < _FLAT:  # a constant model: nothing is left to flatten, and the logarithm has no gradient
            return 0.0
        self._add_to_grad(self._trace.parameters, gradient, weight / trace)  # ∇ log T = ∇T / T
        return weight * math.log(trace)

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        if self._loss_scale() == 1.0:  # else float16's scaler skips such updates
            allowed = self.args.max_dropped_updates
            self._guard.finish(model, self._optimizers(), float(norm), self.state.global_step, allowed)
        return norm

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        """All that step after an update."""
        return [self.optimizer]

    def _loss_rise(self) -> float:
        """The task loss of this update, over all processes, above that of the first, which a checkpoint keeps."""
        loss = torch.tensor(float(self._task_loss), device=self.args.device)
        loss = sum_over_processes(loss).item() / self.args.world_size
        if self._first_loss is None:
            kept = (row[FIRST_LOSS] for row in self.state.log_history if FIRST_LOSS in row)
            self._first_loss = next(kept, None)
        if self._first_loss is None:
            self._first_loss = loss
            self.state.log_history.append({"step": self.state.global_step, FIRST_LOSS: loss})
        return loss - self._first_loss

    def _add_drift(self) -> float:
        """(η_r / 2) Σ_i F̄_ii (θ_i − θ̄_i)², its gradient η_r F̄ (θ − θ̄) added to `.grad`."""
        drift = 0.0
        for name, parameter in trainable_parameters(self._unwrapped()).items():
            share, gradient = self._anchor.pull(name, parameter)
            drift = drift + share
            self._add_to_grad([parameter], [gradient], self.args.eta_r)
        drift = self.args.eta_r * drift.item()
        self._metrics["drift"].append(drift)
        return drift

    def _add_to_grad(self, parameters: list[Tensor], gradient: list[Tensor], weight: float) -> None:
        weight *= self._loss_scale()  # `.grad` is unscaled later, with the task's
        for parameter, extra in zip(parameters, gradient, strict=True):
            if parameter.grad is None:
                parameter.grad = extra.to(parameter.dtype) * weight
            else:
                parameter.grad.add_(extra, alpha=weight)

    def current_eta_f(self) -> float:
        """η_F at the present update, by `eta_f_schedule`, and less after a collapse."""
        progress = self.state.global_step / max(1, self.state.max_steps)
        shape = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
        return self.args.eta_f * shape[self.args.eta_f_schedule] * self._collapse.factor

    def _loss_scale(self) -> float:
        scaler = getattr(self.accelerator, "scaler", None)
        return scaler.get_scale() if scaler is not None else 1.0

    def _unwrapped(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As `Trainer`'s, without the shifts of a singular-value adapter: decay would pull δ back to the backdoor."""
        return [name for name in super().get_decay_parameter_names(model) if ".singular_delta." not in name]

    # ---- Before the first update ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *positional, **kwargs):
        """As `Trainer.train`, with three differences.

        `resume_from_checkpoint=True` takes the last checkpoint that was written to its end. An update whose gradient
        is not finite is dropped and counted. On Ctrl-C and SIGTERM the update is finished and a checkpoint written
        first: `train` called again with `resume_from_checkpoint=True` ends with the same weights.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"No valid checkpoint found in output directory ({self.args.output_dir}).")
        if resume_from_checkpoint and not os.path.isdir(resume_from_checkpoint):
            raise ValueError(f"Can't find a valid checkpoint at {resume_from_checkpoint}.")
        if resume_from_checkpoint:
            warn_of_spoilt(resume_from_checkpoint)
            if not self.is_fsdp_enabled:
                check_adapter(resume_from_checkpoint, hasattr(self.model, "peft_config"))
        self._is_set_up = False
        self._trace = self._anchor = self._first_loss = None
        if resume_from_checkpoint and self.args.eta_r > 0:
            check_anchor(resume_from_checkpoint)
        self._resumed_from = resume_from_checkpoint or None
        self._guard = UpdateGuard()
        self._collapse.begin_run(self.args, resume_from_checkpoint or None)
        with self._signals.listening():
            return super().train(resume_from_checkpoint, *positional, **kwargs)

    def _inner_training_loop(self, *positional, **kwargs):
        # Called again with a smaller batch by `auto_find_batch_size`, when memory ran out in the middle of an update.
        self._in_update = self._observing = False
        self._metrics.clear()
        return super()._inner_training_loop(*positional, **kwargs)

    def _run_epoch(self, *positional, **kwargs):
        # Resumed from its last checkpoint, or from where a callback stopped it, a run is over; the Trainer would make
        # one update more.
        if self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
            super()._run_epoch(*positional, **kwargs)

    def call_model_init(self, trial=None) -> nn.Module:
        model = super().call_model_init(trial)
        check_arguments(model, self.args, self._likelihood)
        return model

    def _set_up(self) -> None:
        """The estimator of Tr F, and the received weights with their diag F̄, for the model being trained."""
        model = self._unwrapped()
        check_arguments(model, self.args, self._likelihood)  # a hyper-parameter search changes both
        self._is_set_up = True
        if self.args.eta_f == 0 and self.args.eta_r == 0:
            return
        likelihood = self._likelihood or infer_likelihood(model)
        label_name = self.label_names[0] if self.label_names else "labels"
        if self.args.eta_f > 0:
            reduce = sum_over_processes if self.args.world_size > 1 else None
            self._trace = make_trace(model, self.args, likelihood, label_name=label_name, reduce=reduce)
            self._collapse.watching = isinstance(likelihood, Categorical)
        if self.args.eta_r > 0 and self._anchor is None:
            if self._resumed_from:
                self._anchor = Anchor.load(self._resumed_from, trainable_parameters(model))
            else:
                self._anchor = self._make_anchor(model, likelihood, label_name)

    def _make_anchor(self, model: nn.Module, likelihood: Likelihood, label_name: str) -> Anchor:
        """θ̄ and diag F̄, from the training data as they are: without augmentation, in eval mode, each sample once."""
        check_dataset(self.train_dataset, self.args)
        found = RandomState.capture(self.args.device)
        prepared = self.get_test_dataloader(self.train_dataset)
        rows = np.arange(len(self.train_dataset))
        if self.args.diagonal_samples is not None:
            rows = np.random.default_rng(self.args.seed).permutation(rows)[: self.args.diagonal_samples]
        # The prepared loader repeats samples to give each process equally many, or drops the last ones; this does not.
        mine = rows[self.args.process_index :: self.args.world_size].tolist()
        loader = DataLoader(Subset(prepared.dataset, mine), self.args.eval_batch_size, collate_fn=prepared.collate_fn)
        diagonal = fisher_diagonal(
            model,
            (self._prepare_inputs(batch) for batch in loader),
            likelihood=likelihood,
            labels=self.args.fisher_labels,
            generator=torch.Generator().manual_seed(self.args.seed + self.args.process_index),
            chunk_size=self.args.fisher_chunk_size,
            label_name=label_name,
            reduce=sum_over_processes,
        )
        found.restore()
        received = {name: p.detach().clone() for name, p in trainable_parameters(model).items()}
        return Anchor(received, diagonal)

    # ---- Checkpoints: `trainer_state.json` is written last, so one that has it is whole; then the checksums ----

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if isinstance(self.model, PreTrainedModel) and not self.is_fsdp_enabled:
            load_weights(self.model, resume_from_checkpoint)
            return
        active = self.model.active_adapters if hasattr(self.model, "peft_config") else []
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if len(active) > 1:  # of which the Trainer leaves the first one active
            self.model.base_model.set_adapter(active)

    def _load_best_model(self):
        best = self.state.best_model_checkpoint
        is_adapted = hasattr(self.model, "peft_config") and not self.is_fsdp_enabled
        adapters = self.model.active_adapters if is_adapted else []
        # One that is not called "default" has a folder of its own, where the Trainer does not look.
        folders = {name: os.path.join(best, name) for name in adapters if os.path.isdir(os.path.join(best, name))}
        if isinstance(self.model, PreTrainedModel) and not self.is_fsdp_enabled:
            load_weights(self.model, best)
        elif not folders:
            super()._load_best_model()
        else:
            for name in adapters:
                self.model.load_adapter(folders.get(name, best), name)

    def _save_checkpoint(self, model, trial):
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        folder = os.path.join(self._get_output_dir(trial=trial), name)
        if self.args.should_save:
            unseal(folder)  # of an earlier run
        if self._anchor is not None and not self.args.save_only_model:
            self._anchor.save(folder, write=self.args.should_save)
        if self._collapse.watching and not self.args.save_only_model:
            self._collapse.save(self.args, folder)
        with writing(folder):
            super()._save_checkpoint(model, trial)
        if self.args.should_save and os.path.isdir(folder):  # not that `save_total_limit` has removed it
            seal(folder)

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # every process has written its own

    # ---- Logging ----

    def log(self, logs: dict[str, float], *positional, **kwargs) -> None:
        """Beside `loss`, the means since the last log of `task_loss`, `fisher_trace` and `drift` (the η_r term).

        With `max_loss_rise` also `trace_left_out`, the share of updates above it; and when there are any, how many
        `dropped_updates` and `collapses` to one class there were so far.
        """
        if "loss" in logs and self._metrics:
            means = torch.tensor([_finite_mean(values) for values in self._metrics.values()], device=self.args.device)
            sum_over_processes(means)
            means = (means / self.args.world_size).tolist()
            logs = {**logs, **dict(zip(self._metrics, means, strict=True))}
            self._metrics.clear()
            if self._guard.dropped:
                logs["dropped_updates"] = self._guard.dropped
        if self._collapse.collapses and not logs.keys().isdisjoint(("loss", "train_loss")):
            logs = {**logs, "collapses": self._collapse.collapses}
        super().log(logs, *positional, **kwargs)


def _finite_mean(values: list[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return float(np.mean(finite)) if finite else math.nan


class FIPTrainer(FIPMixin, Trainer):
    """
    Purifies a backdoored model: a [`~transformers.Trainer`] whose objective adds the trace of the Fisher information
    and a Fisher-weighted pull to the received weights.

    Everything that works with `Trainer` works here; with `eta_f = eta_r = 0` it is the `Trainer`.

    Args:
        model (`str`, `os.PathLike` or `nn.Module`):
            The backdoored model: a Hub id or path (loaded from safetensors, no remote code), or a module whose output
            has `.logits`, with labels and without.
        args ([`FIPConfig`]):
            Arguments of the objective and of the training.
        peft_config (`~peft.PeftConfig`, *optional*):
            Train an adapter instead of the model's own weights; F and F̄ are then the Fisher of the adapter.
        likelihood ([`~hf_fip.fisher.Likelihood`], *optional*):
            p_θ(y|x); by default inferred from the model's config.
        train_transform (`Callable`, *optional*):
            Applied to every training batch (a dict of tensors on the device) just before its step: augmentation that
            draws from torch's generator, so that a resumed run repeats it. diag F̄ does not see it.
        data_collator, train_dataset, *positional, **kwargs:
            As in `Trainer`. A subclass with a `compute_loss` of its own has to call this one's.

    Raises:
        ValueError: for every combination that cannot work, with the way out, before the output folder is made.
        FloatingPointError: (from `train`) when the loss or Tr F was NaN or infinite too often in a row.

    Example:

    ```python
    trainer = FIPTrainer(
        model="someone/model",
        args=FIPConfig("out", eta_f=0.1),
        train_dataset=clean,
        eval_dataset={"clean": test, "triggered": triggered},
    )
    trainer.train()
    ```
    """

    _config_class = FIPConfig


class FIPSeq2SeqTrainer(FIPMixin, Seq2SeqTrainer):
    """[`FIPTrainer`] for models that generate text: a [`~transformers.Seq2SeqTrainer`]; takes a `FIPSeq2SeqConfig`."""

    _config_class = FIPSeq2SeqConfig
