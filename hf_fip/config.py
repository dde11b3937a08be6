"""FIPConfig: a TrainingArguments with FIP's own fields."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, field

from transformers import Seq2SeqTrainingArguments, TrainingArguments

from .fisher.trace import ESTIMATORS, GRADIENTS, LABELS, check_choice
from .processes import are_on_cpu

TRACE_FORMS = ("log_trace", "trace")
SCHEDULES = ("linear", "constant", "cosine")

# What Fast FIP wants otherwise. Shifts of singular values are few, each of them moves a whole direction, and the
# gradients of large and small ones are of very different sizes: Adam moves each by a like share of itself.
FAST_FIP = {
    "optim": "adamw_torch",
    "learning_rate": 0.2,
    "warmup_steps": 0.1,
    "eta_f": 0.01,
    "max_loss_rise": 0.75,
}


@dataclass
class FIPArguments:
    r"""
    The fields that FIP adds to a `TrainingArguments`.

    The objective is `L_task + eta_f · form(Tr F) + (eta_r / 2) · Σ_i F̄_ii (θ_i − θ̄_i)²` (Karim et al., CCS 2024),
    where `form` is the identity or the logarithm. With `eta_f = eta_r = 0` the trainer is the plain `Trainer`.

    Args:
        > Parameters of the objective

        eta_f (`float`, *optional*, defaults to 0.1):
            Weight of the trace of the Fisher information: the paper's means against the backdoor.
        eta_r (`float`, *optional*, defaults to 0.0):
            Weight of the Fisher-weighted pull to the received weights, which keeps clean knowledge (and, when large,
            the backdoor).
        trace_form (`str`, *optional*, defaults to `"log_trace"`):
            `"trace"` penalises Tr F, as the paper does; `"log_trace"` penalises log Tr F, whose gradient ∇T/T does not
            depend on the scale of Tr F, so that one `eta_f` serves more models.
        eta_f_schedule (`str`, *optional*, defaults to `"linear"`):
            How `eta_f` falls over training: `"linear"` or `"cosine"` to zero, or `"constant"`.
        max_loss_rise (`float`, *optional*):
            Leave the trace out of an update whose task loss is more than this (in nats) above that of the first
            update: a strong `eta_f` then cannot turn the model into a constant. No limit when left out.

        > Parameters of the estimate

        fisher_labels (`str`, *optional*, defaults to `"sampled"`):
            Labels in the score: `"sampled"` from the model (the true Fisher) or `"empirical"` (the clean label).
        trace_estimator (`str`, *optional*, defaults to `"sampled_sum"`):
            `"sampled_sum"` or `"signed_sum"` (one extra backward pass; unbiased), or `"exact"` (per-sample scores).
        trace_gradient (`str`, *optional*, defaults to `"finite_difference"`):
            `"finite_difference"` (first-order passes only; works with any kernel) or `"double_backward"`.
        trace_interval (`int`, *optional*, defaults to 4):
            Apply the trace term at every n-th update, n times as strongly; 1 is every update.
        trace_epsilon (`float`, *optional*):
            Length of the finite-difference step in parameter space. By default 0.001, and 0.01 with `bf16` or `fp16`
            (or `accelerate launch --mixed_precision`), which round a shorter step away.
        diagonal_samples (`int`, *optional*):
            Training samples from which diag F̄ is computed; all of them when left out.
        fisher_chunk_size (`int`, *optional*):
            Samples whose scores are held at once by `"exact"` and by diag F̄; memory is this × trainable parameters. By
            default as many as take 128 MiB, and at least one.

        > Parameters of the training

        max_dropped_updates (`int`, *optional*, defaults to 5):
            An update whose loss, Tr F or gradient is not finite is dropped: nothing moves. After so many in a row the
            next one ends the run.

        > Parameters with another default than in `TrainingArguments`

        optim (`str`, *optional*, defaults to `"sgd"`), optim_args (`str`, *optional*):
            With `"sgd"`, `optim_args` is `"momentum=0.9"` unless set.
        learning_rate (`float`, *optional*, defaults to 0.1), lr_scheduler_type (`str`, defaults to `"cosine"`):
            The learning rate and its schedule.
        logging_steps (`float`, *optional*, defaults to 10):
            Updates between two logs.
    """

    eta_f: float = field(default=0.1, metadata={"help": "Weight of Tr F, the term that is to remove the backdoor."})
    eta_r: float = field(
        default=0.0,
        metadata={"help": "Weight of the Fisher-weighted pull to the received weights, which keeps clean knowledge."},
    )
    trace_form: str = field(
        default="log_trace",
        metadata={
            "help": "Penalise Tr F ('trace', the paper) or log Tr F ('log_trace', scale-free).",
            "choices": TRACE_FORMS,
        },
    )
    eta_f_schedule: str = field(
        default="linear", metadata={"help": "How eta_f falls over training.", "choices": SCHEDULES}
    )
    max_loss_rise: float | None = field(
        default=None,
        metadata={
            "help": "Leave the trace out of an update whose task loss is so far above that of the first. No limit."
        },
    )
    fisher_labels: str = field(
        default="sampled",
        metadata={"help": "Labels in the score: drawn from the model, or the clean ones.", "choices": LABELS},
    )
    trace_estimator: str = field(default="sampled_sum", metadata={"help": "Estimator of Tr F.", "choices": ESTIMATORS})
    trace_gradient: str = field(
        default="finite_difference", metadata={"help": "How the gradient of Tr F is taken.", "choices": GRADIENTS}
    )
    trace_interval: int = field(
        default=4, metadata={"help": "Apply the trace term at every n-th update, n times as strongly."}
    )
    trace_epsilon: float | None = field(
        default=None,
        metadata={
            "help": "Length of the finite-difference step in parameter space. Default: 0.001, and 0.01 with bf16 or "
            "fp16, which round a shorter step away."
        },
    )
    diagonal_samples: int | None = field(
        default=None, metadata={"help": "Training samples for diag F̄ (default: all of them)."}
    )
    fisher_chunk_size: int | None = field(
        default=None,
        metadata={"help": "Per-sample scores held at once by exact and by diag F̄ (default: what fits in 128 MiB)."},
    )

    max_dropped_updates: int = field(
        default=5,
        metadata={"help": "Updates in a row that may be dropped because they are not finite; the next ends the run."},
    )

    # The optimiser of the paper (SGD with momentum); Adam would turn a large penalty into a step along it alone.
    optim: str = field(default="sgd", metadata={"help": "The optimizer to use."})
    optim_args: str | None = field(
        default=None, metadata={"help": "Arguments of the optimizer (for sgd, momentum=0.9 unless you set them)."}
    )
    learning_rate: float = field(default=0.1, metadata={"help": "The initial learning rate."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many updates; below 1 a share of all."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "The learning-rate schedule."})

    def __post_init__(self):
        if self.optim == "sgd" and self.optim_args is None:
            self.optim_args = "momentum=0.9"
        self.use_cpu = self.use_cpu or are_on_cpu()
        super().__post_init__()
        if self.trace_epsilon is None:
            self.trace_epsilon = 0.001 if self.mixed_precision == "no" else 0.01  # the launcher may set it too
        self.check()

    def __getstate__(self) -> dict:
        """For pickles, such as the training_args.bin that the Trainer saves and pushes: without the token."""
        return {**self.__dict__, "hub_token": None}

    @classmethod
    def fast_fip(cls, output_dir: str, **fields):
        """The arguments with the defaults of Fast FIP, for a trainer with `peft_config=SingularValueConfig(…)`."""
        return cls(output_dir, **{**FAST_FIP, **fields})

    def check(self) -> None:
        """Check FIP's own fields.

        Raises:
            ValueError: for a number out of range, a name that does not exist, or a pair that does not go together.
        """
        for name, allowed in (("trace_form", TRACE_FORMS), ("eta_f_schedule", SCHEDULES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(allowed)}.")
        for name in ("eta_f", "eta_r"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} has to be zero or positive, and finite.")
        if self.max_loss_rise is not None and not self.max_loss_rise > 0:
            raise ValueError(f"max_loss_rise={self.max_loss_rise} has to be positive.")
        for name in ("trace_interval", "fisher_chunk_size", "diagonal_samples"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, numbers.Integral) and value >= 1):
                raise ValueError(f"{name}={value!r} has to be a whole number of at least 1.")
        if self.max_dropped_updates < 0:
            raise ValueError(f"max_dropped_updates={self.max_dropped_updates} has to be zero or more.")
        if not 0 < self.trace_epsilon < math.inf:
            raise ValueError(f"trace_epsilon={self.trace_epsilon} has to be positive, and finite.")
        check_choice(self.trace_estimator, self.trace_gradient, self.fisher_labels)


@dataclass
class FIPConfig(FIPArguments, TrainingArguments):
    __doc__ = "Arguments of [`FIPTrainer`]: all of `TrainingArguments`, and" + FIPArguments.__doc__


@dataclass
class FIPSeq2SeqConfig(FIPArguments, Seq2SeqTrainingArguments):
    __doc__ = "Arguments of [`FIPSeq2SeqTrainer`]: all of `Seq2SeqTrainingArguments`, and" + FIPArguments.__doc__
