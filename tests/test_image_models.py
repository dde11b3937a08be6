"""PreActResNet and WideResNet, and the architectures that victims are made of."""

from functools import partial

import datasets
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from generated_cases import images_of
from model_cases import (
    assert_can_be_switched_off,
    assert_pushed_as_saved,
    assert_resumes_to_the_same,
    assert_trace_is_that_of_autograd,
    assert_training_moves_every_weight,
)
from safetensors.torch import load_file
from torch import nn
from trainer_cases import CLASSES, identical, image_trainer, weights
from transformers import AutoConfig, AutoModelForImageClassification, ViTImageProcessor, set_seed

from hf_fip import SingularValueConfig
from hf_fip.baselines.clp import pairs
from hf_fip.baselines.masks import channel_scales
from hf_fip.models import (
    PreActResNetConfig,
    PreActResNetForImageClassification,
    WideResNetConfig,
    WideResNetForImageClassification,
)
from hf_fip.models.preactivation import PreActivationBlock
from hf_fip.scripts.arguments import Parser
from hf_fip.scripts.images import ImageModel
from hf_fip.tasks.data import LabelledImages
from hf_fip.tasks.image_architectures import ARCHITECTURES, small_model
from hf_fip.tasks.image_classification import PixelDataset, load_image_classifier
from hf_fip.tasks.image_data import NAMED_IMAGES


def preact(seed: int = 1, **options) -> PreActResNetForImageClassification:
    set_seed(seed)
    sizes = {"num_channels": 1, "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": CLASSES}
    return PreActResNetForImageClassification(PreActResNetConfig(**{**sizes, **options}))


def wide(seed: int = 1, **options) -> WideResNetForImageClassification:
    set_seed(seed)
    sizes = {"depth": 10, "width": 1, "num_channels": 1, "num_labels": CLASSES}
    return WideResNetForImageClassification(WideResNetConfig(**{**sizes, **options}))


MODELS = {"preact_resnet": preact, "wide_resnet": wide}
OF_TIMM = {name for name, build in ARCHITECTURES.items() if isinstance(build, partial)}


@pytest.fixture(params=MODELS)
def make(request):
    return MODELS[request.param]


def pixels(rows: int = 4, side: int = 8) -> torch.Tensor:
    return torch.randn(rows, 1, side, side, generator=torch.Generator().manual_seed(0))


