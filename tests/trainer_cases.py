"""Tiny models, tiny data and short runs, shared by the tests of the trainer."""

from __future__ import annotations

import gc
import os
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    MarianConfig,
    MarianMTModel,
    ResNetConfig,
    ResNetForImageClassification,
    TrainerCallback,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from hf_fip import FIPConfig, FIPSeq2SeqConfig, FIPSeq2SeqTrainer, FIPTrainer

gc.freeze()  # the Trainer collects garbage at each start: spare it the libraries' hundred thousands of objects

CLASSES = 3
QUIET = {"disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False, "save_strategy": "no"}
SHORT = {"max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1, "trace_interval": 1, **QUIET}


class Images(Dataset):
    """Random 8×8 images whose class is where they are brightest."""

    def __init__(self, count: int = 24, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(0, CLASSES, (count,), generator=generator)
        self.pixels = torch.randn(count, 1, 8, 8, generator=generator)
        self.pixels[torch.arange(count), 0, 2 * self.labels] += 1.0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"pixel_values": self.pixels[row], "labels": self.labels[row]}


class Sentences(Dataset):
    """Random token sequences to be copied, padded to 6 tokens."""

    def __init__(self, count: int = 16, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(3, 20, (count, 6), generator=generator)
        self.labels = self.tokens.clone()
        self.labels[::2, 4:] = -100

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[row], "labels": self.labels[row]}


def vit(dropout: float = 0.0, seed: int = 1, **options) -> ViTForImageClassification:
    set_seed(seed)
    sizes = {"image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_size": 16, "intermediate_size": 16}
    depth = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": CLASSES, "initializer_range": 0.2}
    config = ViTConfig(**{**sizes, **depth, "hidden_dropout_prob": dropout, **options})
    return ViTForImageClassification(config)


def eager_vit(dropout: float = 0.0, seed: int = 1, **options) -> ViTForImageClassification:
    return vit(dropout, seed, attn_implementation="eager", **options)


def resnet(seed: int = 1) -> ResNetForImageClassification:
    set_seed(seed)
    sizes = {"num_channels": 1, "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    return ResNetForImageClassification(ResNetConfig(**sizes, layer_type="basic", num_labels=CLASSES))


def marian(dropout: float = 0.0, seed: int = 1) -> MarianMTModel:
    set_seed(seed)
    width = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "init_std": 0.2}
    depth = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    tokens = {"vocab_size": 21, "pad_token_id": 20, "decoder_start_token_id": 20, "eos_token_id": 0}
    config = MarianConfig(**width, **depth, **tokens, max_position_embeddings=16, dropout=dropout)
    return MarianMTModel(config)


class PlainNet(nn.Module):
    """A module that transformers does not know, with BatchNorm and dropout; its output is a dictionary."""

    def __init__(self, dropout: float = 0.0, seed: int = 1):
        super().__init__()
        set_seed(seed)
        self.conv = nn.Conv2d(1, 4, 3, stride=2)
        self.norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(36, CLASSES)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.dropout(self.norm(self.conv(pixel_values)).relu()).flatten(1))
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def image_trainer(folder, model: nn.Module | str | None, **options) -> FIPTrainer:
    """A FIPTrainer on `Images`. Options that `FIPTrainer` takes go there, the others to its `FIPConfig`."""
    return _make(FIPTrainer, FIPConfig, Images(), folder, model, options)


def text_trainer(folder, model: nn.Module, **options) -> FIPSeq2SeqTrainer:
    return _make(FIPSeq2SeqTrainer, FIPSeq2SeqConfig, Sentences(), folder, model, options)


_OF_TRAINER = ("train_dataset", "eval_dataset", "callbacks", "peft_config", "likelihood", "train_transform")
_OF_TRAINER += ("compute_loss_func", "compute_metrics", "model_init", "data_collator", "optimizers")


def _make(trainer_class, config_class, dataset, folder, model, options):
    trainer_class = options.pop("trainer_class", trainer_class)
    given = {name: options.pop(name) for name in _OF_TRAINER if name in options}
    args = config_class(str(folder), **{**SHORT, **options})
    return trainer_class(model, args, **{"train_dataset": dataset, **given})


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters and buffers."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def trained(trainer) -> dict[str, Tensor]:
    """The weights after training."""
    trainer.train()
    return weights(trainer.model)


def identical(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """The largest absolute difference."""
    assert first.keys() == second.keys()
    return max((first[name].double() - second[name].double()).abs().max().item() for name in first)


def logged(trainer, key: str) -> list[float]:
    return [row[key] for row in trainer.state.log_history if key in row]


class Snapshots(TrainerCallback):
    """The weights, and torch's random state, after each update."""

    def __init__(self):
        self.weights: list[dict[str, Tensor]] = []
        self.random_states: list[Tensor] = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append(weights(model))
        self.random_states.append(torch.get_rng_state())


class Recorder:
    """A train transform that changes nothing and keeps what it sees."""

    def __init__(self):
        self.batches: list[dict[str, Tensor]] = []

    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        self.batches.append(dict(batch))
        return batch


@pytest.fixture
def uncompiled():
    """Ends with the environment as it was: `torch_compile=True` turns compilation on for the rest of the process."""
    with mock.patch.dict(os.environ):
        yield
