"""Short runs in every process of a launcher; each process leaves its weights and what it logged.

torchrun --nproc_per_node 2 two_processes.py FOLDER
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from accelerate import PartialState
from safetensors.torch import save_file
from trainer_cases import Images, PlainNet, eager_vit, image_trainer, logged, vit, weights
from transformers.trainer_callback import TrainerState

from hf_fip import SingularValueConfig
from hf_fip.fisher import TraceEstimator, fisher_trace
from hf_fip.processes import sum_over_processes

PROCESSES = int(os.environ.get("WORLD_SIZE", 1))
EXACT = {"trace_estimator": "exact", "trace_gradient": "double_backward", "fisher_labels": "empirical"}
BOTH = {"eta_f": 0.05, "eta_r": 2.0, "train_dataset": Images(27)}  # an odd number: one process has a sample more
SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}


def batches_of_eight(split: int) -> dict:
    """Updates of 8 samples over all processes, in `split` micro-batches each."""
    return {"per_device_train_batch_size": 8 // split // PROCESSES, "gradient_accumulation_steps": split}


# Equal on any number of processes, but for rounding.
SAME = {
    "exact": lambda folder: image_trainer(folder, eager_vit(), **BOTH, **EXACT, **batches_of_eight(1)),
    "exact-epochs": lambda folder: image_trainer(  # of three updates: all of them are full
        folder,
        eager_vit(),
        **{**BOTH, "train_dataset": Images(24)},
        **EXACT,
        **batches_of_eight(1),
        max_steps=20,
    ),
    "exact-accumulated": lambda folder: image_trainer(folder, eager_vit(), **BOTH, **EXACT, **batches_of_eight(2)),
    "trace-form": lambda folder: image_trainer(
        folder, eager_vit(), **BOTH, **EXACT, **batches_of_eight(1), trace_form="trace", trace_interval=2
    ),
    "singular": lambda folder: image_trainer(
        folder, eager_vit(), **BOTH, **EXACT, **batches_of_eight(1), peft_config=SingularValueConfig(train_norms=True)
    ),
    "drift-alone": lambda folder: image_trainer(
        folder,
        vit(),
        **{**BOTH, "eta_f": 0.0, "trace_estimator": "signed_sum", "fisher_labels": "empirical"},
        **batches_of_eight(1),
    ),
}
# Each process draws its own labels and masks.
DRAWN = {
    "default": lambda folder: image_trainer(folder, vit(0.2), **BOTH, **SAVING),
    "accumulated": lambda folder: image_trainer(
        folder, vit(0.2), **BOTH, **SAVING, gradient_accumulation_steps=2, activation_checkpointing=True
    ),
    "singular-batchnorm": lambda folder: image_trainer(
        folder, PlainNet(0.2), **BOTH, **SAVING, peft_config=SingularValueConfig()
    ),
    "batchnorm": lambda folder: image_trainer(folder, PlainNet(0.2), **BOTH, **SAVING, trace_estimator="signed_sum"),
}


def leave(trainer, folder: Path, name: str) -> None:
    rank = PartialState().process_index
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights(trainer.model), folder / f"{name}-{rank}.safetensors")
    logs = {key: logged(trainer, key) for key in ("loss", "task_loss", "fisher_trace", "drift")}
    (folder / f"{name}-{rank}.json").write_text(json.dumps(logs))


def leave_expected_trace(folder: Path) -> None:
    """Mean and standard error of many estimates of Tr F on eight shared samples, and Tr F itself."""
    model, data, state = vit(), Images(8), PartialState()
    every = {key: torch.stack([data[row][key] for row in range(8)]) for key in data[0]}
    mine = {key: tensor[state.process_index :: state.num_processes] for key, tensor in every.items()}
    found = {"exact": fisher_trace(model, every, labels="empirical")}
    for estimator, labels in (("signed_sum", "empirical"), ("sampled_sum", "sampled")):
        trace = TraceEstimator(model, estimator=estimator, gradient=None, labels=labels, reduce=sum_over_processes)
        generator = torch.Generator().manual_seed(state.process_index)
        values = []
        for _ in range(400):
            trace.observe(mine, generator)
            values.append(trace.estimate()[0].item())
        found[estimator] = [np.mean(values), np.std(values) / len(values) ** 0.5]
    (folder / f"expected-{state.process_index}.json").write_text(json.dumps(found))


def write_state_last(folder: Path) -> None:
    """Leave whether the slower process had written its random state when the other one wrote the trainer's state."""
    seen, write, save = [], TrainerState.save_to_json, torch.save

    def look_and_write(state, path):
        seen.append((Path(path).parent / "rng_state_1.pth").is_file())
        write(state, path)

    def save_slowly(value, path):
        time.sleep(1.0 if "rng_state_1" in str(path) else 0.0)
        save(value, path)

    with mock.patch.object(TrainerState, "save_to_json", look_and_write), mock.patch("torch.save", save_slowly):
        image_trainer(folder / "slow", vit(), save_strategy="steps", save_steps=2).train()
    if PartialState().is_main_process:
        (folder / "state-was-last.json").write_text(json.dumps(seen))


def main(folder: Path) -> None:
    for name, make in SAME.items():
        trainer = make(folder / "out")
        trainer.train()
        leave(trainer, folder, name)
    leave_expected_trace(folder)
    if PROCESSES == 1:
        return
    for name, make in DRAWN.items():
        trainer = make(folder / name)
        trainer.train()
        leave(trainer, folder, name)
        PartialState().wait_for_everyone()
        if PartialState().is_main_process:
            shutil.rmtree(folder / name / "checkpoint-4")
        PartialState().wait_for_everyone()
        resumed = make(folder / name)
        resumed.train(resume_from_checkpoint=True)
        leave(resumed, folder, f"{name}-resumed")
    write_state_last(folder)


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    main(Path(sys.argv[1]))
