"""Plain fine-tuning, FT-SAM and NAD: each does what its paper's formula says."""

from itertools import chain

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from trainer_cases import distance, identical, logged, resnet, trained, vit, weights
from training_cases import MODELS, PLAIN_SGD, WHOLE, parameters_of, task_gradients, trainer_of, whole_batch
from transformers import SwinConfig, SwinForImageClassification

from hf_fip.baselines.nad import attention_map, outputs_of, stages_of

# ---- Plain fine-tuning ----


def test_fine_tuning_is_sgd_whose_decay_takes_every_parameter(tmp_path):
    model = vit()
    start = parameters_of(model)
    slope = task_gradients(vit(), whole_batch())
    trainer_of("ft", tmp_path, model, **WHOLE, **PLAIN_SGD, weight_decay=0.01).train()
    expected = {name: start[name] - 0.1 * (slope[name] + 0.01 * start[name]) for name in start}
    assert distance(parameters_of(model), expected) < 1e-6


# ---- FT-SAM ----


@pytest.mark.parametrize("accumulation", [1, 2])
def test_ft_sam_follows_the_gradient_at_the_perturbed_weights(accumulation, tmp_path):
    model, batch, smoothing = vit(), whole_batch(), {"label_smoothing": 0.1}
    start = parameters_of(model)
    slope = task_gradients(model, batch, **smoothing)
    norm = torch.cat([(start[name] * slope[name]).flatten() for name in start]).norm()
    perturbed = vit()
    perturbed.load_state_dict({name: w + 0.5 * w**2 * slope[name] / norm for name, w in start.items()})
    slope = task_gradients(perturbed, batch, **smoothing)
    expected = {name: w - 0.1 * (slope[name] + 5e-4 * w) for name, w in start.items()}
    options = WHOLE | {"per_device_train_batch_size": 24 // accumulation, "gradient_accumulation_steps": accumulation}
    trainer = trainer_of("ft_sam", tmp_path, model, **options, **PLAIN_SGD, rho=0.5)
    trainer.train()
    assert distance(parameters_of(model), expected) < 1e-6
    loss = F.cross_entropy(perturbed(batch["pixel_values"]).logits, batch["labels"], **smoothing)
    assert logged(trainer, "perturbed_loss") == pytest.approx([loss.item()], rel=1e-5)
    assert logged(trainer, "task_loss")[0] < loss


def test_ft_sam_moves_the_statistics_of_batchnorm_once(tmp_path):
    runs = [trained(trainer_of(name, tmp_path, resnet(), **WHOLE)) for name in ("ft", "ft_sam")]
    moved = [name for name in runs[0] if "running" in name or "num_batches" in name]
    assert moved and all(torch.equal(runs[0][name], runs[1][name]) for name in moved)
    assert not identical(*runs)


def test_ft_sam_stops_at_a_loss_that_is_not_finite(tmp_path):
    with pytest.raises(FloatingPointError, match="lower rho"):
        trainer_of("ft_sam", tmp_path, vit(), rho=1e38).train()


# ---- NAD ----


def test_an_attention_map_is_the_summed_power_of_the_channels_at_norm_one():
    activation = torch.randn(2, 3, 4, 5)
    expected = torch.stack([sum(image[c].abs() ** 3 for c in range(3)).flatten() for image in activation])
    expected = F.normalize(expected)
    torch.testing.assert_close(attention_map(activation, 3.0), expected, atol=1e-5, rtol=0)
    tokens = activation.flatten(2).transpose(1, 2)  # (B, T, C)
    torch.testing.assert_close(attention_map(tokens, 3.0), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("depth", "ends"), [(1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (4, [1, 2, 3]), (12, [3, 7, 11])])
def test_the_stages_end_the_thirds_of_the_depth(depth, ends):
    model = vit(num_hidden_layers=depth)
    stack = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    assert len(stack) == depth
    assert [list(stack).index(stage) for stage in stages_of(model)] == ends


def swin():
    sizes = {"image_size": 8, "patch_size": 2, "num_channels": 1, "embed_dim": 8, "window_size": 2, "num_labels": 3}
    return SwinForImageClassification(SwinConfig(**sizes, depths=[1, 1], num_heads=[1, 2]))


@pytest.mark.parametrize("model", [vit, resnet, swin], ids=lambda model: model.__name__)
def test_the_output_of_a_stage_is_its_activation(model):
    model = model().eval()
    with outputs_of(stages_of(model)) as found:
        states = model(torch.randn(2, 1, 8, 8), output_hidden_states=True).hidden_states
    assert len(found) == 2
    assert all(output.ndim in (3, 4) and len(output) == 2 for output in found)
    if not isinstance(model, SwinForImageClassification):
        assert all(torch.equal(output, state) for output, state in zip(found, states[-2:], strict=True))


def convolution(channels, width):
    return nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())


class Network(nn.Module):
    """Named parts one after the other, a mean over positions, and a head."""

    def __init__(self, **parts):
        super().__init__()
        self.names = [*parts]
        for name, part in parts.items():
            self.add_module(name, part)
        self.head = nn.Sequential(nn.Dropout(0.0), nn.Linear(4, 3))

    def forward(self, pixel_values, labels=None):
        for name in self.names:
            pixel_values = self.get_submodule(name)(pixel_values)
        logits = self.head(pixel_values.mean((2, 3)))
        return {"loss": None if labels is None else F.cross_entropy(logits, labels), "logits": logits}


def side_by_side():
    stages = {f"layer{number}": convolution(4, 4) for number in (1, 2, 3)}
    return Network(stem=nn.Conv2d(1, 4, 3, padding=1), **stages)


def with_pooling():
    pairs = ((*convolution(channels, 4), *convolution(4, 4), nn.MaxPool2d(2)) for channels in (1, 4, 4))
    return Network(features=nn.Sequential(*chain.from_iterable(pairs)))


def without_pooling():
    entries = convolution(1, 4), convolution(4, 4), nn.Dropout(0.0), convolution(4, 4), convolution(4, 4)
    return Network(features=nn.Sequential(*entries))


def wrapped():
    """As models of timm are in transformers."""
    model = nn.Module()
    model.timm_model = side_by_side()
    return model


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (side_by_side, ["layer1", "layer2", "layer3"]),
        (wrapped, ["timm_model.layer1", "timm_model.layer2", "timm_model.layer3"]),
        (with_pooling, ["features.5", "features.12", "features.19"]),
        (without_pooling, ["features.1", "features.3", "features.4"]),
    ],
    ids=["side by side", "wrapped", "with pooling", "without pooling"],
)
def test_the_stages_of_a_network_without_a_list_are_those_of_its_sequences(model, names):
    model = model()
    assert stages_of(model) == [model.get_submodule(name) for name in names]


