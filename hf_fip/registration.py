"""Makes PEFT know this package's adapter once both are imported, without importing PEFT here, which takes seconds."""

from __future__ import annotations

import importlib
import importlib.abc
import sys


class _AfterPeft(importlib.abc.MetaPathFinder):
    """Waits for `import peft` and registers the adapter at its end."""

    def find_spec(self, name, path=None, target=None):
        if name != "peft":
            return None
        # Being asked does not mean that PEFT is imported: others look whether it is installed (transformers does).
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            importlib.import_module("hf_fip.singular")

        spec.loader.exec_module = exec_module
        return spec


def register_with_peft() -> None:
    """Register now when PEFT is there already, else when it is imported."""
    if "peft" in sys.modules:
        importlib.import_module("hf_fip.singular")
    else:
        sys.meta_path.insert(0, _AfterPeft())
