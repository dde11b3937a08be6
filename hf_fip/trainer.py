"""FIPTrainer and FIPSeq2SeqTrainer: the Hugging Face trainers with FIP's two regularisers.

One update of the Trainer becomes, when the trace is due:

    each micro-batch   task forward → score of drawn labels (an extra backward) → task backward
    the last one       Tr F and its gradient over the whole update → + (η_r / 2) Σ F̄ (θ − θ̄)² → added to `.grad`

and the Trainer then clips and steps as always. Because the trace is taken once over all micro-batches and processes of
an update, it does not depend on how the batch is split.
"""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Trainer
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from .config import FIPConfig
from .fisher.diagonal import fisher_diagonal
from .fisher.likelihood import Likelihood, infer_likelihood
from .fisher.passes import RandomState
from .fisher.scores import trainable_parameters
from .fisher.trace import TraceEstimator

ANCHOR_NAME = "fip_anchor.safetensors"
TRAINER_STATE_NAME = "trainer_state.json"
_SECOND_ORDER_KERNELS = ("eager", None)


class FIPMixin:
    """What turns a Hugging Face trainer into a FIP trainer. See `FIPTrainer` for the arguments."""

    def __init__(
        self,
        model: str | nn.Module | None = None,
        args: FIPConfig | None = None,
        *positional,
        peft_config=None,
        likelihood: Likelihood | None = None,
        train_transform: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        **kwargs,
    ):
        args = self._config_class(output_dir="fip_output") if args is None else args
        if not hasattr(args, "eta_f"):
            raise ValueError(
                f"`args` is a {type(args).__name__}; {type(self).__name__} needs a {self._config_class.__name__}."
            )
        if isinstance(model, str):
            model = load_model(model)
        if peft_config is not None:
            if model is None:
                raise ValueError("`peft_config` needs `model`; with `model_init`, return the PEFT model from there.")
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        self._likelihood = likelihood
        self._train_transform = train_transform
        self._trace: TraceEstimator | None = None  # built at the first step of each `train`
        self._anchor: dict[str, tuple[Tensor, Tensor]] | None = None  # name → (θ̄, F̄)
        self._resume_from: str | None = None
        self._observing = False
        self._in_update = False
        self._metrics: dict[str, list[float]] = defaultdict(list)
        if model is not None:
            check_arguments(model, args)  # before the Trainer makes the output folder
        super().__init__(model, args, *positional, **kwargs)
        check_arguments(self.model, args)

    # ---- One update ----

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self._trace is None and self._anchor is None:
            self._set_up()
        if self._train_transform is not None:
            inputs = self._train_transform(self._prepare_inputs(inputs))
        if not self._in_update:
            self._begin_update()
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"The loss is {loss.item()} at step {self.state.global_step}: "
                "lower the learning rate or eta_f, and check the data for invalid values."
            )
        self._task_loss = self._task_loss + loss
        if self.accelerator.sync_gradients:
            self._in_update = self._observing = False
            loss = loss + self._add_regularisers()
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not self._observing or not (model.training and torch.is_grad_enabled()):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        batch = dict(inputs)
        random_state = RandomState.capture(self.args.device)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if torch.isfinite(loss):  # or `training_step` is about to say so
            self._trace.observe(
                batch,
                self._generator,
                outputs=outputs,
                random_state=random_state,
                scale=self._loss_scale(),
            )
        return (loss, outputs) if return_outputs else loss

    def _begin_update(self) -> None:
        """Decide whether the trace is due, and seed this update's draws: the same after a resume."""
        self._in_update = True
        self._task_loss = 0.0
        step = self.state.global_step
        self._observing = self._trace is not None and step % self.args.trace_interval == 0
        if self._observing:
            self._trace.reset()
            draw = np.random.SeedSequence([self.args.seed, step, self.args.process_index]).generate_state(1)
            self._generator = torch.Generator().manual_seed(int(draw[0]))

    def _add_regularisers(self) -> Tensor | float:
        """Add the gradients of both regularisers to `.grad`; returns their value."""
        self._metrics["task_loss"].append(float(self._task_loss))
        added = 0.0
        if self._trace is not None and self._trace.pending:
            value, gradient = self._trace.estimate()
            trace = value.item()
            if not math.isfinite(trace):
                raise FloatingPointError(
                    f"Tr F is {trace} at step {self.state.global_step}: lower the learning rate or eta_f."
                )
            self._metrics["fisher_trace"].append(trace)
            weight = self.current_eta_f() * self.args.trace_interval
            trace = max(trace, torch.finfo(torch.float32).tiny)
            if self.args.trace_form == "log_trace":
                added += weight * math.log(trace)
                weight /= trace
            else:
                added += weight * trace
            self._add_to_grad(self._trace.parameters, gradient, weight)
        if self._anchor:
            drift = self._drift_and_gradient()
            self._metrics["drift"].append(drift)
            added += drift
        return added

    def _drift_and_gradient(self) -> float:
        """(η_r / 2) Σ_i F̄_ii (θ_i − θ̄_i)², its gradient η_r F̄ (θ − θ̄) added to `.grad`."""
        drift = torch.zeros((), device=self.args.device)
        for name, parameter in trainable_parameters(self._unwrapped()).items():
            received, diagonal = self._anchor[name]
            moved = parameter.detach() - received
            pull = diagonal * moved
            drift += 0.5 * self.args.eta_r * (pull * moved).sum()
            self._add_to_grad([parameter], [pull], self.args.eta_r)
        return drift.item()

    def _add_to_grad(self, parameters: list[Tensor], gradient: list[Tensor], weight: float) -> None:
        weight *= self._loss_scale()  # `.grad` is unscaled later, with the task's
        for parameter, extra in zip(parameters, gradient, strict=True):
            if parameter.grad is None:
                parameter.grad = extra.to(parameter.dtype) * weight
            else:
                parameter.grad.add_(extra, alpha=weight)

    def current_eta_f(self) -> float:
        """η_F at the present update, by `eta_f_schedule`."""
        progress = self.state.global_step / max(1, self.state.max_steps)
        shape = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
        return self.args.eta_f * shape[self.args.eta_f_schedule]

    def _loss_scale(self) -> float:
        scaler = getattr(self.accelerator, "scaler", None)
        return scaler.get_scale() if scaler is not None else 1.0

    def _unwrapped(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model)

    # ---- Before the first update ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *positional, **kwargs):
        """As `Trainer.train`; `resume_from_checkpoint=True` takes the last checkpoint that was written to its end."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir) or True
        self._resume_from = resume_from_checkpoint or None
        self._trace = self._anchor = None
        self._in_update = self._observing = False
        self._metrics.clear()
        return super().train(resume_from_checkpoint, *positional, **kwargs)

    def _set_up(self) -> None:
        """The estimator of Tr F, and the received weights with their diag F̄, for the model being trained."""
        model = self._unwrapped()
        likelihood = self._likelihood or infer_likelihood(model)
        label_name = self.label_names[0] if self.label_names else "labels"
        if self.args.eta_f > 0:
            self._trace = TraceEstimator(
                model,
                likelihood,
                estimator=self.args.trace_estimator,
                gradient=self.args.trace_gradient,
                labels=self.args.fisher_labels,
                epsilon=self.args.trace_epsilon,
                chunk_size=self.args.fisher_chunk_size,
                label_name=label_name,
                reduce=sum_over_processes,
            )
        self._anchor = {}
        if self.args.eta_r > 0:
            self._anchor = self._load_anchor() or self._make_anchor(model, likelihood, label_name)

    def _make_anchor(self, model, likelihood, label_name) -> dict[str, tuple[Tensor, Tensor]]:
        """θ̄ and diag F̄, from the training data as they are: without augmentation, in eval mode."""
        dataset = self.train_dataset
        wanted = self.args.diagonal_samples
        if wanted is not None and wanted < len(dataset):
            rows = np.random.default_rng(self.args.seed).permutation(len(dataset))[:wanted].tolist()
            is_hf = hasattr(dataset, "select")
            dataset = dataset.select(rows) if is_hf else torch.utils.data.Subset(dataset, rows)
        found = RandomState.capture(self.args.device)
        loader = self.get_test_dataloader(dataset)
        batches = (self._prepare_inputs(batch) for batch in loader)
        diagonal = fisher_diagonal(
            model,
            batches,
            likelihood=likelihood,
            labels=self.args.fisher_labels,
            generator=torch.Generator().manual_seed(self.args.seed + self.args.process_index),
            chunk_size=self.args.fisher_chunk_size,
            label_name=label_name,
            reduce=sum_over_processes,
        )
        found.restore()
        return {name: (p.detach().clone(), diagonal[name]) for name, p in trainable_parameters(model).items()}

    # ---- Checkpoints ----

    def _save_checkpoint(self, model, trial):
        # Before the rest: the Trainer writes trainer_state.json last, so a checkpoint that has it is whole.
        if self._anchor and self.args.should_save and not self.args.save_only_model:
            folder = os.path.join(
                self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            )
            os.makedirs(folder, exist_ok=True)
            tensors = {f"received.{name}": received for name, (received, _) in self._anchor.items()}
            tensors |= {f"diagonal.{name}": diagonal for name, (_, diagonal) in self._anchor.items()}
            save_file({k: v.contiguous() for k, v in tensors.items()}, os.path.join(folder, ANCHOR_NAME))
        super()._save_checkpoint(model, trial)

    def _load_anchor(self) -> dict[str, tuple[Tensor, Tensor]] | None:
        """θ̄ and diag F̄ of the run being resumed; None when this is a new run."""
        if self._resume_from is None:
            return None
        path = os.path.join(self._resume_from, ANCHOR_NAME)
        if not os.path.isfile(path):
            raise ValueError(
                f"{self._resume_from} has no {ANCHOR_NAME}, so the received weights are not known: "
                "it was written with eta_r = 0 or save_only_model. Resume with eta_r=0, or start anew."
            )
        tensors = load_file(path, device=str(self.args.device))
        names = [key.removeprefix("received.") for key in tensors if key.startswith("received.")]
        return {name: (tensors[f"received.{name}"], tensors[f"diagonal.{name}"]) for name in names}

    # ---- Logging ----

    def log(self, logs: dict[str, float], *positional, **kwargs) -> None:
        """Beside `loss`, the means since the last log of `task_loss`, `fisher_trace` and `drift` (the η_r term)."""
        if "loss" in logs and self._metrics:
            means = torch.tensor(
                [float(np.mean(values)) for values in self._metrics.values()], device=self.args.device
            )
            sum_over_processes(means)
            means = (means / self.args.world_size).tolist()
            logs = {**logs, **dict(zip(self._metrics, means, strict=True))}
            self._metrics.clear()
        super().log(logs, *positional, **kwargs)


class FIPTrainer(FIPMixin, Trainer):
    """
    Purifies a backdoored model: a [`~transformers.Trainer`] whose objective adds the trace of the Fisher information
    and a Fisher-weighted pull to the received weights.

    Everything that works with `Trainer` works here; with `eta_f = eta_r = 0` it is the `Trainer`.

    Args:
        model (`str` or `nn.Module`):
            The backdoored model: a Hub id or path (loaded from safetensors, no remote code), or a module whose output
            has `.logits`.
        args ([`FIPConfig`]):
            Arguments of the objective and of the training.
        peft_config (`~peft.PeftConfig`, *optional*):
            Train an adapter instead of the model's own weights; F and F̄ are then the Fisher of the adapter.
        likelihood ([`~hf_fip.fisher.Likelihood`], *optional*):
            p_θ(y|x); by default inferred from the model's config.
        train_transform (`Callable`, *optional*):
            Applied to every training batch (a dict of tensors on the device) just before its step: augmentation that
            draws from torch's generator, so that a resumed run repeats it. diag F̄ does not see it.
        *positional, **kwargs:
            As in `Trainer`.

    Raises:
        ValueError: for every combination that cannot work, with the way out.
        FloatingPointError: (from `train`) when the loss or Tr F is NaN or infinite.

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

    from .config import FIPSeq2SeqConfig as _config_class