@pytest.mark.parametrize("model", [side_by_side, with_pooling, without_pooling])
def test_nad_trains_a_network_without_a_list(model, tmp_path):
    trainer = trainer_of("nad", tmp_path, model())
    trainer.train()
    assert all(value > 0 for value in logged(trainer, "attention_distance"))


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_nad_pulls_the_attention_to_that_of_its_fine_tuned_copy(model, tmp_path):
    teacher = trainer_of("ft", tmp_path, model(), **WHOLE | {"max_steps": -1, "num_train_epochs": 2.0})
    teacher.train()
    student, batch = model(), whole_batch()
    trainer = trainer_of("nad", tmp_path, student, **WHOLE, teacher_epochs=2.0)
    start = parameters_of(student)
    trainer.train()
    assert distance(trainer.kept, weights(teacher.model)) < 1e-5

    expected = model().train()
    copy = model().eval()
    copy.load_state_dict(trainer.kept)
    with torch.no_grad(), outputs_of(stages_of(copy)) as wanted:
        copy(batch["pixel_values"])
    with outputs_of(stages_of(expected)) as found:
        task = F.cross_entropy(expected(batch["pixel_values"]).logits, batch["labels"])
    pairs = zip(found, wanted, strict=True)
    low, high = (F.mse_loss(attention_map(s, 2), attention_map(t, 2)) for s, t in pairs)
    total = 1000 * low + 1000 * high  # of two stages: the middle and the high one
    parameters = [p for _, p in expected.named_parameters()]
    slopes = torch.autograd.grad(task + total, parameters)
    wanted = {n: start[n] - 0.1 * (g + 5e-4 * start[n]) for n, g in zip(start, slopes, strict=True)}
    assert total > 1e-4
    assert logged(trainer, "attention_distance") == pytest.approx([total.item()], rel=1e-3)
    assert distance(parameters_of(student), wanted) < 1e-5


def test_the_teacher_of_nad_stays_as_it_was_fine_tuned(tmp_path):
    trainer = trainer_of("nad", tmp_path, resnet())
    trainer.train()
    assert identical(weights(trainer._teacher), trainer.kept)
    assert not any(parameter.requires_grad for parameter in trainer._teacher.parameters())
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())
