"""What the residual networks with pre-activation share: the block, the stages, the classifier.

Source: He, Zhang, Ren and Sun, *Identity Mappings in Deep Residual Networks*, ECCV 2016.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils import can_return_tuple


class PreActivationConfig(PreTrainedConfig):
    """What the configurations of these networks share; a subclass gives the sizes that say what a network is.

    Attributes:
        num_channels: of the images.
        dropout: share of activations dropped between the two convolutions of a block.
        embedding_size: channels of the first convolution.
        hidden_sizes: channels of each stage; each but the first halves height and width.
        depths: number of blocks of each stage.
    """

    num_channels: int = 3
    dropout: float = 0.0


class PreActivationBlock(nn.Module):
    """x + conv(relu(norm(conv(relu(norm(x)))))), with 3×3 convolutions.

    Args:
        channels: of the input.
        width: channels of the output.
        stride: of the first convolution.
        first: whether it is the network's first block. There, and where the shape changes, the first activation comes
            before the two paths part (section 4.1 of the paper); a change of shape takes a 1×1 convolution.
    """

    def __init__(self, channels: int, width: int, stride: int, dropout: float, first: bool):
        super().__init__()
        changes = stride != 1 or channels != width
        self.parts_later = first or changes
        self.norm1 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Conv2d(channels, width, 1, stride=stride, bias=False) if changes else nn.Identity()
        self.conv1 = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.norm1(x))
        residual = self.conv2(self.dropout(F.relu(self.norm2(self.conv1(activated)))))
        return self.shortcut(activated if self.parts_later else x) + residual


class PreActivationClassifier(PreTrainedModel):
    """Convolution, stages of blocks, a last activation, the mean over height and width, a linear classifier.

    `pixel_values` are `(batch, channels, height, width)`, of any height and width.
    """

    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config: PreActivationConfig):
        super().__init__(config)
        channels = config.embedding_size
        self.embedder = nn.Conv2d(config.num_channels, channels, 3, padding=1, bias=False)
        self.stages = nn.ModuleList()
        for number, (width, depth) in enumerate(zip(config.hidden_sizes, config.depths, strict=True)):
            stage = nn.Sequential()
            for place in range(depth):
                stride = 2 if number > 0 and place == 0 else 1
                stage.append(PreActivationBlock(channels, width, stride, config.dropout, first=number + place == 0))
                channels = width
            self.stages.append(stage)
        self.norm = nn.BatchNorm2d(channels)
        self.classifier = nn.Linear(channels, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> ImageClassifierOutput:
        """Classify images.

        Args:
            labels: `(batch,)` integers for a cross-entropy loss; other kinds by the config's `problem_type`.
            output_hidden_states: give the feature maps too, of the first convolution and of each stage.
        """
        x = self.embedder(pixel_values)
        hidden_states = (x,)
        for stage in self.stages:
            x = stage(x)
            hidden_states += (x,)
        logits = self.classifier(F.relu(self.norm(x)).mean(dim=(2, 3)))
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return ImageClassifierOutput(
            loss=None if labels is None else self.loss_function(labels, logits, self.config),
            logits=logits,
            hidden_states=hidden_states if wanted else None,
        )
