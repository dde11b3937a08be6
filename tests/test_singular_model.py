"""Which layers of a model are adapted, and how many shifts they get."""

import itertools

import pytest
import torch
from singular_cases import TOKENS, Net, adapt, layers, move_shifts, reference, shifts, trainable
from test_fisher_models import bart, make_batch, marian, t5
from torch import nn

OWN = {"conv", "attn", "out_proj", "blocks.0.0", "blocks.1.0", "blocks.2.0"}
SELECTIONS = {
    "all": ({}, OWN),
    "none given": ({"target_modules": None}, OWN),
    "excluded": ({"exclude_modules": ["conv", "0"]}, {"attn", "out_proj"}),
    "excluded by a pattern": ({"exclude_modules": r"blocks\.[01]\.0"}, OWN - {"blocks.0.0", "blocks.1.0"}),
    "names": ({"target_modules": ["conv", "tokens"]}, {"conv", "tokens"}),
    "a pattern": (
        {"target_modules": r".*blocks\.\d\.0|lm_head"},
        OWN & {f"blocks.{i}.0" for i in range(3)} | {"lm_head"},
    ),
    "two blocks": (
        {"target_modules": ["0"], "layers_to_transform": [0, 2], "layers_pattern": "blocks"},
        {"blocks.0.0", "blocks.2.0"},
    ),
    "one block": (
        {"target_modules": ["0"], "layers_to_transform": 1, "layers_pattern": ["blocks"]},
        {"blocks.1.0"},
    ),
}


@pytest.mark.parametrize("case", SELECTIONS)
def test_the_layers_asked_for_are_adapted_and_no_other(case):
    options, expected = SELECTIONS[case]
    received = Net()
    model = adapt(received, **options)
    assert set(layers(model)) == expected
    assert set(trainable(model)) == {f"base_model.model.{name}.singular_delta.default" for name in expected}
    torch.testing.assert_close(model(TOKENS), received(TOKENS), rtol=1e-5, atol=1e-5)
    move_shifts(model)
    torch.testing.assert_close(model(TOKENS), reference(received, model, TOKENS), rtol=1e-4, atol=1e-4)


def test_all_leaves_out_modules_that_stand_in_two_places():
    shared = nn.Linear(4, 4)
    assert set(layers(adapt(nn.Sequential(shared, nn.Linear(4, 4), shared)))) == {"1"}


@pytest.mark.parametrize("make", [t5, bart, marian])
def test_all_leaves_out_tied_embeddings_and_fixed_positions_of_language_models(make):
    model = adapt(make())
    names = set(layers(model))
    assert names and not any(name.endswith(("shared", "embed_tokens", "lm_head")) for name in names)
    assert any("embed_positions" in name for name in names) == (make is bart)  # learned there; Marian's are sines
    model.train()
    model(**make_batch(make.__name__)).loss.backward()
    assert all(delta.grad is not None for delta in shifts(model).values())


def test_a_small_rank_leaves_smaller_layers_all_their_shifts():
    net = nn.ModuleDict(
        {"head": nn.Linear(9, 3), "deep": nn.ModuleDict({"head": nn.Linear(9, 9)}), "x": nn.Linear(9, 4)}
    )
    for rank_pattern, own in (({}, 4), ({"x": 2}, 2)):
        model = adapt(net, rank=6, rank_pattern=rank_pattern)
        assert {name: layer.basis["default"].rank for name, layer in layers(model).items()} == {
            "head": 3,
            "deep.head": 6,
            "x": own,
        }


def test_single_layers_get_the_rank_of_their_pattern():
    net = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9), nn.Linear(9, 9))
    model = adapt(net, rank_pattern={"1": 2, "^2": 5})
    assert [delta.numel() for delta in shifts(model).values()] == [9, 2, 5]


class Block(nn.Module):
    def __init__(self, width: int, out: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        shape = (nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out)) if width != out else ()
        self.shortcut = nn.Sequential(*shape)

    def forward(self, x):
        return (self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())) + self.shortcut(x)).relu()


def resnet18() -> nn.Module:
    """The ResNet-18 of CIFAR-10."""
    widths = [64, 64, 64, 128, 128, 256, 256, 512, 512]
    blocks = [Block(a, b, 1 if a == b else 2) for a, b in itertools.pairwise(widths)]
    stem = (nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


def test_a_resnet18_has_the_papers_number_of_shifts(monkeypatch, capsys):
    def quick(weight, rank):
        *stack, m, n = weight.shape
        return torch.zeros(*stack, m, rank), torch.ones(*stack, rank), torch.zeros(*stack, rank, n)

    monkeypatch.setattr("hf_fip.singular.model.decompose", quick)
    received = resnet18()
    assert sum(p.numel() for p in received.parameters()) == 11_173_962
    model = adapt(received)
    # The smaller side of every matrix, 27 + 4·64 + (4·128 + 64) + (4·256 + 128) + (4·512 + 256) + 10.
    assert sum(p.numel() for p in trainable(model).values()) == 4325
    model.print_trainable_parameters()
    assert "trainable params: 4,325 ||" in capsys.readouterr().out
