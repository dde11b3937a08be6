"""PointNet: a function of each point, the maximum over all points, a classifier. Charles Qi et al., CVPR 2017."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers import initialization as init

from .point_cloud import PointCloudClassifier, PointCloudModel, PointCloudOutput, PointLayers


class PointNetConfig(PreTrainedConfig):
    """Configuration of PointNet; the defaults are those of the paper.

    Args:
        local_channels: widths of the layers on each point before the feature transform.
        global_channels: those after it; the maximum is taken of the last.
        head_channels: widths of the fully connected layers before the last one.
        transform_channels, transform_head_channels: the same two of the networks that make the transforms.
        input_transform: whether a learned 3×3 matrix turns the points first.
        feature_transform: whether a learned matrix A turns the local features.
        transform_penalty: weight of ‖I − A Aᵀ‖² in the loss, which keeps A close to a rotation.
        dropout: share of the last hidden layer dropped in training.
    """

    model_type = "pointnet"

    local_channels: list[int] | tuple[int, ...] = (64, 64)
    global_channels: list[int] | tuple[int, ...] = (64, 128, 1024)
    head_channels: list[int] | tuple[int, ...] = (512, 256)
    transform_channels: list[int] | tuple[int, ...] = (64, 128, 1024)
    transform_head_channels: list[int] | tuple[int, ...] = (512, 256)
    input_transform: bool = True
    feature_transform: bool = True
    transform_penalty: float = 0.001
    dropout: float = 0.3


class MatrixLayer(nn.Linear):
    """The last layer of a [`Transform`], which starts at zero."""


class Transform(nn.Module):
    """A small PointNet that makes a `width`×`width` matrix for each cloud, at first the identity ("T-Net")."""

    def __init__(self, width: int, config: PointNetConfig):
        super().__init__()
        self.width = width
        self.points = PointLayers(width, *config.transform_channels)
        self.head = PointLayers(config.transform_channels[-1], *config.transform_head_channels)
        self.matrix = MatrixLayer(config.transform_head_channels[-1], width * width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        matrix = self.matrix(self.head(self.points(x, mask).amax(dim=1)))
        return matrix.view(-1, self.width, self.width) + torch.eye(self.width, dtype=x.dtype, device=x.device)


class PointNetPreTrainedModel(PointCloudModel):
    config_class = PointNetConfig

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, MatrixLayer):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        else:
            super()._init_weights(module)


class PointNetModel(PointNetPreTrainedModel):
    """PointNet without its classifier: a feature of each point, and their maximum."""

    def __init__(self, config: PointNetConfig):
        super().__init__(config)
        self.width = config.global_channels[-1]
        self.input_transform = Transform(3, config) if config.input_transform else None
        self.local_layers = PointLayers(3, *config.local_channels)
        width = config.local_channels[-1]
        self.feature_transform = Transform(width, config) if config.feature_transform else None
        self.global_layers = PointLayers(width, *config.global_channels)
        self.post_init()

    def forward(self, points: Tensor, points_mask: Tensor | None = None, **kwargs) -> PointCloudOutput:
        """Features of clouds `points`, (batch, number, 3)."""
        x, matrix = points, None
        if self.input_transform is not None:
            x = x @ self.input_transform(x, points_mask)
        x = self.local_layers(x, points_mask)
        if self.feature_transform is not None:
            matrix = self.feature_transform(x, points_mask)
            x = x @ matrix
        x = self.global_layers(x, points_mask)
        return PointCloudOutput(last_hidden_state=x, pooler_output=x.amax(dim=1), feature_transform=matrix)


class PointNetForPointCloudClassification(PointCloudClassifier, PointNetPreTrainedModel):
    """PointNet with its classifier: `points` (batch, number, 3) in, `logits` (batch, classes) out."""

    backbone_class = PointNetModel

    def penalty(self, found: PointCloudOutput) -> Tensor | float:
        """transform_penalty · ‖I − A Aᵀ‖², the mean over the batch (section 4.2 of the paper)."""
        matrix = found.feature_transform
        if matrix is None:
            return 0.0
        identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        return self.config.transform_penalty * (identity - matrix @ matrix.mT).square().sum((1, 2)).mean()
