"""Loads PEFT's own tests as `make test` has unpacked them, and gives them our tables.

Which table a test gets is told by the names of its parameters. Some tests of what all methods have in common take no
parameters and are written with `LoraConfig`; those get ours under that name. Every other test of the classes that run,
and every case of ours that a test has no use for, is named in `peft_left_out.LEFT_OUT` with the reason.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import types
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from peft_cases import CONFIGS, MODELS, MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES, TEST_CASES
from peft_left_out import LEFT_OUT

from hf_fip.singular import SingularValueConfig

FOLDER = Path(sys.prefix) / f"peft-{version('peft')}" / "tests"  # where the Makefile unpacks them
CLASSES = {
    "test_custom_models": (
        "TestPeftCustomModel",
        "TestMultipleActiveAdapters",
        "TestRequiresGrad",
        "TestPeftFsdpStateDict",
    ),
    "test_config": ("TestPeftConfig",),
}
WRITTEN_WITH_LORA = {
    "TestPeftCustomModel": (
        "test_delete_adapter_multiple_adapters_with_modules_to_save",
        "test_delete_adapter_with_multiple_adapters_works",
        "test_existing_model_card",
        "test_load_does_not_overwrite_similarly_named_sibling",
        "test_non_existing_model_card",
        "test_save_embedding_layers_excludes_similarly_named_sibling",
        "test_unload_adapter_multihead_attention",
        "test_weight_bias_attributes",
    ),
}
_PACKAGE = "upstream_peft_tests"
_OURS = {"SingularValueConfig": (SingularValueConfig,)}
_TABLES = {
    "test_name, model_id, config_cls, config_kwargs": {row[0]: row for row in TEST_CASES},
    "test_name, tuner_method, config_cls, config_kwargs_1, config_kwargs_2": {
        row[0]: row for row in MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES
    },
    "config_cls": _OURS,
    "config_class": _OURS,
    "config_class, mandatory_kwargs": {name: (SingularValueConfig, kwargs) for name, kwargs in CONFIGS.items()},
    "is_trainable": {"False": (False,), "True": (True,)},  # as theirs, with names
    "peft_config": {
        "a list": (SingularValueConfig(target_modules=["lin0", "embed_tokens", "emb"], init_weights=False),),
        "a regular expression": (SingularValueConfig(target_modules="embed_tokens|emb", init_weights=False),),
    },
    "config0": {"SingularValueConfig": (SingularValueConfig(target_modules=["lin0"], init_weights=False),)},
}


def load() -> dict[str, type]:
    """PEFT's test classes, to be collected, by name."""
    pytest.register_assert_rewrite(_PACKAGE)
    package = types.ModuleType(_PACKAGE)
    package.__path__ = [str(FOLDER)]
    sys.modules[_PACKAGE] = package
    classes = {}
    for file, names in CLASSES.items():
        module = importlib.import_module(f"{_PACKAGE}.{file}")
        classes.update({name: getattr(module, name) for name in names})
        for model in ("DeepMLP", "ModelEmbWithSibling"):
            if hasattr(module, model):
                setattr(module, model, _seeded(getattr(module, model)))
    _add_models(classes["TestPeftCustomModel"].transformers_class)
    for name, test_class in classes.items():
        for test in tests_of(test_class):
            setattr(test_class, test, _adapted(name, getattr(test_class, test)))
    return classes


def tests_of(test_class: type) -> list[str]:
    return [name for name, _ in inspect.getmembers(test_class, inspect.isfunction) if name.startswith("test")]


def _seeded(model_class: type) -> type:
    """The model with the same weights each time: an adapter file of ours is refused by a model that has others."""

    class Seeded(model_class):
        def __init__(self, *args, **kwargs):
            torch.manual_seed(0)
            super().__init__(*args, **kwargs)

    return Seeded


def _add_models(factory: type) -> None:
    theirs = factory.from_pretrained

    def from_pretrained(model_id, dtype=None):
        if model_id not in MODELS:
            return theirs(model_id, dtype=dtype)
        torch.manual_seed(0)
        return MODELS[model_id]().to(dtype).eval()  # as transformers returns them

    factory.from_pretrained = staticmethod(from_pretrained)


def _adapted(class_name: str, test: types.FunctionType) -> types.FunctionType:
    """The test with our table, or with our configuration as its `LoraConfig`, or marked as left out."""
    name = f"{class_name}::{test.__name__}"
    theirs = getattr(test, "pytestmark", [])
    if name in LEFT_OUT:
        test.pytestmark = [pytest.mark.skip(reason=LEFT_OUT[name]).mark]
        return test
    if test.__name__ in WRITTEN_WITH_LORA.get(class_name, ()):
        return types.FunctionType(test.__code__, {**test.__globals__, "LoraConfig": _in_place_of_lora}, test.__name__)
    ours = [_with_our_table(mark, name) for mark in theirs]
    if ours == theirs:
        raise ValueError(f"{name} has no parameter that takes our configuration: name it in LEFT_OUT, with a reason.")
    test.pytestmark = ours
    return test


def _with_our_table(mark: pytest.Mark, name: str) -> pytest.Mark:
    table = _TABLES.get(mark.args[0]) if mark.name == "parametrize" else None
    if table is None:
        return mark
    rows = []
    for case, values in table.items():
        reason = LEFT_OUT.get(f"{name}[{case}]")
        rows.append(pytest.param(*values, id=case, marks=[pytest.mark.skip(reason=reason)] if reason else []))
    return pytest.mark.parametrize(mark.args[0], rows).mark


def _in_place_of_lora(init_lora_weights=True, **kwargs) -> SingularValueConfig:
    return SingularValueConfig(init_weights=init_lora_weights, **kwargs)
