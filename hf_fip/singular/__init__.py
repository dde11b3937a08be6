"""Fast FIP: an adapter that shifts only the singular values of a model's weights, as a tuner of PEFT."""

from .config import SingularValueConfig
from .layer import SingularValueLayer
from .model import SingularValueModel, register

register()

__all__ = ["SingularValueConfig", "SingularValueLayer", "SingularValueModel"]
