"""Short runs in every process of a launcher, with DDP or with FSDP2; the main process leaves what came out.

torchrun --nproc_per_node 2 sharded_processes.py FOLDER        (FSDP2 with `SHARDED` of test_trainer_fsdp.py)
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import save_file
from torch import nn
from trainer_cases import Images, PlainNet, eager_vit, identical, image_trainer, logged, marian, text_trainer, vit

from hf_fip import SingularValueConfig
from hf_fip.checkpoint import last_complete_checkpoint
from hf_fip.collapse import Copy
from hf_fip.fisher.sharded import whole

IS_SHARDED = os.environ.get("ACCELERATE_USE_FSDP") == "true"
# Clean labels and signs are the same however the model is split; drawn labels and dropout too, rounding aside.
EMPIRICAL = {"trace_estimator": "signed_sum", "fisher_labels": "empirical"}
BOTH = {"eta_f": 0.05, "eta_r": 2.0, **EMPIRICAL}
SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
FAST = {"peft_config": SingularValueConfig(train_norms=True)}


def images(model, **options):
    return lambda folder: image_trainer(folder, model(), **{**BOTH, **SAVING, **options})


# As DDP, but for rounding.
SAME = {
    "default": images(vit, train_dataset=Images(27)),  # an odd number: one process has a sample more
    "trace": images(vit, eta_r=0.0, trace_form="trace", trace_interval=2),
    "drift": images(vit, eta_f=0.0),
    "plain": images(vit, eta_f=0.0, eta_r=0.0),
    "sampled": images(vit, trace_estimator="sampled_sum", fisher_labels="sampled", eta_r=0.0),
    "dropout": images(lambda: vit(0.2), eta_r=0.0),
    "accumulated": images(vit, gradient_accumulation_steps=2),
    "checkpointed": images(vit, activation_checkpointing=True),
    "batchnorm": images(PlainNet, max_grad_norm=0.5),
    "fast": images(vit, **FAST),
    "fast-accumulated": images(lambda: vit(0.2), **FAST, gradient_accumulation_steps=2, eta_r=0.0),
    "bf16": images(vit, bf16=True, eta_r=0.0),
    "adamw": images(vit, optim="adamw_torch", learning_rate=0.01),
    "tied": lambda folder: text_trainer(folder, marian(), **BOTH, **SAVING),
}
RESUMED = {
    "vit": images(lambda: vit(0.2), gradient_accumulation_steps=2),
    "fast": images(lambda: vit(0.2), **FAST),
    "batchnorm": images(lambda: PlainNet(0.2)),
}


def leave(trainer, place: Path) -> None:
    state = gathered(trainer.model)
    if PartialState().is_main_process:
        save_file(state, place.with_suffix(".safetensors"))
        logs = {key: logged(trainer, key) for key in ("loss", "task_loss", "fisher_trace", "drift", "grad_norm")}
        place.with_suffix(".json").write_text(json.dumps(logs))
    PartialState().wait_for_everyone()


def gathered(model: nn.Module) -> dict[str, torch.Tensor]:
    # `clone`: tied weights would share memory, which safetensors refuses to write.
    return {name: whole(tensor.detach()).clone() for name, tensor in model.state_dict().items()}


def resume(make, folder: Path) -> dict:
    """Whether a run that lost its last checkpoint ends the same; and what is left when the one before is damaged."""
    first = make(folder)
    first.evaluate(Images(5))  # shards the model before training
    first.train()
    expected = gathered(first.model)
    first.save_model(str(folder / "final"))
    state = PartialState()
    state.wait_for_everyone()
    if state.is_main_process:
        shutil.rmtree(folder / "checkpoint-4")
    state.wait_for_everyone()
    again = make(folder)
    again.train(resume_from_checkpoint=True)
    result = {"identical": identical(gathered(again.model), expected), "logs": logged(again, "fisher_trace")}
    result["whole"] = logged(first, "fisher_trace")
    if IS_SHARDED and state.is_main_process:
        piece = next((folder / "checkpoint-4").glob("pytorch_model_fsdp_0/*.distcp"))
        os.truncate(piece, piece.stat().st_size - 1)
        result["after damage"] = Path(last_complete_checkpoint(str(folder))).name
    state.wait_for_everyone()
    return result


def refused(folder: Path) -> dict[str, str]:
    """What is said of estimators that shards cannot have, and of a checkpoint of the other kind."""
    said = {}
    options = {"exact": {"trace_estimator": "exact", "trace_gradient": "double_backward"}}
    options["double_backward"] = {"trace_gradient": "double_backward"}
    for name, wanted in options.items():
        try:
            image_trainer(folder / "refused", eager_vit(), **wanted).train()
        except ValueError as error:
            said[name] = str(error)
    return said


def taken_back(folder: Path) -> bool:
    """Whether the guard's copy of shards puts back what was there."""
    trainer = image_trainer(folder, PlainNet(), **BOTH, **SAVING)
    trainer.train()
    before, copy = gathered(trainer.model), Copy.of(trainer.model, 0)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(1.0)
    changed = gathered(trainer.model)
    copy.restore(trainer.model)
    return identical(gathered(trainer.model), before) and not identical(before, changed)


def main(folder: Path) -> None:
    for name, make in SAME.items():
        trainer = make(folder / name)
        trainer.train()
        leave(trainer, folder / f"{name}-left")
    found = {name: resume(make, folder / f"resumed-{name}") for name, make in RESUMED.items()}
    if IS_SHARDED:
        found["refused"] = refused(folder)
        found["taken back"] = taken_back(folder / "taken-back")
    if PartialState().is_main_process:
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    main(Path(sys.argv[1]))
