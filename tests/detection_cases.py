"""Tiny detectors of each family and annotated images, shared by the tests of detection."""

from __future__ import annotations

import numpy as np
import torch
from datasets import Dataset, Features, Image
from torch import nn
from transformers import (
    DetrConfig,
    DetrForObjectDetection,
    ResNetConfig,
    ResNetForImageClassification,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrResNetConfig,
    ViTConfig,
    ViTForImageClassification,
    YolosConfig,
    YolosForObjectDetection,
)

from hf_fip.tasks.detection_data import with_objects
from hf_fip.tasks.multi_label import MULTI_LABEL

CLASSES, SIDE, QUERIES = 3, 32, 5
NAMES = [f"class {number}" for number in range(CLASSES)]
_SMALL = {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2}


def detr() -> nn.Module:
    torch.manual_seed(0)
    backbone = ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    config = DetrConfig(
        backbone_config=backbone,
        use_timm_backbone=False,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        num_queries=QUERIES,
        num_labels=CLASSES,
        **_SMALL,
    )
    return DetrForObjectDetection(config).eval()


def rt_detr(num_denoising: int = 4) -> nn.Module:
    torch.manual_seed(0)
    backbone = RTDetrResNetConfig(
        embedding_size=4,
        hidden_sizes=[4, 8],
        depths=[1, 1],
        layer_type="basic",
        downsample_in_first_stage=False,
        out_features=["stage2"],
    )
    config = RTDetrConfig(
        backbone_config=backbone,
        encoder_in_channels=[8],
        feat_strides=[8],
        encode_proj_layers=[0],
        encoder_hidden_dim=16,
        encoder_layers=1,
        hidden_expansion=0.5,
        d_model=16,
        decoder_in_channels=[16],
        num_feature_levels=1,
        decoder_layers=1,
        num_queries=QUERIES,
        num_denoising=num_denoising,
        num_labels=CLASSES,
        **_SMALL,
    )
    return RTDetrForObjectDetection(config).eval()


def yolos() -> nn.Module:
    torch.manual_seed(0)
    config = YolosConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=[SIDE, SIDE],
        patch_size=8,
        num_detection_tokens=QUERIES,
        use_mid_position_embeddings=False,
        num_labels=CLASSES,
    )
    return YolosForObjectDetection(config).eval()


DETECTORS = {"detr": detr, "rt_detr": rt_detr, "yolos": yolos}


def multi_label_vit() -> nn.Module:
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=SIDE,
        patch_size=8,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=CLASSES,
        problem_type=MULTI_LABEL,
    )
    return ViTForImageClassification(config).eval()


def multi_label_resnet() -> nn.Module:
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=4,
        hidden_sizes=[4, 8],
        depths=[1, 1],
        layer_type="basic",
        num_labels=CLASSES,
        problem_type=MULTI_LABEL,
    )
    return ResNetForImageClassification(config).eval()


CLASSIFIERS = {"vit": multi_label_vit, "resnet": multi_label_resnet}


def detection_batch(objects: tuple[int, ...] = (2, 0, 3)) -> dict:
    """So many random images with so many random objects each."""
    torch.manual_seed(1)
    labels = []
    for count in objects:
        centre, size = 0.3 + 0.4 * torch.rand(count, 2), 0.1 + 0.3 * torch.rand(count, 2)
        labels.append({"class_labels": torch.randint(CLASSES, (count,)), "boxes": torch.cat([centre, size], 1)})
    return {"pixel_values": torch.randn(len(objects), 3, SIDE, SIDE), "labels": labels}


def annotated(objects: list[list[tuple[int, list[float]]]], sizes: list[tuple[int, int]] | None = None) -> Dataset:
    """Gray-noise images with these objects, (class, [x, y, width, height]), of these heights and widths."""
    rng = np.random.default_rng(0)
    sizes = sizes or [(SIDE, SIDE)] * len(objects)
    images = [rng.integers(90, 160, (*size, 3), dtype=np.uint8) for size in sizes]
    rows = [{"bbox": [box for _, box in found], "category": [kind for kind, _ in found]} for found in objects]
    return with_objects(Dataset.from_dict({"image": images}, features=Features({"image": Image()})), rows, NAMES)
