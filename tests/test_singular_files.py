"""Saving and loading: small files, the same function on any machine, and PEFT knowing the adapter in every order."""

import subprocess
import sys
from collections import Counter

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from singular_cases import ConvNet, adapt, count_calls, images, layers, move_shifts, other_machine, shifts, train
from test_fisher_models import make_batch, vit
from torch import nn

from hf_fip import SingularValueConfig
from hf_fip.singular import model as model_module
from hf_fip.singular.config import SingularValueType

both = pytest.mark.parametrize("low_cpu_mem_usage", [False, True])


def saved(received: nn.Module, folder, **options) -> PeftModel:
    model = adapt(received, **options)
    move_shifts(model)
    model.save_pretrained(folder)
    return model.eval()


OPTIONS = {
    "plain": {},
    "basis": {"save_basis": True},
    "norms": {"train_norms": True},
    "norms and basis": {"train_norms": True, "save_basis": True},
    "rank and scale": {"rank": 2, "scale": 0.5},
    "units of the weight": {"relative": False},
    "head whole": {"target_modules": ["conv"], "modules_to_save": ["head"]},
}


@both
@pytest.mark.parametrize("case", OPTIONS)
def test_what_was_saved_is_loaded(case, low_cpu_mem_usage, tmp_path):
    received = ConvNet().eval()
    model = adapt(received, **OPTIONS[case])
    train(model)
    model.eval().save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    loaded = PeftModel.from_pretrained(ConvNet().eval(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not any(tensor.is_meta for tensor in loaded.state_dict().values())
    torch.testing.assert_close(loaded(images()), model(images()))
    assert (loaded(images()) - received(images())).abs().max() > 1e-3
    for name, delta in shifts(model).items():
        assert torch.equal(loaded.get_parameter(name), delta) and not loaded.get_parameter(name).requires_grad
    again = PeftModel.from_pretrained(ConvNet(), tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
    train(again)
    assert not torch.equal(again.eval()(images()), loaded(images()))


@both
def test_an_adapter_is_loaded_beside_another(low_cpu_mem_usage, tmp_path):
    expected = saved(ConvNet().eval(), tmp_path)
    model = adapt(ConvNet().eval(), rank=2)
    model.load_adapter(tmp_path, "second", low_cpu_mem_usage=low_cpu_mem_usage)
    model.set_adapter("second")
    torch.testing.assert_close(model(images()), expected(images()))


@both
def test_a_transformers_model_is_loaded(low_cpu_mem_usage, tmp_path):
    expected, batch = saved(vit(), tmp_path), make_batch("vit")
    model = PeftModel.from_pretrained(vit(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    torch.testing.assert_close(model(**batch).logits, expected(**batch).logits)


@pytest.mark.parametrize(("basis", "times"), [(True, 0), (False, 2)])
def test_factors_in_a_file_spare_the_decomposition(basis, times, tmp_path, monkeypatch):
    saved(ConvNet(), tmp_path, save_basis=basis)
    counter = Counter()
    count_calls(monkeypatch, model_module, "decompose", counter)
    PeftModel.from_pretrained(ConvNet(), tmp_path, low_cpu_mem_usage=True)
    assert counter["decompose"] == times


def numbers(folder) -> Counter:
    """How many numbers of each sort the file holds."""
    counts = Counter()
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        sort = next((s for s in ("singular_delta", "sigma", ".u", ".vt") if name.endswith(s)), "other")
        counts[sort] += tensor.numel()
    return counts


def test_a_file_holds_two_numbers_a_singular_value(tmp_path):
    model = saved(vit(), tmp_path)
    values = sum(delta.numel() for delta in shifts(model).values())
    weights = [layer.matrix_of(layer.base_layer) for layer in layers(model).values()]
    assert values == sum(min(w.shape[-2:]) for w in weights)
    assert numbers(tmp_path) == {"singular_delta": values, "sigma": values}
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert size <= 2 * 4 * values + 200 * 2 * len(weights) + 100  # the numbers, and a header with their names


def test_a_file_with_norms_holds_them_and_one_with_the_basis_its_factors(tmp_path):
    saved(ConvNet(), tmp_path, train_norms=True)
    assert numbers(tmp_path) == {"singular_delta": 9, "sigma": 9, "other": 4 * 6 + 1}  # weight, bias, two statistics
    saved(ConvNet(), tmp_path, save_basis=True)
    assert numbers(tmp_path) == {"singular_delta": 9, "sigma": 9, ".u": 6 * 6 + 3 * 3, ".vt": 6 * 18 + 3 * 6}


def test_adapters_that_share_their_factors_are_saved_with_them(tmp_path):
    model = adapt(ConvNet().eval())
    model.add_adapter("other", SingularValueConfig(save_basis=True))
    model.peft_config["default"].save_basis = True
    move_shifts(model)
    model.save_pretrained(tmp_path)
    model.set_adapter("other")
    loaded = PeftModel.from_pretrained(ConvNet().eval(), tmp_path / "other", low_cpu_mem_usage=True)
    torch.testing.assert_close(loaded(images()), model(images()))


class Degenerate(nn.Module):
    """Equal singular values, exactly and nearly, and null directions."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.equal, self.nearly, self.null = (nn.Linear(8, 8) for _ in range(3))
        u, _, vt = torch.linalg.svd(torch.randn(8, 8, dtype=torch.float64))
        with torch.no_grad():
            self.equal.weight.copy_(torch.eye(8).roll(3, 0))
            self.nearly.double().weight.copy_((u * (2 + 1e-10 * torch.arange(8))) @ vt)
            self.null.weight.copy_(torch.randn(8, 2) @ torch.randn(2, 8))

    def forward(self, x):
        return self.null(self.nearly(self.equal(x).double()).float())


@pytest.mark.parametrize("options", [{}, {"rank": 3}])
def test_an_adapter_loaded_where_the_svd_rotates_and_flips_is_the_same_function(options, tmp_path, monkeypatch):
    torch.manual_seed(1)
    x = torch.randn(5, 8)
    received = Degenerate()
    expected = saved(received, tmp_path, **options)(x)
    other_machine(monkeypatch)
    loaded = PeftModel.from_pretrained(received, tmp_path)
    with loaded.disable_adapter():
        assert (expected - loaded(x)).abs().max() > 1e-2
    torch.testing.assert_close(loaded(x), expected, rtol=1e-5, atol=1e-5)


def test_the_config_comes_back_from_its_file(tmp_path):
    config = SingularValueConfig(target_modules=["head"], rank=2, scale=0.5, rank_pattern={"head": 1}, save_basis=True)
    config.save_pretrained(tmp_path)
    for cls in (PeftConfig, SingularValueConfig):
        loaded = cls.from_pretrained(tmp_path)
        assert isinstance(loaded, SingularValueConfig)
        assert {**loaded.to_dict(), "target_modules": None} == {**config.to_dict(), "target_modules": None}
        assert loaded.target_modules == {"head"} and loaded.peft_type == SingularValueType.SINGULAR_VALUE


# ---- Registration with PEFT, in a fresh process ----

LOAD = """
from torch import nn
import torch
torch.manual_seed(0)
model = peft.PeftModel.from_pretrained(nn.Sequential(nn.Linear(4, 4)), {folder!r})
assert type(model.base_model).__name__ == "SingularValueModel", model
assert type(peft.PeftConfig.from_pretrained({folder!r})).__name__ == "SingularValueConfig"
import sys
assert not [finder for finder in sys.meta_path if "hf_fip" in type(finder).__module__]
"""
ORDERS = {
    "before PEFT": "import hf_fip, peft",
    "after PEFT": "import peft, hf_fip",
    "before somebody looked whether PEFT is installed": (
        "import hf_fip, transformers.utils\nassert transformers.utils.is_peft_available()\nimport peft"
    ),
}


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize("order", ORDERS)
def test_peft_loads_the_adapter_when_hf_fip_was_imported(order, tmp_path):
    torch.manual_seed(0)
    saved(nn.Sequential(nn.Linear(4, 4)), tmp_path)
    found = python(ORDERS[order] + LOAD.format(folder=str(tmp_path)))
    assert found.returncode == 0, found.stderr


def test_importing_the_package_imports_neither_torch_nor_peft():
    code = "import sys, hf_fip; print([name for name in ('torch', 'peft', 'transformers') if name in sys.modules])"
    assert python(code).stdout.strip() == "[]"
