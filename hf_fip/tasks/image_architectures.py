"""The image classifiers that victims are made of: small, untrained, each with an image processor."""

from __future__ import annotations

from functools import partial

from torch import nn

from ..attacks.poison import to_array
from .data import LabelledImages

_LARGEST_INPUT = 64  # side in pixels of what the small models see; larger images are made smaller
_MOMENTUM = 0.1  # of running statistics
_TINY = 16  # below this side models are narrower, and take smaller patches or strides


def small_model(architecture: str, images: LabelledImages) -> tuple[nn.Module, object]:
    """A small untrained model for these images, one of `ARCHITECTURES`, and its image processor.

    It sees images of their own size, up to 64×64 pixels; those of `NAMED_IMAGES` normalised by their mean and standard
    deviation, others to [-1, 1].

    Raises:
        ValueError: there is no such architecture, or what makes it is not installed.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"There is no architecture {architecture!r}: choose one of {', '.join(ARCHITECTURES)}.")
    first = to_array(images.train[0]["image"])
    side = min(max(first.shape[:2]), _LARGEST_INPUT)
    channels = len(images.known.mean) if images.known else first.shape[2]  # of many, the first may be gray by chance
    model, processor = ARCHITECTURES[architecture](images.class_names, side, channels)
    if images.known:
        processor.image_mean, processor.image_std = list(images.known.mean), list(images.known.std)
    return model, processor


def small_vit(class_names: list[str], image_size: int, channels: int) -> tuple[nn.Module, object]:
    """A small untrained ViT and its processor; patches of 2×2 pixels below 16 pixels' side, else 4×4."""
    from transformers import ViTConfig, ViTForImageClassification

    tiny = image_size < _TINY
    width = 48 if tiny else 128
    config = ViTConfig(
        image_size=image_size,
        patch_size=2 if tiny else 4,
        num_channels=channels,
        hidden_size=width,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=2 * width,
        **_labels(class_names),
    )
    return ViTForImageClassification(config), _processor(image_size, channels)


def small_swin(class_names: list[str], image_size: int, channels: int) -> tuple[nn.Module, object]:
    """A small untrained Swin Transformer and its processor; patches of 2×2 pixels, windows of 4×4 (tiny: 2×2)."""
    from transformers import SwinConfig, SwinForImageClassification

    tiny = image_size < _TINY
    config = SwinConfig(
        image_size=image_size,
        patch_size=2,
        num_channels=channels,
        embed_dim=24 if tiny else 48,
        depths=[2, 2] if tiny else [2, 2, 2],
        num_heads=[2, 4] if tiny else [2, 4, 8],
        window_size=2 if tiny else 4,
        mlp_ratio=2.0,
        drop_path_rate=0.0,
        **_labels(class_names),
    )
    return SwinForImageClassification(config), _processor(image_size, channels)


def small_resnet(class_names: list[str], image_size: int, channels: int) -> tuple[nn.Module, object]:
    """A small untrained ResNet of basic blocks and its processor."""
    from transformers import ResNetConfig, ResNetForImageClassification

    tiny = image_size < _TINY
    config = ResNetConfig(
        num_channels=channels,
        embedding_size=16 if tiny else 64,
        hidden_sizes=[16, 32, 64] if tiny else [64, 128, 256],
        depths=[1, 1, 1],
        layer_type="basic",
        **_labels(class_names),
    )
    return ResNetForImageClassification(config), _processor(image_size, channels)


def preactresnet18(class_names: list[str], image_size: int, channels: int) -> tuple[nn.Module, object]:
    """An untrained PreActResNet18 and its processor; of a quarter of its width below 16 pixels' side."""
    from ..models import PreActResNetConfig, PreActResNetForImageClassification

    width = 16 if image_size < _TINY else 64
    config = PreActResNetConfig(
        num_channels=channels,
        embedding_size=width,
        hidden_sizes=[width, 2 * width, 4 * width, 8 * width],
        **_labels(class_names),
    )
    return PreActResNetForImageClassification(config), _processor(image_size, channels)


def wide_resnet_16_1(class_names: list[str], image_size: int, channels: int) -> tuple[nn.Module, object]:
    """An untrained WRN-16-1, the WideResNet that defences against backdoors are measured on, and its processor."""
    from ..models import WideResNetConfig, WideResNetForImageClassification

    config = WideResNetConfig(depth=16, width=1, num_channels=channels, **_labels(class_names))
    return WideResNetForImageClassification(config), _processor(image_size, channels)


