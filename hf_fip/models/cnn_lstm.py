"""A convolutional network on each frame and an LSTM over the frames, as a transformers model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput

from .lstm_seq2seq import LSTM


class CNNLSTMConfig(PreTrainedConfig):
    """Configuration of [`CNNLSTMForVideoClassification`].

    Args:
        num_channels: of a frame.
        hidden_sizes: channels of the convolutions, each of which halves the frame.
        pooled_size: side of the grid that a frame's features are averaged to before the LSTM sees them; with 1, where
            in the frame something is seen is lost.
        lstm_size: width of the LSTM.
        lstm_layers: number of its layers.
        dropout: share of the features of a frame, and of the LSTM's output, that is dropped in training.
    """

    model_type = "cnn_lstm"

    num_channels: int = 3
    hidden_sizes: list[int] | tuple[int, ...] = (16, 32, 64)
    pooled_size: int = 2
    lstm_size: int = 64
    lstm_layers: int = 1
    dropout: float = 0.0


class FrameLayers(nn.Sequential):
    """Convolution of stride 2, BatchNorm, ReLU for each width, and an average over the cells of a grid.

    Frames `(B, C, H, W)` of any size become features `(B, last width · grid²)`.
    """

    def __init__(self, config: CNNLSTMConfig):
        super().__init__()
        before = config.num_channels
        for width in config.hidden_sizes:
            self.extend([nn.Conv2d(before, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width)])
            self.append(nn.ReLU())
            before = width
        self.extend([nn.AdaptiveAvgPool2d(config.pooled_size), nn.Flatten()])


class CNNLSTMPreTrainedModel(PreTrainedModel):
    """`pixel_values` are `(batch, frames, channels, height, width)`, any number of frames of any size."""

    config_class = CNNLSTMConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    input_modalities = ("video",)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            init.ones_(module.weight)
            init.zeros_(module.bias)
            init.zeros_(module.running_mean)
            init.ones_(module.running_var)
            init.zeros_(module.num_batches_tracked)
        elif isinstance(module, LSTM):
            bias = torch.zeros(4, module.from_input.out_features // 4)
            bias[1] = 1.0  # of the forget gate, so that cells remember at first (Gers et al., 2000)
            init.copy_(module.from_input.bias, bias.flatten())


class CNNLSTMModel(CNNLSTMPreTrainedModel):
    """The network without its classifier: a feature after each frame, and their mean.

    Source: Donahue et al., *Long-term Recurrent Convolutional Networks for Visual Recognition and Description*, CVPR
    2015, which averages its predictions over the frames; before a linear classifier that is the mean of the features.
    """

    def __init__(self, config: CNNLSTMConfig):
        super().__init__(config)
        self.frames = FrameLayers(config)
        widths = [config.hidden_sizes[-1] * config.pooled_size**2] + [config.lstm_size] * config.lstm_layers
        self.layers = nn.ModuleList(LSTM(before, after) for before, after in zip(widths, widths[1:], strict=False))
        self.dropout = nn.Dropout(config.dropout)
        self.post_init()

    def forward(self, pixel_values: Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """Features of clips `pixel_values`, (batch, frames, channels, height, width)."""
        count, length = pixel_values.shape[:2]
        x = self.frames(pixel_values.flatten(0, 1)).view(count, length, -1)
        for layer in self.layers:
            start = x.new_zeros(count, self.config.lstm_size)
            x, *_ = layer(self.dropout(x), start, start)
        return BaseModelOutputWithPooling(last_hidden_state=x, pooler_output=x.mean(dim=1))


class CNNLSTMForVideoClassification(CNNLSTMPreTrainedModel):
    """The network with a linear classifier: `pixel_values` in, `logits` (batch, classes) out."""

    def __init__(self, config: CNNLSTMConfig):
        super().__init__(config)
        self.backbone = CNNLSTMModel(config)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.lstm_size, config.num_labels)
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs) -> ImageClassifierOutput:
        """Classify clips; `labels` (batch,) of integers give a cross-entropy loss."""
        logits = self.classifier(self.dropout(self.backbone(pixel_values).pooler_output))
        return ImageClassifierOutput(loss=None if labels is None else F.cross_entropy(logits, labels), logits=logits)
