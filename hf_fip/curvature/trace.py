"""Tr H by random probes, each a product with a vector of ±1.

    Tr H = E_v[vᵀ H v]                                                     Hutchinson
    Tr H = Tr(Qᵀ H Q) + E_v[uᵀ H u],   u = v − Q Qᵀ v                      with an orthonormal Q

The variance is that of what is left outside Q. The space in which Lanczos found the largest eigenvalues is such a Q,
and Tr(Qᵀ H Q) is known from it: where few eigenvalues dominate, as in trained networks, the same precision then takes
fewer probes. Hutch++ would spend a third of its products on finding a Q.

Source: Hutchinson 1990; Meyer et al., *Hutch++*, SOSA 2021 (the split); Chen and Hallman, *Krylov-aware stochastic
trace estimation*, SIMAX 2023 (Q from Lanczos).
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import torch

from .hessian import Hessian
from .lanczos import Krylov, remove_component


@dataclass(frozen=True)
class Trace:
    """Tr H.

    Attributes:
        value: the mean over the probes, in units of the loss per parameter squared.
        error: its standard error over the probes; NaN for one probe.
        samples: what each probe gave.
    """

    value: float
    error: float
    samples: list[float]


def hessian_trace(hessian: Hessian, *, probes: int = 20, krylov: Krylov | None = None, seed: int = 0) -> Trace:
    """Tr H, with its standard error.

    Args:
        probes: random vectors, each one product.
        krylov: what Lanczos steps found, from a start vector of another seed; without it, plain Hutchinson.
        seed: of the probes.

    Raises:
        ValueError: when `probes` is below 1.
    """
    if probes < 1:
        raise ValueError(f"probes={probes} has to be at least 1.")
    generator = torch.Generator().manual_seed(seed)
    inside = 0.0 if krylov is None else float(krylov.ritz_values.sum())
    samples = []
    for _ in range(probes):
        probe = hessian.random_signs(generator)
        for vector in [] if krylov is None else krylov.basis:
            remove_component(probe, vector)
        samples.append(inside + (probe * hessian.product(probe)).sum().item())
    error = statistics.stdev(samples) / math.sqrt(probes) if probes > 1 else math.nan
    return Trace(statistics.fmean(samples), error, samples)