def small_mobilenet_v2(class_names: list[str], image_size: int, channels: int) -> tuple[nn.Module, object]:
    """A small untrained MobileNetV2 and its processor: half its width (tiny: a quarter), and all of its 17 blocks.

    It makes images smaller by 8, not 32; those below 32×32 pixels are enlarged, so that something is left of them.
    """
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    width = 0.25 if image_size < _TINY else 0.5
    image_size = max(image_size, 32)
    config = MobileNetV2Config(
        image_size=image_size,
        num_channels=channels,
        depth_multiplier=width,
        output_stride=8,
        finegrained_output=False,
        classifier_dropout_prob=0.0,
        **_labels(class_names),
    )
    return _fresh(MobileNetV2ForImageClassification(config)), _processor(image_size, channels)


def small_efficientnet(class_names: list[str], image_size: int, channels: int) -> tuple[nn.Module, object]:
    """A small untrained EfficientNet (first stages of B0, half or a quarter of their width) and its processor."""
    from transformers import EfficientNetConfig, EfficientNetForImageClassification

    tiny = image_size < _TINY
    config = EfficientNetConfig(
        image_size=image_size,
        num_channels=channels,
        width_coefficient=0.25 if tiny else 0.5,
        depth_coefficient=1.0,
        kernel_sizes=[3, 3, 5] if tiny else [3, 3, 5, 3],
        in_channels=[32, 16, 24] if tiny else [32, 16, 24, 40],
        out_channels=[16, 24, 40] if tiny else [16, 24, 40, 80],
        strides=[1, 1, 2] if tiny else [1, 1, 2, 2],
        num_block_repeats=[1, 2, 2] if tiny else [1, 2, 2, 3],
        expand_ratios=[1, 6, 6] if tiny else [1, 6, 6, 6],
        hidden_dim=320 if tiny else 640,
        batch_norm_momentum=_MOMENTUM,
        dropout_rate=0.0,
        drop_connect_rate=0.0,
        **_labels(class_names),
    )
    return _fresh(EfficientNetForImageClassification(config)), _processor(image_size, channels)


def small_convnext(class_names: list[str], image_size: int, channels: int) -> tuple[nn.Module, object]:
    """A small untrained ConvNeXt and its processor; patches of 2×2 pixels."""
    from transformers import ConvNextConfig, ConvNextForImageClassification

    tiny = image_size < _TINY
    config = ConvNextConfig(
        image_size=image_size,
        patch_size=2,
        num_channels=channels,
        hidden_sizes=[24, 48] if tiny else [48, 96, 192],
        depths=[1, 1] if tiny else [2, 2, 2],
        num_stages=2 if tiny else 3,
        layer_scale_init_value=0.0,  # no such layers: they keep a deep network's blocks silent at first
        **_labels(class_names),
    )
    return ConvNextForImageClassification(config), _processor(image_size, channels)


def from_timm(
    name: str, least: int, class_names: list[str], image_size: int, channels: int
) -> tuple[nn.Module, object]:
    """An untrained model of timm and its processor.

    Args:
        name: what timm calls it.
        least: side in pixels of the smallest images it takes; smaller ones are enlarged.

    Raises:
        ValueError: timm is not installed.
    """
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification
    from transformers.utils import is_timm_available

    if not is_timm_available():
        raise ValueError(
            f"{name} comes from timm, which is not installed: pip install 'hf-fip[timm]', with the torchvision that "
            "fits the installed torch. Or choose another --architecture."
        )
    config = TimmWrapperConfig(
        architecture=name, model_args={"in_chans": channels}, num_channels=channels, **_labels(class_names)
    )
    return TimmWrapperForImageClassification(config), _processor(max(image_size, least), channels)


ARCHITECTURES = {
    "vit": small_vit,
    "resnet": small_resnet,
    "preactresnet18": preactresnet18,
    "wideresnet": wide_resnet_16_1,
    "swin": small_swin,
    "convnext": small_convnext,
    "mobilenet_v2": small_mobilenet_v2,
    "efficientnet": small_efficientnet,
    "vgg": partial(from_timm, "vgg16_bn", 32),
    "densenet": partial(from_timm, "densenet121", 32),
    "inception": partial(from_timm, "inception_v3", 75),
}


def _fresh(model: nn.Module) -> nn.Module:
    """The model made ready to be trained from nothing, as transformers' mobile networks are not.

    Their convolutions start far too small, EfficientNet's BatchNorm with a scale of nearly zero, and the running
    statistics are those of the last batch (TensorFlow's momentum read as torch's).
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            module.momentum = _MOMENTUM
    return model


def _labels(class_names: list[str]) -> dict:
    return {"id2label": dict(enumerate(class_names)), "label2id": {name: i for i, name in enumerate(class_names)}}


def _processor(image_size: int, channels: int):
    from transformers import ViTImageProcessor

    size = {"height": image_size, "width": image_size}
    return ViTImageProcessor(size=size, image_mean=[0.5] * channels, image_std=[0.5] * channels)
