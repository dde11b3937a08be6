"""hf_fip: takes backdoors out of neural networks, as an extension of the Hugging Face Trainer."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .registration import register_with_peft

__version__ = "0.1.0"

# Loaded when first used, so that `import hf_fip` stays fast.
_WHERE = {
    "FIPConfig": "config",
    "FIPSeq2SeqConfig": "config",
    "FIPSeq2SeqTrainer": "trainer",
    "FIPTrainer": "trainer",
    "SingularValueConfig": "singular",
    "SingularValueModel": "singular",
}
__all__ = [
    "FIPConfig",
    "FIPSeq2SeqConfig",
    "FIPSeq2SeqTrainer",
    "FIPTrainer",
    "SingularValueConfig",
    "SingularValueModel",
    "__version__",
]

if TYPE_CHECKING:
    from .config import FIPConfig, FIPSeq2SeqConfig
    from .singular import SingularValueConfig, SingularValueModel
    from .trainer import FIPSeq2SeqTrainer, FIPTrainer


def __getattr__(name: str):
    if name in _WHERE:
        return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


register_with_peft()  # `PeftModel.from_pretrained` then loads singular-value adapters too
