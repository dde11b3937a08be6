"""Norms that stand still or are trained, and everything taken back: disabled, unmerged, unloaded, deleted, copied."""

import copy
import io
import pickle

import pytest
import torch
from peft import get_peft_model
from singular_cases import (
    TOKENS,
    ConvNet,
    Net,
    adapt,
    images,
    layers,
    move_shifts,
    only_layer,
    reference,
    shifts,
    train,
    trainable,
)
from test_fisher_models import make_batch, resnet, vit
from torch import nn

from hf_fip import SingularValueConfig

# ---- BatchNorm and other norms ----


def norm_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items() if "norm" in name}


@pytest.mark.parametrize("disabled", [False, True])
def test_frozen_batch_norms_keep_their_statistics_in_train_mode(disabled):
    received = ConvNet()
    model = adapt(received)
    before = norm_state(model)
    train(model)
    if disabled:
        with model.disable_adapter():
            model.train()
            model(images())
    after = norm_state(model)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert model.training and not model.base_model.model.norm.training
    for mode in (model.train(), model.eval()):  # train mode computes with the received statistics
        torch.testing.assert_close(mode(images()), reference(received.eval(), model, images()))


def test_a_tracking_instance_norm_keeps_its_statistics_too():
    model = adapt(nn.Sequential(nn.Conv2d(2, 3, 3), nn.InstanceNorm2d(3, track_running_stats=True)))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    train(model, steps=1, lr=0.0)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_trained_norms_move_with_their_statistics_and_come_back_when_disabled():
    received = ConvNet().eval()
    model = adapt(received, train_norms=True)
    names = {name.removeprefix("base_model.model.") for name in trainable(model)}
    assert names == {
        "conv.singular_delta.default",
        "head.singular_delta.default",
        "norm.modules_to_save.default.weight",
        "norm.modules_to_save.default.bias",
    }
    before = norm_state(model)
    train(model)
    after = norm_state(model)
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    parts = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert moved == {f"base_model.model.norm.modules_to_save.default.{part}" for part in parts}
    with model.disable_adapter():
        for mode in (True, False):
            model.train(mode)
            assert torch.equal(model(images()), received(images()))


@pytest.mark.parametrize("make", [vit, resnet])
def test_train_norms_finds_the_norms_of_transformers(make):
    received = make()
    model = adapt(received, train_norms=True)
    norms = (nn.LayerNorm, nn.BatchNorm2d)
    count = sum(isinstance(module, norms) for module in received.modules())
    assert count and len([name for name in trainable(model) if "modules_to_save" in name]) == 2 * count


# ---- Taking it back ----


@pytest.mark.parametrize("options", [{}, {"rank": 2}])
def test_disabled_and_unloaded_the_received_model_is_back_exactly(options):
    received = ConvNet().eval()
    model = adapt(received, **options)
    train(model)
    model.eval()
    expected = received(images())
    assert not torch.equal(model(images()), expected)
    with model.disable_adapter():
        assert torch.equal(model(images()), expected)
    back = model.unload()
    assert torch.equal(back.eval()(images()), expected)
    assert back.state_dict().keys() == received.state_dict().keys()
    assert all(torch.equal(t, received.state_dict()[name]) for name, t in back.state_dict().items())


@pytest.mark.parametrize("make", [ConvNet, Net])
def test_merging_gives_the_same_function_and_unmerging_the_weights_bit_for_bit(make):
    received = make().eval()
    model = adapt(received)
    model.add_adapter("other", SingularValueConfig(rank=2))
    model.base_model.set_adapter(["default", "other"])
    move_shifts(model, 0.2)
    x = images() if make is ConvNet else TOKENS
    expected = model.eval()(x)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    merged = [name for name, t in model.state_dict().items() if not torch.equal(t, before[name])]
    assert merged and all("base_layer" in name for name in merged)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), received(x), rtol=0, atol=0)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    model.merge_adapter()
    model.unmerge_adapter()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(model(x), expected)
    torch.testing.assert_close(model.merge_and_unload()(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
def test_a_safe_merge_of_broken_shifts_changes_nothing(method):
    model = adapt(ConvNet().eval())
    move_shifts(model)
    layers(model)["head"].singular_delta["default"].data[0] = float("nan")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match="NaNs detected in the merged weights of head: nothing was merged"):
        getattr(model, method)(safe_merge=True)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(
        torch.equal(t, before[name]) or name.endswith("head.singular_delta.default") for name, t in after.items()
    )
    assert not any(layer.merged for layer in layers(model).values())


def test_tied_weights_are_adapted_when_asked_and_not_merged():
    received = Net()
    model = adapt(received, target_modules=["lm_head"])
    move_shifts(model)
    torch.testing.assert_close(model(TOKENS), reference(received, model, TOKENS), rtol=1e-4, atol=1e-4)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"lm_head cannot be merged: .*exclude_modules.*untied"):
            merge()
    assert only_layer(model).base_layer.weight is model.base_model.model.tokens.weight


# ---- Several adapters, copies ----


def test_adapters_are_switched_added_up_and_deleted():
    received = ConvNet().eval()
    model = adapt(received)
    model.add_adapter("other", SingularValueConfig(rank=2, scale=2.0))
    move_shifts(model)
    for names in (["default"], ["other"], ["default", "other"], ["other", "default"]):
        model.base_model.set_adapter(names)
        torch.testing.assert_close(model(images()), reference(received, model, images(), names=tuple(names)))
    model.set_adapter("other")
    model.delete_adapter("default")
    assert all(list(layer.basis) == list(layer.singular_delta) == ["other"] for layer in layers(model).values())
    torch.testing.assert_close(model(images()), reference(received, model, images(), names=("other",)))


def test_an_adapter_for_each_row_is_refused():
    model = adapt(ConvNet())
    model.add_adapter("other", SingularValueConfig())
    with pytest.raises(ValueError, match="adapter for each row, is not supported.*set_adapter"):
        model(images(), adapter_names=["default", "other"])
    assert torch.isfinite(model(images(), adapter_names=None)).all()


def test_adapters_of_one_rank_share_their_factors():
    model = adapt(ConvNet())
    model.add_adapter("other", SingularValueConfig())
    assert all(layer.basis["default"] is layer.basis["other"] for layer in layers(model).values())
    model.delete_adapter("other")
    model(images())


def test_copies_by_deepcopy_and_pickle_compute_and_train_on_their_own():
    model = get_peft_model(ConvNet().eval(), SingularValueConfig(train_norms=True))
    move_shifts(model)
    expected = model(images()).detach()
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stream, weights_only=False)):
        assert torch.equal(other(images()), expected)
        train(other)
        assert not torch.equal(other.eval()(images()), expected)
        assert torch.equal(model(images()), expected)


def test_transformers_models_give_a_loss_and_gradients():
    model = adapt(vit())
    model(**make_batch("vit")).loss.backward()
    assert all(delta.grad.abs().sum() > 0 for delta in shifts(model).values())
