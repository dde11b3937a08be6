"""Classification of point clouds: clouds as model inputs, augmentation, small models."""

from __future__ import annotations

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn

from ..attacks.poison import ROLE_COLUMN
from ..hub.load import is_adapter, load_adapted, load_model
from ..hub.safety import NO_TRUST, Trust
from .clouds import LABEL, POINTS, LabelledClouds

HEAD = "ForPointCloudClassification"


class CloudDataset(torch.utils.data.Dataset):
    """Clouds as a model sees them: items `{"points": (N, 3) float32, "labels": int}`, kept in memory.

    Args:
        dataset: a `datasets.Dataset` with the columns `points` and `label`.
    """

    def __init__(self, dataset: Dataset):
        self.clouds = [torch.from_numpy(cloud) for cloud in arrays_of(dataset)]
        self.labels = np.asarray(dataset[LABEL][:], dtype=np.int64)
        self.roles = np.asarray(dataset[ROLE_COLUMN][:]) if ROLE_COLUMN in dataset.column_names else None

    def __len__(self) -> int:
        return len(self.clouds)

    def __getitem__(self, row: int) -> dict:
        return {"points": self.clouds[row], "labels": int(self.labels[row])}


def arrays_of(dataset: Dataset) -> list[np.ndarray]:
    """The clouds of a data set, float32 (N, 3) each."""
    column = dataset.select_columns(POINTS).with_format("arrow")
    clouds = []
    for start in range(0, len(column), 1000):
        for cloud in column[start : start + 1000][POINTS]:
            flat = np.array(cloud.values.flatten(), dtype=np.float32)  # `flatten` minds where a slice begins
            clouds.append(flat.reshape(-1, 3))
    return clouds


def collate_clouds(items: list[dict]) -> dict[str, Tensor]:
    """A batch of clouds. Smaller ones are filled up with their own points.

    Only then there is a `points_mask` (B, N) too, false at those copies: a model has to take and heed it.
    """
    sizes = torch.tensor([len(item["points"]) for item in items])
    places = torch.arange(sizes.max())
    points = [item["points"][places % len(item["points"])] for item in items]
    batch = {"points": torch.stack(points), "labels": torch.tensor([item["labels"] for item in items])}
    mask = places < sizes[:, None]
    return batch if mask.all() else {**batch, "points_mask": mask}


def scale_and_jitter(batch: dict) -> dict:
    """The usual augmentation as a batch transform: each cloud scaled by 0.8 to 1.25, each point moved by σ = 0.01.

    No rotation: the classes of most data sets are seen upright.

    Args:
        batch: with `points`, (B, N, 3); draws from torch's global generator.
    """
    points = batch["points"]
    scale = torch.empty(len(points), 1, 1, device=points.device).uniform_(0.8, 1.25)
    noise = (0.01 * torch.randn_like(points)).clamp(-0.05, 0.05)
    return {**batch, "points": scale * points + noise}


def load_cloud_classifier(
    name_or_path: str, *, revision: str | None = None, base_model: str | None = None, trust: Trust = NO_TRUST
) -> nn.Module:
    """A classifier of point clouds: safetensors only, no remote code, unless `trust` says so.

    The folder of a PEFT adapter gives the model that it sits on (`base_model`, or what its config names; `revision` is
    of that one) with the adapter merged into it.

    Raises:
        ValueError: when the model cannot be found or read, or is no classifier of point clouds.
    """
    if is_adapter(name_or_path):

        def load(place: str, **options) -> tuple[nn.Module, None]:
            return load_cloud_classifier(place, **options), None

        return load_adapted(name_or_path, base_model, load, trust, revision)[0]
    return load_model(name_or_path, HEAD, revision=revision, trust=trust)


def small_cloud_model(architecture: str, data: LabelledClouds) -> nn.Module:
    """A small untrained model for these clouds: a `pointnet` or a `pointnet2`."""
    from ..models import (
        PointNet2Config,
        PointNet2ForPointCloudClassification,
        PointNetConfig,
        PointNetForPointCloudClassification,
    )

    names = data.class_names
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    if architecture == "pointnet":
        config = PointNetConfig(
            local_channels=[32, 32],
            global_channels=[32, 64, 256],
            head_channels=[128, 64],
            input_transform=False,
            feature_transform=False,
            **labels,
        )
        return PointNetForPointCloudClassification(config)
    config = PointNet2Config(
        centres=[64, 16],
        radii=[0.25, 0.6],
        neighbours=[16, 16],
        channels=[[16, 16, 32], [32, 32, 64]],
        global_channels=[64, 128],
        head_channels=[64],
        **labels,
    )
    return PointNet2ForPointCloudClassification(config)


ARCHITECTURES = ("pointnet", "pointnet2")
