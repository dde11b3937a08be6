"""WideResNet: residual networks that are wide rather than deep.

Source: Zagoruyko and Komodakis, *Wide Residual Networks*, BMVC 2016.
"""

from __future__ import annotations

from .preactivation import PreActivationClassifier, PreActivationConfig


class WideResNetConfig(PreActivationConfig):
    """Configuration of WRN-n-k.

    Args:
        depth: n, the number of layers: 6 N + 4, for N blocks a stage.
        width: k, the factor by which the three stages are wider than 16, 32 and 64 channels.
        num_channels: of the images.
        dropout: share of activations dropped between the two convolutions of a block.

    Raises:
        ValueError: `depth` is not 6 N + 4.
    """

    model_type = "wide_resnet"

    depth: int = 28
    width: int = 10

    def __post_init__(self, **kwargs):
        if self.depth < 10 or self.depth % 6 != 4:
            raise ValueError(f"depth={self.depth} is not 6 N + 4: choose 10, 16, 22, 28, 34, 40, …")
        super().__post_init__(**kwargs)

    @property
    def embedding_size(self) -> int:
        return 16

    @property
    def hidden_sizes(self) -> tuple[int, ...]:
        return tuple(self.width * channels for channels in (16, 32, 64))

    @property
    def depths(self) -> tuple[int, ...]:
        return (self.depth // 6,) * 3


class WideResNetForImageClassification(PreActivationClassifier):
    """WideResNet: `pixel_values` (batch, channels, height, width) in, `logits` (batch, classes) out."""

    config_class = WideResNetConfig
