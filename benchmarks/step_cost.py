"""What a FIP step costs beside a plain fine-tuning step: time and peak memory, in one run.

    python benchmarks/step_cost.py [--device cuda] [--rounds 7] [--output results/step_cost]

The variants take turns, round by round, so that a busy machine slows all of them; time is the ratio to the plain step
of the same round, and the median over the rounds is reported. Memory is the peak of a process of its own, above what
it held before the model was made (on a GPU: what torch allocated).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from torch.utils.data import Dataset
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

from hf_fip import FIPConfig, FIPTrainer
from hf_fip.evaluation.cost import peak_process_memory
from hf_fip.hub.report import versions

VARIANTS = {
    "plain fine-tuning": {"eta_f": 0.0},
    "FIP, default interval": {},
    "FIP, trace every step": {"trace_interval": 1},
    "FIP, trace every step, with the pull (eta_r)": {"trace_interval": 1, "eta_r": 1.0},
    "FIP, double backward every step": {"trace_interval": 1, "trace_gradient": "double_backward"},
    "FIP, exact per-sample every step": {
        "trace_interval": 1,
        "trace_gradient": "double_backward",
        "trace_estimator": "exact",
    },
}
BATCH = 64


def vit(attention: str):
    """A ViT-Ti (5.4 M parameters) on 32×32 images."""
    config = ViTConfig(
        image_size=32,
        patch_size=4,
        hidden_size=192,
        num_hidden_layers=12,
        num_attention_heads=3,
        intermediate_size=768,
    )
    config._attn_implementation = attention
    return ViTForImageClassification(config)


def resnet(attention: str):
    """A ResNet-18 (11.2 M parameters) on 32×32 images."""
    return ResNetForImageClassification(
        ResNetConfig(hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic", num_labels=10)
    )


MODELS = {"vit": vit, "resnet": resnet}


class Noise(Dataset):
    def __len__(self):
        return BATCH * 64

    def __getitem__(self, row):
        return {"pixel_values": torch.zeros(3, 32, 32), "labels": row % 2}


def make_trainer(model_name: str, variant: str, device: str, folder: str) -> FIPTrainer:
    options = VARIANTS[variant]
    attention = "eager" if options.get("trace_gradient") == "double_backward" else "sdpa"
    args = FIPConfig(
        folder,
        per_device_train_batch_size=BATCH,
        max_steps=10_000,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=device == "cpu",
        dataloader_pin_memory=device != "cpu",
        **({"diagonal_samples": BATCH} | options),
    )
    return FIPTrainer(MODELS[model_name](attention), args, train_dataset=Noise())


class Stepper:
    """Makes optimiser steps of a trainer one by one, as its training loop does."""

    def __init__(self, trainer: FIPTrainer):
        self.trainer = trainer
        trainer.state.max_steps = trainer.args.max_steps
        self.model, _ = trainer._prepare_for_training(trainer.args.max_steps, trainer.get_train_dataloader(), None)
        trainer.accelerator.gradient_state._set_sync_gradients(True)
        trainer.current_gradient_accumulation_steps = 1
        generator = torch.Generator().manual_seed(0)
        self.batch = {
            "pixel_values": torch.randn(BATCH, 3, 32, 32, generator=generator),
            "labels": torch.randint(0, 2, (BATCH,), generator=generator),
        }

    def step(self) -> None:
        self.trainer.training_step(self.model, self.batch)
        self.trainer._clip_grad_norm(self.model)
        self.trainer.optimizer.step()
        self.trainer.lr_scheduler.step()
        self.model.zero_grad()
        self.trainer.state.global_step += 1

    def seconds(self, steps: int) -> float:
        started = time.perf_counter()
        for _ in range(steps):
            self.step()
        if self.trainer.args.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / steps


def measure_time(model: str, device: str, rounds: int) -> dict[str, dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        steppers = {name: Stepper(make_trainer(model, name, device, folder)) for name in VARIANTS}
        interval = FIPConfig.trace_interval
        ratios, plain = {name: [] for name in VARIANTS}, []
        for index in range(rounds + 1):
            seconds = {}
            for name, stepper in steppers.items():  # the slow ones make one step a round
                seconds[name] = stepper.seconds(1 if "double_backward" in VARIANTS[name].values() else interval)
            if index:  # the first round warms up
                base = seconds["plain fine-tuning"]
                plain.append(base)
                for name, value in seconds.items():
                    ratios[name].append(value / base)
            print(f"{model}: round {index} of {rounds}", file=sys.stderr)
    return {
        name: {
            "ratio": statistics.median(values),
            "lowest": min(values),
            "highest": max(values),
            "ms": 1000 * statistics.median(plain) * statistics.median(values),
        }
        for name, values in ratios.items()
    }


def measure_memory_here(model: str, variant: str, device: str) -> int:
    """Peak bytes of a few steps above what the process held before the model was made."""
    steps = 2 * FIPConfig.trace_interval
    with tempfile.TemporaryDirectory() as folder:
        if device == "cuda":
            stepper = Stepper(make_trainer(model, variant, device, folder))
            torch.cuda.reset_peak_memory_stats()
            stepper.seconds(steps)
            return torch.cuda.max_memory_allocated()
        make_trainer("resnet", "plain fine-tuning", device, folder)  # imports and allocator pools do not count
        before = peak_process_memory()
        Stepper(make_trainer(model, variant, device, folder)).seconds(steps)
        return peak_process_memory() - before


def measure_memory(model: str, device: str) -> dict[str, float]:
    """Peak memory relative to plain fine-tuning."""
    peaks = {}
    for name in VARIANTS:
        command = [sys.executable, __file__, "--device", device, "--memory_of", model, name]
        peaks[name] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    return {name: peak / peaks["plain fine-tuning"] for name, peak in peaks.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--output", default="results/step_cost", help="writes OUTPUT.json and OUTPUT.md")
    parser.add_argument("--memory_of", nargs=2, metavar=("MODEL", "VARIANT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if args.memory_of:
        print(measure_memory_here(*args.memory_of, args.device))
        return
    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    command = " ".join(["python", "benchmarks/step_cost.py", *sys.argv[1:]])
    result = {"command": command, "machine": machine, "batch": BATCH, "versions": versions(), "models": {}}
    lines = [f"# Cost of a FIP step\n\n`{command}` on {machine}; batch {BATCH}; ratios to plain fine-tuning.\n"]
    for model in args.models:
        times = measure_time(model, args.device, args.rounds)
        memory = measure_memory(model, args.device)
        result["models"][model] = {name: {**times[name], "peak_memory_ratio": memory[name]} for name in VARIANTS}
        lines += [f"\n{MODELS[model].__doc__}\n", "| step | time | lowest to highest | ms | peak memory |"]
        lines += ["|---|---|---|---|---|"]
        for name, row in result["models"][model].items():
            lines.append(
                f"| {name} | {row['ratio']:.2f}× | {row['lowest']:.2f} to {row['highest']:.2f} | {row['ms']:.0f} | "
                f"{row['peak_memory_ratio']:.2f}× |"
            )
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    output.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
