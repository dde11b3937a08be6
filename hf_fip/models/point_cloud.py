"""What the point cloud classifiers share: layers that act on every point by itself, a loss, and an Auto class."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import ModelOutput
from transformers.models.auto.auto_factory import _BaseAutoModelClass, _LazyAutoMapping


class AutoModelForPointCloudClassification(_BaseAutoModelClass):
    """The Auto class of models with `points` (batch, number, 3) in and `logits` (batch, classes) out."""

    _model_mapping = _LazyAutoMapping(OrderedDict(), OrderedDict())


@dataclass
class PointCloudOutput(ModelOutput):
    """What a backbone makes of clouds.

    Attributes:
        last_hidden_state: `(batch, number, channels)`, a feature of each point (or of each group of points) left.
        pooler_output: `(batch, channels)`, one feature of the whole cloud.
        feature_transform: `(batch, width, width)`, the matrix that PointNet has multiplied its features by.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    feature_transform: Tensor | None = None


@dataclass
class PointCloudClassifierOutput(ModelOutput):
    """`loss` (when labels were given) and `logits` (batch, classes)."""

    loss: Tensor | None = None
    logits: Tensor | None = None


class PointNorm(nn.BatchNorm1d):
    """BatchNorm of `(…, channels)`. A single row has no spread: in training it is normed by the running statistics."""

    def forward(self, input: Tensor) -> Tensor:
        rows = input.flatten(0, -2)
        if self.training and len(rows) == 1:
            normed = F.batch_norm(rows, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        else:
            normed = super().forward(rows)
        return normed.view_as(input)


class PointLayers(nn.Sequential):
    """Linear, BatchNorm, ReLU, again and again, on the last axis: (…, first width) to (…, last width).

    With `mask` (…) the places where it is false enter no statistics and come out as zeros, which change no maximum.
    """

    def __init__(self, *widths: int):
        super().__init__()
        for before, after in zip(widths, widths[1:], strict=False):
            self.extend([nn.Linear(before, after, bias=False), PointNorm(after), nn.ReLU()])

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None:
            return super().forward(input)
        kept = super().forward(input[mask])
        return kept.new_zeros(*mask.shape, kept.shape[-1]).index_put((mask,), kept)


class PointCloudModel(PreTrainedModel):
    """A `PreTrainedModel` of clouds: `points` are `(batch, number, 3)`, in the unit sphere around the origin.

    `points_mask`, (batch, number) bool, is false where a smaller cloud was filled up; without it all points are real.
    What fills a cloud up reaches neither its answer nor, in training, the statistics of BatchNorm.
    """

    base_model_prefix = "backbone"
    main_input_name = "points"
    input_modalities = ("points",)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm1d):
            init.ones_(module.weight)
            init.zeros_(module.bias)
            init.zeros_(module.running_mean)
            init.ones_(module.running_var)
            init.zeros_(module.num_batches_tracked)


class PointCloudClassifier(PointCloudModel):
    """A backbone and a head of fully connected layers, the last of them behind dropout."""

    backbone_class: type[PointCloudModel]

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.backbone = self.backbone_class(config)
        self.head = PointLayers(self.backbone.width, *config.head_channels)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.head_channels[-1], config.num_labels)
        self.post_init()

    def forward(
        self, points: Tensor, labels: Tensor | None = None, points_mask: Tensor | None = None, **kwargs
    ) -> PointCloudClassifierOutput:
        """Classify clouds `points` (batch, number, 3); `labels` (batch,) of integers give a cross-entropy loss."""
        found = self.backbone(points, points_mask)
        logits = self.classifier(self.dropout(self.head(found.pooler_output)))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits, labels) + self.penalty(found)
        return PointCloudClassifierOutput(loss=loss, logits=logits)

    def penalty(self, found: PointCloudOutput) -> Tensor | float:
        """What the loss has beside cross-entropy."""
        return 0.0
