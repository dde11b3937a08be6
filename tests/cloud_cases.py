"""Tiny models of point clouds and tiny clouds, shared by their tests."""

from __future__ import annotations

import datasets
import numpy as np
import torch
from transformers import set_seed

from hf_fip.models import (
    PointNet2Config,
    PointNet2ForPointCloudClassification,
    PointNetConfig,
    PointNetForPointCloudClassification,
)
from hf_fip.tasks.clouds import FEATURE, normalised

CLASSES = 3


def pointnet(seed: int = 1, **options) -> PointNetForPointCloudClassification:
    set_seed(seed)
    sizes = {"local_channels": [4, 5], "global_channels": [5, 6], "head_channels": [5]}
    transforms = {"transform_channels": [4, 5], "transform_head_channels": [4]}
    config = PointNetConfig(**{**sizes, **transforms, "num_labels": CLASSES, "dropout": 0.0, **options})
    return PointNetForPointCloudClassification(config)


def pointnet2(seed: int = 1, **options) -> PointNet2ForPointCloudClassification:
    set_seed(seed)
    levels = {"centres": [8, 4], "radii": [0.5, 1.0], "neighbours": [4, 4], "channels": [[4, 5], [5, 6]]}
    sizes = {"global_channels": [6], "head_channels": [5]}
    config = PointNet2Config(**{**levels, **sizes, "num_labels": CLASSES, "dropout": 0.0, **options})
    return PointNet2ForPointCloudClassification(config)


MODELS = {"PointNet": pointnet, "PointNet++": pointnet2}


def cloud(points: int = 16, seed: int = 0) -> np.ndarray:
    """A random cloud in the unit sphere, float32 (points, 3)."""
    return normalised(np.random.default_rng(seed).standard_normal((points, 3)))


def batch(rows: int = 4, points: int = 16, seed: int = 0) -> dict[str, torch.Tensor]:
    clouds = np.stack([cloud(points, seed + row) for row in range(rows)])
    return {"points": torch.from_numpy(clouds), "labels": torch.arange(rows) % CLASSES}


def clouds_of(rows: int = 30, points: int = 16) -> datasets.Dataset:
    features = datasets.Features(points=FEATURE, label=datasets.ClassLabel(num_classes=CLASSES))
    clouds = [cloud(points, row).tolist() for row in range(rows)]
    return datasets.Dataset.from_dict({"points": clouds, "label": [row % CLASSES for row in range(rows)]}, features)
