"""What PEFT's own tests are given for tables: this tuner's configurations, and three models of our own."""

from __future__ import annotations

import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from hf_fip.singular import SingularValueConfig


class TinyViT(nn.Module):
    """Two blocks; each row of ten numbers is an image of 2 × 5, and each number of it a patch."""

    def __init__(self):
        super().__init__()
        config = ViTConfig(
            image_size=(2, 5),
            patch_size=1,
            num_channels=1,
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            num_labels=2,
            initializer_range=0.5,
        )
        self.vit = ViTForImageClassification(config)
        self.sm = nn.LogSoftmax(dim=-1)
        self.dtype = torch.float

    def forward(self, X):
        return self.sm(self.vit(X.to(self.dtype).view(-1, 1, 2, 5) / 90).logits)


class ConvBatchNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv2d = nn.Conv2d(1, 6, 2)
        self.norm = nn.BatchNorm2d(6)
        self.lin0 = nn.Linear(24, 2)
        self.sm = nn.LogSoftmax(dim=-1)
        self.dtype = torch.float

    def forward(self, X):
        X = self.norm(self.conv2d(X.to(self.dtype).view(-1, 1, 2, 5) / 90)).relu()
        return self.sm(self.lin0(X.flatten(1)))


class PointwiseConv1d(nn.Module):
    """PEFT's own model of this kind calls its input `x`, which its tests do not."""

    def __init__(self):
        super().__init__()
        self.conv1d = nn.Conv1d(2, 6, 1)
        self.lin0 = nn.Linear(30, 2)
        self.sm = nn.LogSoftmax(dim=-1)
        self.dtype = torch.float

    def forward(self, X):
        X = self.conv1d(X.to(self.dtype).view(-1, 2, 5) / 90).relu()
        return self.sm(self.lin0(X.flatten(1)))


MODELS = {"ViT": TinyViT, "ConvBatchNorm": ConvBatchNorm, "PointwiseConv1d": PointwiseConv1d}

# Name of the case, model, and the configuration's arguments.
_CASES = [
    ("MLP, a name", "MLP", {"target_modules": "lin0"}),
    ("MLP, two names", "MLP", {"target_modules": ["lin0", "lin1"]}),
    ("MLP, a regular expression", "MLP", {"target_modules": r"lin[01]"}),
    ("MLP, all layers", "MLP", {}),
    ("MLP, all layers but one", "MLP", {"exclude_modules": ["lin1"]}),
    ("MLP, rank", "MLP", {"target_modules": ["lin0"], "rank": 4}),
    ("MLP, all layers, rank above one's own", "MLP", {"rank": 4}),
    ("MLP, rank_pattern", "MLP", {"target_modules": ["lin0", "lin1"], "rank_pattern": {"lin0": 3, "lin1": 1}}),
    ("MLP, scale", "MLP", {"target_modules": ["lin0"], "scale": 3.0}),
    ("MLP, save_basis", "MLP", {"target_modules": ["lin0", "lin1"], "save_basis": True}),
    ("MLP, modules_to_save", "MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    (
        "MLP, rank, save_basis, modules_to_save",
        "MLP",
        {"target_modules": ["lin0"], "rank": 2, "save_basis": True, "modules_to_save": ["lin1"]},
    ),
    ("LayerNorm, train_norms", "MLP_LayerNorm", {"target_modules": ["lin0", "lin1"], "train_norms": True}),
    ("LayerNorm, norm in modules_to_save", "MLP_LayerNorm", {"modules_to_save": ["layernorm1"]}),
    ("BatchNorm, frozen", "ConvBatchNorm", {"target_modules": ["conv2d", "lin0"]}),
    ("BatchNorm, train_norms", "ConvBatchNorm", {"train_norms": True}),
    ("Embedding", "EmbConv1D", {"target_modules": ["emb"]}),
    ("transformers' Conv1D", "EmbConv1D", {"target_modules": ["conv1d"]}),
    ("Embedding and transformers' Conv1D", "EmbConv1D", {"target_modules": ["emb", "conv1d"]}),
    (
        "Embedding, rank, modules_to_save",
        "EmbConv1D",
        {"target_modules": ["emb"], "rank": 3, "modules_to_save": ["lin0"]},
    ),
    ("Conv1d", "Conv1d", {"target_modules": ["conv1d"]}),
    ("Conv1d, kernel of 1", "PointwiseConv1d", {"target_modules": ["conv1d"]}),
    ("Conv1d, groups", "Conv1dGroups", {"target_modules": ["conv1d"]}),
    ("Conv2d", "Conv2d", {"target_modules": ["conv2d"]}),
    ("Conv2d, rank_pattern", "Conv2d2", {"target_modules": ["lin0", "conv2d"], "rank_pattern": {"conv2d": 9}}),
    ("Conv2d, 1 × 1", "Conv2d1x1", {"target_modules": ["conv2d"]}),
    ("Conv2d, groups", "Conv2dGroups", {"target_modules": ["conv2d"]}),
    ("Conv2d, groups and padding, rank", "Conv2dGroups2", {"target_modules": ["conv2d"], "rank": 6}),
    ("Conv3d", "Conv3d", {"target_modules": ["conv3d"]}),
    ("Conv3d and Linear, save_basis", "Conv3d", {"target_modules": ["conv3d", "lin0"], "save_basis": True}),
    ("MultiheadAttention", "MHA", {"target_modules": ["mha"]}),
    ("MultiheadAttention and Linear", "MHA", {"target_modules": ["mha", "lin0"]}),
    ("MultiheadAttention, rank, save_basis", "MHA", {"target_modules": ["mha"], "rank": 4, "save_basis": True}),
    ("ViT, queries and values", "ViT", {"target_modules": ["q_proj", "v_proj"]}),
    ("ViT, all layers, rank", "ViT", {"rank": 3}),
]
TEST_CASES = [(name, model, SingularValueConfig, kwargs) for name, model, kwargs in _CASES]

# Two adapters of PEFT's MLP at once.
_PAIRS = [
    ("Same layer", {"target_modules": ["lin0"]}, {"target_modules": ["lin0"]}),
    ("Different layers", {"target_modules": ["lin0"]}, {"target_modules": ["lin1"]}),
    ("Same layers", {}, {}),
    ("One layer in common", {"target_modules": ["lin0"]}, {"target_modules": ["lin0", "lin1"]}),
    ("Different ranks", {"target_modules": ["lin0"], "rank": 3}, {"target_modules": ["lin0"], "rank": 6}),
    ("Part and all of the values", {"target_modules": ["lin0"], "rank": 3}, {"target_modules": ["lin0"]}),
    ("Different scales", {"target_modules": ["lin0"], "scale": 0.5}, {"target_modules": ["lin0"], "scale": 2.0}),
    ("One saves its basis", {"target_modules": ["lin0"], "save_basis": True}, {"target_modules": ["lin0"]}),
]
MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES = [
    (name, "singular", SingularValueConfig, *({**kwargs, "init_weights": False} for kwargs in pair))
    for name, *pair in _PAIRS
]

# Arguments of a configuration by itself.
CONFIGS = {"defaults": {}, "a list of names": {"target_modules": ["lin0"]}}
