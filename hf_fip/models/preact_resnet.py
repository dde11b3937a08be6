"""PreActResNet: residual networks with pre-activation for small images.

Source: He, Zhang, Ren and Sun, *Identity Mappings in Deep Residual Networks*, ECCV 2016. The 18-layer network of basic
blocks on images of 32×32 pixels, with a first convolution of 3×3 and no pooling after it, is what the literature on
backdoors calls PreActResNet18.
"""

from __future__ import annotations

from .preactivation import PreActivationClassifier, PreActivationConfig


class PreActResNetConfig(PreActivationConfig):
    """Configuration of a PreActResNet; the defaults are those of PreActResNet18.

    Args:
        num_channels: of the images.
        embedding_size: channels of the first convolution.
        hidden_sizes: channels of each stage; each but the first halves height and width.
        depths: number of blocks, of two convolutions, of each stage.
        dropout: share of activations dropped between the two convolutions of a block.
    """

    model_type = "preact_resnet"

    embedding_size: int = 64
    hidden_sizes: list[int] | tuple[int, ...] = (64, 128, 256, 512)
    depths: list[int] | tuple[int, ...] = (2, 2, 2, 2)


class PreActResNetForImageClassification(PreActivationClassifier):
    """PreActResNet: `pixel_values` (batch, channels, height, width) in, `logits` (batch, classes) out."""

    config_class = PreActResNetConfig
