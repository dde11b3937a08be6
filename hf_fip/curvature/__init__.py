"""The curvature of the loss: eigenvalues, trace and spectral density of its Hessian, and slices through it."""

from .hessian import Hessian
from .lanczos import SpectralDensity, spectral_density, top_eigenvalues
from .landscape import Landscape, loss_landscape
from .measure import Curvature, measure_curvature
from .trace import hessian_trace

__all__ = [
    "Curvature",
    "Hessian",
    "Landscape",
    "SpectralDensity",
    "hessian_trace",
    "loss_landscape",
    "measure_curvature",
    "spectral_density",
    "top_eigenvalues",
]