def settled(model: nn.Module) -> nn.Module:
    """In eval mode, with BatchNorm statistics, scales and shifts that are not the fresh ones."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    return model.eval()


# What they compute

WIDE = [(40, 1, 0.6), (40, 2, 2.2), (40, 4, 8.9), (40, 8, 35.7), (28, 10, 36.5), (28, 12, 52.5)]
WIDE += [(22, 8, 17.2), (22, 10, 26.8), (16, 8, 11.0), (16, 10, 17.1)]


def millions(model_class, config) -> float:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in model_class(config).parameters()) / 1e6


def test_preactresnet18_is_as_large_as_the_literature_says():
    assert millions(PreActResNetForImageClassification, PreActResNetConfig(num_labels=10)) == pytest.approx(
        11.17, abs=0.005
    )


@pytest.mark.parametrize("depth, width, expected", WIDE)
def test_wide_resnets_are_as_large_as_in_tables_3_and_4_of_their_paper(depth, width, expected):
    config = WideResNetConfig(depth=depth, width=width, num_labels=10)
    assert millions(WideResNetForImageClassification, config) == pytest.approx(expected, abs=0.051)


def test_wrn_28_10_is_made_by_default():
    config = WideResNetConfig()
    assert (config.embedding_size, config.hidden_sizes, config.depths) == (16, (160, 320, 640), (4, 4, 4))


@pytest.mark.parametrize("depth", [0, 4, 9, 12, 18, 27])
def test_a_depth_that_is_not_6n_and_4_is_refused(depth):
    with pytest.raises(ValueError, match=f"depth={depth} is not 6 N .* 10, 16, 22, 28"):
        WideResNetConfig(depth=depth)


BLOCKS = {  # channels in and out, stride, whether it is the first -> whether both paths begin with the activation
    "first": ((4, 4, 1, True), True),
    "later": ((4, 4, 1, False), False),
    "wider": ((4, 6, 1, False), True),
    "smaller": ((4, 4, 2, False), True),
}


@pytest.mark.parametrize("case", BLOCKS)
def test_a_block_is_that_of_the_paper(case):
    (channels, width, stride, first), shared = BLOCKS[case]
    torch.manual_seed(0)
    block = settled(PreActivationBlock(channels, width, stride, 0.0, first))
    x = torch.randn(2, channels, 5, 5)

    def activated(x, norm):
        spread = (norm.running_var + norm.eps).sqrt()
        scale, shift = norm.weight / spread, norm.bias - norm.weight * norm.running_mean / spread
        return (x * scale[:, None, None] + shift[:, None, None]).clamp(min=0)

    h = activated(x, block.norm1)
    residual = F.conv2d(h, block.conv1.weight, stride=stride, padding=1)
    residual = F.conv2d(activated(residual, block.norm2), block.conv2.weight, padding=1)
    kept = h if shared else x
    if (channels, stride) != (width, 1):
        kept = F.conv2d(kept, block.shortcut.weight, stride=stride)
    torch.testing.assert_close(block(x), kept + residual)


def test_images_of_any_size_go_through_and_each_stage_but_the_first_halves_them(make):
    model = make().eval()
    found = model(torch.randn(2, 1, 9, 7), output_hidden_states=True)
    assert found.logits.shape == (2, CLASSES) and found.loss is None
    expected = [(9, 7), (9, 7), (5, 4), (3, 2)]
    shapes = [tuple(state.shape[2:]) for state in found.hidden_states]
    assert shapes == expected[: len(model.stages) + 1]


def test_the_loss_is_that_of_the_labels(make):
    model, labels = settled(make()), torch.tensor([0, 2, 1, 1])
    found = model(pixels(), labels=labels)
    torch.testing.assert_close(found.loss, F.cross_entropy(found.logits, labels))
    several = torch.tensor([[1.0, 0.0, 1.0]] * 4)
    model = settled(make(problem_type="multi_label_classification"))
    found = model(pixels(), labels=several)
    torch.testing.assert_close(found.loss, F.binary_cross_entropy_with_logits(found.logits, several))


def test_dropout_acts_between_the_convolutions_and_in_training_only():
    model = wide(dropout=0.5)
    model.eval()
    assert torch.equal(model(pixels()).logits, model(pixels()).logits)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    assert not torch.equal(model(pixels()).logits, model(pixels()).logits)


# As models of transformers


def test_a_saved_model_is_the_same_to_every_loader(make, tmp_path):
    model = settled(make(id2label={0: "a", 1: "b", 2: "c"}))
    model.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path)
    assert identical(load_file(tmp_path / "model.safetensors"), weights(model))
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == model.config.to_diff_dict()
    loaders = type(model).from_pretrained, AutoModelForImageClassification.from_pretrained
    for load in (*loaders, lambda folder: load_image_classifier(str(folder))[0]):
        again = load(tmp_path).eval()
        assert type(again) is type(model) and identical(weights(again), weights(model))
        assert torch.equal(again(pixels()).logits, model(pixels()).logits)


def test_a_model_is_pushed_as_it_is_saved(make, monkeypatch):
    assert_pushed_as_saved(make(), monkeypatch)


def test_a_fresh_model_keeps_the_spread_of_its_activations(make):
    model = make(num_channels=3).train()
    states = model(torch.randn(16, 3, 16, 16), output_hidden_states=True).hidden_states
    assert all(0.5 < state.std() < 3 for state in states)


# As models to purify


def test_training_runs_with_the_defaults_and_moves_every_weight(make, tmp_path):
    assert_training_moves_every_weight(image_trainer(tmp_path, make()))


def test_a_resumed_run_ends_as_one_that_was_not_stopped(make, tmp_path):
    assert_resumes_to_the_same(lambda folder, **options: image_trainer(folder, make(), **options), tmp_path)


def test_fast_fip_shifts_every_convolution_and_can_be_switched_off(make, tmp_path):
    model = settled(make())
    received = model(pixels()).logits
    layers = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    options = {"peft_config": SingularValueConfig(train_norms=False), "learning_rate": 0.1}
    run = image_trainer(tmp_path, model, **options)
    run.train()
    shifted = [
        name for name, parameter in run.model.named_parameters() if "singular_delta" in name and parameter.any()
    ]
    assert len([name for name in shifted if "classifier" not in name]) == layers
    assert_can_be_switched_off(run.model, pixels(), received)


def test_clp_pairs_each_norm_with_the_convolution_before_it(make):
    model = make()
    names = {module: name for name, module in model.named_modules()}
    found = {names[norm]: names[layer] for layer, norm in pairs(model)}
    blocks = [f"stages.{stage}.0" for stage in range(len(model.stages))]
    expected = {f"{block}.norm2": f"{block}.conv1" for block in blocks}
    layers = ["embedder", *(f"{block}.conv2" for block in blocks)]
    expected |= dict(zip([*(f"{block}.norm1" for block in blocks), "norm"], layers, strict=True))
    assert found == expected
    assert {name for name, _ in channel_scales(model)} == set(expected)


# The architectures that victims are made of


def labelled(known=None) -> LabelledImages:
    part = images_of((8, 8, 1), rows=8)
    return LabelledImages(part, part, "images", known)


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name not in OF_TIMM])
def test_a_victim_of_every_architecture_is_made_purified_saved_and_loaded(architecture, tmp_path):
    set_seed(0)
    model, processor = small_model(architecture, labelled())
    dataset = PixelDataset(labelled().train, processor, 1)
    before = weights(model)
    run = image_trainer(tmp_path / "run", model, train_dataset=dataset, max_steps=1)
    run.train()
    after = weights(run.model)
    assert not [name for name, _ in model.named_parameters() if torch.equal(before[name], after[name])]
    assert all(tensor.isfinite().all() for tensor in after.values())
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    again, processor = load_image_classifier(str(tmp_path / "model"))
    batch = torch.stack([item["pixel_values"] for item in PixelDataset(labelled().test, processor, 1)])
    logits = again.eval()(pixel_values=batch).logits
    assert logits.shape == (8, CLASSES)
    torch.testing.assert_close(logits, model.eval()(pixel_values=batch).logits)


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name not in OF_TIMM])
def test_the_trace_is_that_of_per_sample_autograd(architecture):
    set_seed(0)
    model, processor = small_model(architecture, labelled())
    items = [PixelDataset(labelled().train, processor, 1)[row] for row in range(2)]
    data = {"pixel_values": torch.stack([item["pixel_values"] for item in items]), "labels": torch.tensor([2, 0])}
    assert_trace_is_that_of_autograd(settled(model), data, tolerance=1e-3)


@pytest.mark.parametrize("architecture", ["efficientnet", "mobilenet_v2"])
def test_mobile_networks_start_so_that_they_can_be_trained(architecture):
    model, _ = ARCHITECTURES[architecture](["a", "b"], 8, 1)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and all(
        norm.momentum == 0.1 and torch.equal(norm.weight, torch.ones_like(norm.weight)) for norm in norms
    )


@pytest.mark.parametrize(
    "side, widths", [(8, (16, 32, 64, 128)), (16, (64, 128, 256, 512)), (32, (64, 128, 256, 512))]
)
def test_preactresnet18_is_narrower_for_tiny_images_only(side, widths):
    with torch.device("meta"):
        model, _ = ARCHITECTURES["preactresnet18"](["a", "b"], side, 1)
    assert tuple(model.config.hidden_sizes) == widths and model.config.depths == (2, 2, 2, 2)


def test_victims_of_named_images_see_them_in_colour_and_normalised():
    known = NAMED_IMAGES["gtsrb"]
    model, processor = small_model("resnet", labelled(known))  # whose first image is gray
    assert model.config.num_channels == 3
    assert (tuple(processor.image_mean), tuple(processor.image_std)) == (known.mean, known.std)
    flat = torch.full((3, 8, 8), 51 / 255)
    mean, std = (torch.tensor(values)[:, None, None] for values in (known.mean, known.std))
    gray = datasets.Dataset.from_dict(
        {"image": [PIL.Image.new("L", (8, 8), 51)], "label": [0]}, features=labelled().train.features
    )
    torch.testing.assert_close(PixelDataset(gray, processor, 3)[0]["pixel_values"], (flat - mean) / std)


def test_victims_of_other_images_see_them_between_minus_one_and_one():
    _, processor = small_model("resnet", labelled())
    assert (tuple(processor.image_mean), tuple(processor.image_std)) == ((0.5,), (0.5,))


def test_an_unknown_architecture_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="'vgg99': choose one of vit, resnet, preactresnet18, wideresnet, swin"):
        small_model("vgg99", labelled())
    with pytest.raises(ValueError, match="invalid choice: 'vgg99'.*vit.*wideresnet.*inception"):
        Parser((ImageModel,)).parse_args_into_dataclasses(["--architecture", "vgg99"])


@pytest.mark.parametrize("architecture", sorted(OF_TIMM))
def test_models_of_timm_are_refused_without_it(architecture, monkeypatch):
    monkeypatch.setattr("transformers.utils.is_timm_available", lambda: False)
    with pytest.raises(ValueError, match=r"comes from timm, which is not installed: pip install 'hf-fip\[timm\]'"):
        small_model(architecture, labelled())


class TimmStandIn:
    """In place of timm: a model of any name is a linear one of the mean over height and width."""

    def __init__(self):
        self.asked: list[tuple] = []

    def create_model(self, name, pretrained, num_classes, in_chans):
        self.asked.append((name, pretrained, num_classes, in_chans))
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(in_chans, num_classes))


@pytest.mark.parametrize("architecture, name, side", [("vgg", "vgg16_bn", 32), ("inception", "inception_v3", 75)])
def test_models_of_timm_are_asked_for_by_its_names_and_see_large_enough_images(
    architecture, name, side, monkeypatch, tmp_path
):
    wrapper, timm = "transformers.models.timm_wrapper.modeling_timm_wrapper", TimmStandIn()
    monkeypatch.setattr("transformers.utils.is_timm_available", lambda: True)
    monkeypatch.setattr(f"{wrapper}.requires_backends", lambda *args: None)
    monkeypatch.setattr(f"{wrapper}.timm", timm, raising=False)
    model, processor = small_model(architecture, labelled())
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, processor = load_image_classifier(str(tmp_path))
    assert set(timm.asked) == {(name, False, CLASSES, 1)}
    assert again.config.id2label == model.config.id2label
    batch = PixelDataset(labelled().test, processor, again.config.num_channels)[0]["pixel_values"][None]
    assert batch.shape == (1, 1, side, side)
    assert torch.equal(again(pixel_values=batch).logits, model(pixel_values=batch).logits)