def load_model(name_or_path: str) -> nn.Module:
    """A model by Hub id or path, with the class its config names: safetensors only, no remote code.

    Raises:
        ValueError: when the config names no transformers class with a head.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    architecture = (config.architectures or ["none"])[0]
    model_class = getattr(transformers, architecture, None)
    if model_class is None:
        raise ValueError(
            f"{name_or_path}: its config names the architecture {architecture!r}, which transformers does not have; "
            "load the model yourself and pass the module."
        )
    return model_class.from_pretrained(name_or_path, use_safetensors=True, trust_remote_code=False)


def check_arguments(model: nn.Module, args: FIPConfig) -> None:
    """Raise a ValueError, with the way out, for what cannot work together.

    Nothing is checked for `eta_f = eta_r = 0`, which is plain training.
    """
    if args.eta_f == 0 and args.eta_r == 0:
        return
    if args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1"):
        raise ValueError("FSDP is not supported yet: sharded parameters would get no trace gradient. Use DDP.")
    if args.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("true", "1"):
        raise ValueError("DeepSpeed is not supported: it owns the backward pass. Use DDP.")
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process (DataParallel) are not supported: start one process a GPU with "
            "`accelerate launch`, or set CUDA_VISIBLE_DEVICES to one of them."
        )
    if args.eta_f == 0:
        return
    checkpointing = args.activation_checkpointing_kwargs or {}
    if args.activation_checkpointing and checkpointing.get("use_reentrant", False):
        raise ValueError(
            "Reentrant activation checkpointing cannot give the score of drawn labels: set "
            "activation_checkpointing_kwargs={'use_reentrant': False}."
        )
    if args.torch_compile:
        raise ValueError("torch_compile frees the graph that the score needs once more: set torch_compile=False.")
    if args.ddp_static_graph:
        raise ValueError("ddp_static_graph gives wrong weights with a second backward pass: set it to False.")
    if args.use_liger_kernel:
        raise ValueError("use_liger_kernel makes no logits, which Tr F needs: set use_liger_kernel=False.")
    if args.trace_gradient == "double_backward":
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        kernel = getattr(getattr(base, "config", None), "_attn_implementation", None)
        if kernel not in _SECOND_ORDER_KERNELS:
            raise ValueError(
                f"trace_gradient='double_backward' needs attention with a second derivative, and this model uses "
                f"{kernel!r}: load it with attn_implementation='eager' (or model.set_attn_implementation('eager')), "
                "or use trace_gradient='finite_difference'."
            )


def last_complete_checkpoint(output_dir: str) -> str | None:
    """The newest checkpoint in a folder that was written to its end.

    A half-written one (a kill, a full disk) is passed over.
    """
    if not os.path.isdir(output_dir):
        return None
    for folder in reversed(sort_checkpoints(output_dir)):
        try:
            TrainerState.load_from_json(os.path.join(folder, TRAINER_STATE_NAME))
        except (OSError, json.JSONDecodeError, TypeError):
            continue
        return folder
    return None


def sum_over_processes(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes in place; with one process it stays as it is."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor
