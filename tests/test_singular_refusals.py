"""What cannot be adapted, merged or loaded is refused, with the layer's name and the way out."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from singular_cases import ConvNet, Holder, adapt, layers, move_shifts
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from hf_fip import SingularValueConfig


class Int8Linear(nn.Linear):
    """A quantised layer, as bitsandbytes and others make them."""

    def __init__(self):
        super().__init__(4, 4)
        self.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)


class PackedLinear(nn.Linear):
    """One whose packed weight says that it is floating-point."""

    def __init__(self):
        super().__init__(4, 4)
        self.weight.quant_state = object()


def holding(value: float) -> nn.Linear:
    layer = nn.Linear(4, 4)
    layer.weight.data[1, 2] = value
    return layer


LAYERS = {
    "ConvTranspose2d": (
        lambda: nn.ConvTranspose2d(2, 2, 3),
        "layer .* a ConvTranspose2d is not supported .*exclude|modules_to_save",
    ),
    "GRU": (lambda: nn.GRU(3, 3), "layer .* a GRU is not supported .*modules_to_save"),
    "LayerNorm": (lambda: nn.LayerNorm(3), "layer .* a LayerNorm is not supported .*train_norms=True"),
    "Dropout": (lambda: nn.Dropout(), "layer .* a Dropout is not supported"),
    "int8": (Int8Linear, "layer .*quantised: load the model in float32"),
    "packed": (PackedLinear, "layer .*quantised: load the model in float32"),
    "meta": (lambda: nn.Linear(4, 4, device="meta"), "layer .*meta device: load the model's weights first"),
    "weight_norm": (lambda: weight_norm(nn.Linear(4, 4)), "layer .*computed from other parameters.*exclude it"),
    "max_norm": (lambda: nn.Embedding(4, 4, max_norm=1.0), "layer .*max_norm.*exclude it"),
    "kdim": (lambda: nn.MultiheadAttention(4, 2, kdim=3), "layer .*another width.*exclude it"),
    "not a number": (lambda: holding(float("nan")), "layer cannot be decomposed: .*NaN"),
    "infinite": (lambda: holding(float("inf")), "layer cannot be decomposed: .*infinity"),
}


@pytest.mark.parametrize("case", LAYERS)
def test_a_layer_that_cannot_be_adapted_is_named_with_the_reason(case):
    make, message = LAYERS[case]
    with pytest.raises(ValueError, match=message):
        get_peft_model(Holder(make()), SingularValueConfig(target_modules=r".*layer"))


@pytest.mark.parametrize("case", ["int8", "packed", "meta", "kdim", "max_norm", "not a number"])
def test_all_does_not_pass_over_a_layer_that_it_would_have_to_adapt(case):
    make, message = LAYERS[case]
    with pytest.raises(ValueError, match=message):
        get_peft_model(Holder(make()), SingularValueConfig())


def test_a_part_of_an_attention_layer_is_refused_with_the_layer_to_target():
    with pytest.raises(ValueError, match=r"layer\.out_proj .*nn\.MultiheadAttention it belongs to: target that one"):
        adapt(Holder(nn.MultiheadAttention(4, 2)), target_modules=["out_proj"])


OPTIONS = {
    "wrong name": ({"target_modules": ["dense"]}, "dense"),
    "wrong pattern": ({"target_modules": r".*\.dense"}, "dense"),
    "rank 0": ({"rank": 0}, "rank=0: a rank is a whole number of at least 1"),
    "rank 1.5": ({"rank": 1.5}, "rank=1.5: a rank is a whole number"),
    "rank of one layer": ({"rank_pattern": {"head": 0}}, "head=0: a rank is a whole number"),
    "large rank": (
        {"rank": 4, "target_modules": ["head"]},
        r"head has 3 singular values.*rank=4.*rank_pattern=\{'head': 3\}",
    ),
    "large rank of one layer": ({"rank_pattern": {"head": 9}}, "head has 3 singular values, and rank=9"),
    "larger than all": ({"rank": 7}, "rank=7 is larger than that of every layer: lower it"),
    "scale 0": ({"scale": 0.0}, "scale=0.0 has to be positive"),
    "scale infinite": ({"scale": float("inf")}, "scale=inf has to be positive, and finite"),
    "blocks of all": ({"layers_to_transform": [0]}, "layers_to_transform.*list of names"),
    "blocks without indexes": (
        {"target_modules": ["head"], "layers_pattern": "x"},
        "layers_pattern.*layers_to_transform",
    ),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_a_config_that_does_not_fit_is_refused_with_the_way_out(case):
    options, message = OPTIONS[case]
    with pytest.raises(ValueError, match=message):
        adapt(ConvNet(), **options)


def test_a_model_without_a_layer_to_adapt_is_refused():
    with pytest.raises(ValueError, match="target_modules"):
        adapt(nn.Sequential(nn.ReLU()))


# ---- Adapters of other models ----


class Named(ConvNet):
    """The same, with another name for the head."""

    def __init__(self):
        super().__init__()
        self.classifier = self.head
        del self.head


def wider() -> nn.Module:
    model = ConvNet()
    model.head = nn.Linear(6, 5)
    return model


def permuted() -> nn.Module:
    """Other weights of the same singular values."""
    model = ConvNet()
    for layer in (model.conv, model.head):
        layer.weight.data = layer.weight.data.flip(0)
    return model


OTHERS = {
    "other names": (Named, "Target modules|no place in this one.*head"),
    "other shapes": (wider, r"head\..* has the shape \(3,\), and this model's \(5,\)"),
    "other weights": (lambda: ConvNet(seed=9), "made for other weights: the singular values of .*(conv|head)"),
}
WAY_OUT = "Load it on the model it was made for"


@pytest.fixture(params=[False, True], ids=["", "with basis"])
def folder(request, tmp_path):
    model = adapt(ConvNet(), save_basis=request.param)
    move_shifts(model)
    model.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("case", OTHERS)
def test_the_adapter_of_another_model_is_refused(case, low_cpu_mem_usage, folder):
    make, message = OTHERS[case]
    with pytest.raises(ValueError, match=message) as raised:
        PeftModel.from_pretrained(make(), folder, low_cpu_mem_usage=low_cpu_mem_usage)
    assert WAY_OUT in str(raised.value)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_the_factors_of_other_weights_with_the_same_singular_values_are_refused(low_cpu_mem_usage, tmp_path):
    adapt(ConvNet(), save_basis=True).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="made for other weights"):
        PeftModel.from_pretrained(permuted(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)


def deep(blocks: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(blocks)))


@pytest.mark.parametrize("targets", ["all", r"\d"])
def test_the_adapter_of_a_deeper_model_is_refused(targets, tmp_path):
    adapt(deep(3), target_modules=targets).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"no place in this one, among them .*2.*{WAY_OUT}"):
        PeftModel.from_pretrained(deep(2), tmp_path)


def test_layers_that_the_file_of_a_shallower_model_has_no_shifts_for_are_named(tmp_path):
    adapt(deep(2), target_modules=r"\d").save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"missing adapter keys.*2\.singular_delta"):
        PeftModel.from_pretrained(deep(3), tmp_path)


def test_the_same_weights_in_half_precision_are_not_other_weights(folder):
    model = PeftModel.from_pretrained(ConvNet().to(torch.bfloat16), folder)
    expected = adapt(ConvNet())
    move_shifts(expected)
    for name, layer in layers(model).items():
        assert torch.equal(layer.singular_delta["default"], layers(expected)[name].singular_delta["default"])


def test_a_file_with_a_number_that_is_none_is_refused(tmp_path):
    model = adapt(ConvNet())
    layers(model)["head"].basis["default"].sigma.data[0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="made for other weights: the singular values of .*head"):
        PeftModel.from_pretrained(ConvNet(), tmp_path)


def test_a_refused_adapter_leaves_the_model_as_it_was():
    received = ConvNet()
    before = copy.deepcopy(received.state_dict())
    with pytest.raises(ValueError):
        adapt(received, rank=7)
    with pytest.raises(ValueError):
        get_peft_model(received, SingularValueConfig(rank=3, rank_pattern={"conv": 99}))
    assert received.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[name]) for name, t in received.state_dict().items())
