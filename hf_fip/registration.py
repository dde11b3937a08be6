"""Makes PEFT know this package's adapter once both are imported, without importing PEFT here, which takes seconds."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys


class _AfterPeft(importlib.abc.MetaPathFinder):
    """Waits for `import peft` and registers the adapter at its end."""

    def find_spec(self, name, path=None, target=None):
        if name != "peft":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            importlib.import_module("hf_fip.singular")

        spec.loader.exec_module = exec_module
        return spec


def register_with_peft() -> None:
    """Register now when PEFT is there already, else when it is imported."""
    if "peft" in sys.modules:
        importlib.import_module("hf_fip.singular")
    else:
        sys.meta_path.insert(0, _AfterPeft())
