"""PointNet++ (single-scale grouping): PointNet on small neighbourhoods, then on their features. Qi et al., 2017.

Farthest-point sampling and the ball query are plain tensor operations over the whole batch. Which points they choose
depends on no weight, so that the model is differentiable wherever PointNet is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from .point_cloud import PointCloudClassifier, PointCloudModel, PointCloudOutput, PointLayers


class PointNet2Config(PreTrainedConfig):
    """Configuration of PointNet++; the defaults are those of the paper.

    Args:
        centres: number of neighbourhoods of each level.
        radii: their radius.
        neighbours: points in each of them, at most.
        channels: widths of the layers of each level.
        global_channels: widths of the layers on what the last level leaves; their maximum is the cloud's feature.
        head_channels: widths of the fully connected layers before the last one.
        dropout: share of the last hidden layer dropped in training.
    """

    model_type = "pointnet2"

    centres: list[int] | tuple[int, ...] = (512, 128)
    radii: list[float] | tuple[float, ...] = (0.2, 0.4)
    neighbours: list[int] | tuple[int, ...] = (32, 64)
    channels: list[list[int]] | tuple[tuple[int, ...], ...] = ((64, 64, 128), (128, 128, 256))
    global_channels: list[int] | tuple[int, ...] = (256, 512, 1024)
    head_channels: list[int] | tuple[int, ...] = (512, 256)
    dropout: float = 0.5


@torch.no_grad()
def farthest_points(points: Tensor, count: int, mask: Tensor | None = None) -> Tensor:
    """Choose `count` points of each cloud, each the farthest from those chosen before.

    The first is the one farthest from the origin, so that the choice depends on nothing but the cloud.

    Args:
        points: `(batch, number, 3)`.
        count: may exceed the number of points; some are then chosen several times.
        mask: `(batch, number)` bool, false at points that are not to be chosen.

    Returns:
        Their places, `(batch, count)` int64.
    """
    nearest = torch.full_like(points[..., 0], torch.inf)  # squared distance to the closest of those chosen
    if mask is not None:
        nearest = nearest.masked_fill(~mask, -1)
    chosen = [torch.minimum(points.square().sum(-1), nearest).argmax(1)]
    for _ in range(count - 1):
        last = take(points, chosen[-1][:, None])
        nearest = torch.minimum(nearest, (points - last).square().sum(-1))
        chosen.append(nearest.argmax(1))
    return torch.stack(chosen, dim=1)


@torch.no_grad()
def ball_query(points: Tensor, centres: Tensor, radius: float, count: int, mask: Tensor | None = None) -> Tensor:
    """The `count` nearest points to each centre, of those within `radius`; the nearest one fills up what is missing.

    Args:
        points: `(batch, number, 3)`.
        centres: `(batch, centres, 3)`.
        mask: `(batch, number)` bool, false at points that are nobody's neighbours.

    Returns:
        Their places, `(batch, centres, min(count, number))` int64.
    """
    products = centres @ points.mT
    squared = centres.square().sum(-1)[:, :, None] - 2 * products + points.square().sum(-1)[:, None]
    if mask is not None:
        squared = squared.masked_fill(~mask[:, None], torch.inf)
    distances, places = squared.topk(min(count, points.shape[1]), dim=-1, largest=False)
    return torch.where(distances <= radius**2, places, places[..., :1])


def take(values: Tensor, places: Tensor) -> Tensor:
    """`values` (batch, number, channels) at `places` (batch, …): a tensor (batch, …, channels)."""
    flat = places.flatten(1)[..., None].expand(-1, -1, values.shape[-1])
    return values.gather(1, flat).view(*places.shape, values.shape[-1])


class SetAbstraction(nn.Module):
    """Groups points around some of them and makes one feature of each group (section 3.2 of the paper)."""

    def __init__(self, centres: int, radius: float, neighbours: int, widths: list[int]):
        super().__init__()
        self.centres, self.radius, self.neighbours = centres, radius, neighbours
        self.layers = PointLayers(*widths)

    def forward(self, points: Tensor, features: Tensor | None, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(batch, number, 3) and (batch, number, channels) to (batch, centres, 3) and (batch, centres, width).

        Points where `mask` (batch, number) is false are in no group.
        """
        centres = take(points, farthest_points(points, self.centres, mask))
        groups = ball_query(points, centres, self.radius, self.neighbours, mask)
        x = take(points, groups) - centres[:, :, None]
        if features is not None:
            x = torch.cat([x, take(features, groups)], dim=-1)
        return centres, self.layers(x).amax(dim=2)


class PointNet2PreTrainedModel(PointCloudModel):
    config_class = PointNet2Config


class PointNet2Model(PointNet2PreTrainedModel):
    """PointNet++ without its classifier: a feature of each neighbourhood of the last level, and one of the cloud."""

    def __init__(self, config: PointNet2Config):
        super().__init__(config)
        self.width = config.global_channels[-1]
        self.levels, before = nn.ModuleList(), 0
        levels = zip(config.centres, config.radii, config.neighbours, config.channels, strict=True)
        for centres, radius, neighbours, channels in levels:
            self.levels.append(SetAbstraction(centres, radius, neighbours, [3 + before, *channels]))
            before = channels[-1]
        self.global_layers = PointLayers(3 + before, *config.global_channels)
        self.post_init()

    def forward(self, points: Tensor, points_mask: Tensor | None = None, **kwargs) -> PointCloudOutput:
        """Features of clouds `points`, (batch, number, 3)."""
        x, mask = None, points_mask
        for level in self.levels:
            points, x = level(points, x, mask)
            mask = None  # all centres are real points
        x = self.global_layers(torch.cat([points, x], dim=-1))
        return PointCloudOutput(last_hidden_state=x, pooler_output=x.amax(dim=1))


class PointNet2ForPointCloudClassification(PointCloudClassifier, PointNet2PreTrainedModel):
    """PointNet++ with its classifier: `points` (batch, number, 3) in, `logits` (batch, classes) out."""

    backbone_class = PointNet2Model
