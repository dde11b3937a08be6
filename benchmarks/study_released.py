"""The code that the paper's authors released, run on the study's victims from a clone that the user names.

https://github.com/nazmul-karim170/FIP-Fisher-Backdoor-Removal: its `src/Regularizer.py` is imported as it is and makes
every update; its training loop needs CUDA and torchvision's CIFAR-10, so the loop here does what that one does (2,000
batches of 128, drawn with replacement, learning rate 0.005). Its diagonal of the Fisher is left out: the loss does not
read it. What it calls a trace is the gradient of the mean log-likelihood times Gaussian noise: zero on average.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler

LEARNING_RATE, BATCH_SIZE, STEPS = 0.005, 128, 2000


class _Logits(nn.Module):
    """The model as that code calls it: images in, logits out."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(pixel_values=pixels).logits


def train(model: nn.Module, dataset, transform, clone: str, reg_F: float) -> None:  # noqa: N803 (their name)
    """Purify a model in place.

    Args:
        model: a classifier, on its device.
        dataset: model inputs, `{"pixel_values": (C, H, W), "labels": int}`.
        transform: changes each batch; None for none.
        clone: folder of the repository. Its code is run.
        reg_F: its weight of what it calls the trace.

    Raises:
        ValueError: the folder has no src/Regularizer.py.
    """
    path = Path(clone) / "src" / "Regularizer.py"
    if not path.is_file():
        raise ValueError(f"{clone} is no clone of the released code: there is no src/Regularizer.py.")
    spec = importlib.util.spec_from_file_location("released_regularizer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    device = next(model.parameters()).device
    settings = SimpleNamespace(lr=LEARNING_RATE, reg_F=reg_F)
    regularizer = module.CDA_Regularizer(settings, device, _Logits(model), nn.CrossEntropyLoss())
    sampler = RandomSampler(dataset, replacement=True, num_samples=STEPS * BATCH_SIZE)
    model.train()
    for step, batch in enumerate(DataLoader(dataset, BATCH_SIZE, sampler=sampler)):
        batch = {name: value.to(device) for name, value in batch.items()}
        batch = transform(batch) if transform else batch
        loss, _ = regularizer.forward_backward_update(batch["pixel_values"], batch["labels"], step)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the released code's loss is {loss.item()} at step {step}")
    model.eval()
