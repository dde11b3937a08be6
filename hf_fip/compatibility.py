"""What cannot work together with FIP's terms: each is refused before training, with the way out.

Most of it would not fail by itself: it would train without the penalty, or with a wrong one.
"""

from __future__ import annotations

import os

from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_utils import has_length
from transformers.training_args import OptimizerNames

from .config import FIPArguments
from .fisher.likelihood import Likelihood, infer_likelihood
from .fisher.scores import trainable_parameters
from .fisher.trace import TraceEstimator


def check_arguments(model: nn.Module, args: FIPArguments, likelihood: Likelihood | None = None) -> None:
    """Raise a ValueError for a model and arguments that cannot work together.

    Of plain training (`eta_f = eta_r = 0`) only that it can run, and come back from a checkpoint, is checked.
    """
    args.check()
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "This model got an adapter by transformers' own add_adapter or load_adapter, which a trainer cannot bring "
            "back from a checkpoint: take PEFT's get_peft_model or PeftModel.from_pretrained on the model without it, "
            "or pass `peft_config`."
        )
    if args.label_smoothing_factor and not hasattr(model, "config"):
        raise ValueError(
            f"The Trainer smooths labels by a model's config, and {type(model).__name__} has none: set "
            "label_smoothing_factor=0."
        )
    if fsdp_version(args) == 2:
        _check_loading(args)
    if args.eta_f == 0 and args.eta_r == 0:
        return
    _check_devices(model, args)
    _check_sharding(args)
    trainable_parameters(model)
    likelihood = likelihood or infer_likelihood(model)
    if args.eta_f > 0:
        _check_passes(args)
        _check_kernels(model, args)
        make_trace(model, args, likelihood)


def make_trace(model: nn.Module, args: FIPArguments, likelihood: Likelihood, **options) -> TraceEstimator:
    """The estimator of Tr F that the arguments ask for."""
    return TraceEstimator(
        model,
        likelihood,
        estimator=args.trace_estimator,
        gradient=args.trace_gradient,
        labels=args.fisher_labels,
        epsilon=args.trace_epsilon,
        chunk_size=args.fisher_chunk_size,
        **options,
    )


def check_dataset(dataset, args: FIPArguments) -> None:
    """Raise a ValueError when diag F̄ is wanted of training data without a length."""
    if args.eta_r > 0 and not has_length(dataset):
        raise ValueError(
            "eta_r > 0 needs diag F̄ over the training data, and these have no length (a stream?): "
            "pass a dataset with a length, or set eta_r=0."
        )


def _check_devices(model: nn.Module, args: FIPArguments) -> None:
    """One model a process, and `.grad` as the place where gradients are collected."""
    if args.deepspeed or is_set("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(
            "DeepSpeed is not supported: it owns the backward pass, and neither gives the gradient of another "
            "likelihood nor takes one that is added. Use FSDP2 or DDP."
        )
    devices = set((getattr(model, "hf_device_map", None) or {}).values()) - {"cpu", "disk"}
    if len(devices) > 1 or getattr(model, "is_distributed_loading_by_transformers", False):
        raise ValueError("A model spread over several devices is not supported: load it on one, and use DDP.")
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process (DataParallel) are not supported: start one process a GPU with "
            "`accelerate launch`, or set CUDA_VISIBLE_DEVICES to one of them."
        )
    if args.parallelism_config is not None or is_set("ACCELERATE_USE_PARALLELISM_CONFIG"):
        raise ValueError("Tensor, context and sequence parallelism are not supported: use DDP.")
    optimizer = OptimizerNames(args.optim).value
    if "layerwise" in optimizer or "lomo" in optimizer:
        raise ValueError(
            f"optim={optimizer!r} steps during the backward pass, before the penalties are there: use another one."
        )


def fsdp_version(args: FIPArguments) -> int | None:
    """The version of FSDP that the arguments or the launcher ask for; None for none."""
    if args.fsdp:
        return int((args.fsdp_config or {}).get("version", 2))
    return int(os.environ.get("FSDP_VERSION", "1")) if is_set("ACCELERATE_USE_FSDP") else None


def _check_loading(args: FIPArguments) -> None:
    given = (args.fsdp_config or {}).get("cpu_ram_efficient_loading", "false")
    if str(given).lower() == "true" or is_set("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading leaves all processes but one without weights: set it to false (each reads "
            "the model, and keeps its shard)."
        )


def _check_sharding(args: FIPArguments) -> None:
    """FSDP keeps the gradients of its shards, without a graph."""
    version = fsdp_version(args)
    if version is None:
        return
    if version != 2:
        raise ValueError("FSDP1 flattens the parameters, and gradients have no place there: set fsdp_version to 2.")
    if args.torch_compile:
        raise ValueError("torch_compile together with FSDP is not supported: leave one of them out.")
    if args.eta_r > 0 and (args.fp16 or args.mixed_precision == "fp16"):
        raise ValueError("fp16 with FSDP would round the squares of diag F̄ to zero: use bf16, or set eta_r=0.")


def _check_passes(args: FIPArguments) -> None:
    """The score of drawn labels takes a second backward pass through the task's graph."""
    checkpointing = args.activation_checkpointing_kwargs or {}
    if args.activation_checkpointing and checkpointing.get("use_reentrant", False):
        raise ValueError(
            "Reentrant activation checkpointing cannot give the score of drawn labels: set "
            "activation_checkpointing_kwargs={'use_reentrant': False}."
        )
    if args.torch_compile and args.trace_gradient == "double_backward":
        raise ValueError(
            "Compiled code has no second derivative: set trace_gradient='finite_difference', or torch_compile=False."
        )
    if args.ddp_static_graph:
        raise ValueError("ddp_static_graph gives wrong weights with a second backward pass: set it to False.")
    if args.use_liger_kernel:
        raise ValueError("use_liger_kernel makes no logits, which Tr F needs: set use_liger_kernel=False.")


def _check_kernels(model: nn.Module, args: FIPArguments) -> None:
    """Double backward needs attention with a second derivative in every part of the model."""
    if args.trace_gradient != "double_backward":
        return
    allowed = {"eager", None}
    if args.trace_estimator == "exact":
        allowed.add("sdpa")  # per-sample scores select its MATH kernel, which has one
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    kernels = {getattr(part.config, "_attn_implementation", None) for part in parts} - allowed
    if kernels:
        raise ValueError(
            f"trace_gradient='double_backward' needs attention with a second derivative, and this model uses "
            f"{sorted(kernels)[0]!r}: load it with attn_implementation='eager' (or "
            "model.set_attn_implementation('eager')), or use trace_gradient='finite_difference'."
        )


def is_set(variable: str) -> bool:
    """Whether a launcher switched something on by an environment variable."""
    return os.environ.get(variable, "false").lower() in ("true", "1")
