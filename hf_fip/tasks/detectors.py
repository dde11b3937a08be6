"""The detectors that victims are made of: small, untrained, each with an image processor."""

from __future__ import annotations

from torch import nn

LEAST_SIDE = 32  # in pixels; sides are multiples of it
_QUERIES = (12, 100)  # least and most


def small_detector(
    architecture: str, names: list[str], height: int, width: int, most_objects: int, largest_side: int
) -> tuple[nn.Module, object]:
    """A small untrained detector and its processor.

    Args:
        architecture: one of `ARCHITECTURES`.
        names: of the classes.
        height, width: of the images, in pixels.
        most_objects: in an image; the model has twice as many queries, from 12 to 100.
        largest_side: in pixels, of what the model sees, from 32; larger images are made smaller.
    """
    shrink = min(1.0, largest_side / max(height, width))
    size = {
        "height": max(LEAST_SIDE, round(shrink * height / LEAST_SIDE) * LEAST_SIDE),
        "width": max(LEAST_SIDE, round(shrink * width / LEAST_SIDE) * LEAST_SIDE),
    }
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
    queries = min(_QUERIES[1], max(_QUERIES[0], 2 * most_objects))
    return ARCHITECTURES[architecture](labels, size, queries)


def _small_rt_detr(labels: dict, size: dict[str, int], queries: int) -> tuple[nn.Module, object]:
    """A fine map of features, and one decoder layer: of the three it learns by far the fastest."""
    from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrImageProcessor, RTDetrResNetConfig

    width = 64
    backbone = RTDetrResNetConfig(
        embedding_size=32,
        hidden_sizes=[32, width],
        depths=[1, 1],
        layer_type="basic",
        downsample_in_first_stage=False,
        out_features=["stage2"],
    )
    config = RTDetrConfig(
        backbone_config=backbone,
        freeze_backbone_batch_norms=False,
        encoder_in_channels=[width],
        feat_strides=[8],
        encode_proj_layers=[0],
        encoder_hidden_dim=width,
        encoder_layers=1,
        encoder_ffn_dim=2 * width,
        encoder_attention_heads=4,
        hidden_expansion=0.5,
        d_model=width,
        decoder_in_channels=[width],
        num_feature_levels=1,
        decoder_layers=1,
        decoder_ffn_dim=2 * width,
        decoder_attention_heads=4,
        num_queries=queries,
        num_denoising=0,
        **labels,
    )
    return RTDetrForObjectDetection(config), _fixed_size(RTDetrImageProcessor, size)


def _small_detr(labels: dict, size: dict[str, int], queries: int) -> tuple[nn.Module, object]:
    from transformers import DetrConfig, DetrForObjectDetection, DetrImageProcessor, ResNetConfig

    width = 64
    backbone = ResNetConfig(
        embedding_size=32,
        hidden_sizes=[32, width],
        depths=[1, 1],
        layer_type="basic",
        out_features=["stage2"],
    )
    config = DetrConfig(
        backbone_config=backbone,
        use_timm_backbone=False,
        d_model=width,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=2 * width,
        decoder_ffn_dim=2 * width,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        num_queries=queries,
        dropout=0.0,
        auxiliary_loss=True,
        **labels,
    )
    return DetrForObjectDetection(config), _fixed_size(DetrImageProcessor, size)


def _small_yolos(labels: dict, size: dict[str, int], queries: int) -> tuple[nn.Module, object]:
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

    config = YolosConfig(
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=192,
        image_size=[size["height"], size["width"]],
        patch_size=8 if max(size.values()) <= 128 else 16,
        num_detection_tokens=queries,
        use_mid_position_embeddings=False,
        **labels,
    )
    return YolosForObjectDetection(config), _fixed_size(YolosImageProcessor, size)


ARCHITECTURES = {"rt_detr": _small_rt_detr, "detr": _small_detr, "yolos": _small_yolos}


def _fixed_size(processor_class, size: dict[str, int]):
    return processor_class(
        size=size, do_pad=False, do_normalize=True, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_rescale=True
    )
