"""All that is known of the curvature of a model on some batches, by one call."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from ..fisher.likelihood import Likelihood
from ..fisher.scores import Batch
from .hessian import Hessian
from .lanczos import SpectralDensity, spectral_density, top_eigenvalues
from .trace import hessian_trace

_TRACE_SEED = 1_000_003  # the probes must not depend on the start vector of the eigenvalues


@dataclass(frozen=True)
class Curvature:
    """The curvature of the mean loss on some samples.

    Attributes:
        loss: the mean loss, in nats.
        eigenvalues: the largest of H, λ_max first, in units of the loss per parameter squared.
        eigenvalue_errors: how far each may be from an eigenvalue.
        converged: whether those are within the tolerance.
        trace, trace_error: Tr H and its standard error over random probes.
        density: the spectral density; None where it was not asked for.
        samples, parameters: how many of each H is of.
        product_form: `double_backward` or `finite_difference`.
        products: how many Hessian-vector products it took.
        batch_norm: `eval`: running statistics, which do not depend on the batch.
    """

    loss: float
    eigenvalues: list[float]
    eigenvalue_errors: list[float]
    converged: bool
    trace: float
    trace_error: float
    density: SpectralDensity | None
    samples: int
    parameters: int
    product_form: str
    products: int
    batch_norm: str = "eval"

    @property
    def lambda_max(self) -> float:
        """λ_max, the largest eigenvalue: the sharpness of the minimum."""
        return self.eigenvalues[0]

    def to_dict(self) -> dict:
        """As JSON values; what is not a number is None."""
        row = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        row["density"] = self.density and self.density.to_dict()
        row["trace_error"] = None if math.isnan(self.trace_error) else self.trace_error
        return {"lambda_max": self.lambda_max, **row}


def measure_curvature(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    likelihood: Likelihood | None = None,
    top: int = 1,
    tolerance: float = 1e-3,
    max_steps: int = 100,
    probes: int = 20,
    density_runs: int = 0,
    density_steps: int = 40,
    seed: int = 0,
    product: str = "auto",
    reduce: Callable[[Tensor], Any] | None = None,
    progress: bool = False,
) -> Curvature:
    """λ_max, the next eigenvalues, Tr H and, if wanted, the spectral density of the loss Hessian.

    The model is left as it was. The same seed gives the same figures, on any number of processes but for rounding.

    Args:
        model, batches, likelihood, product, reduce: see [`Hessian`].
        top: how many of the largest eigenvalues.
        tolerance, max_steps: of the eigenvalues, see `top_eigenvalues`.
        probes: of Tr H; twice as many halve its variance.
        density_runs, density_steps: of the spectral density, see `spectral_density`; no density without runs.
        seed: of all random vectors.
        progress: show a bar that counts products.

    Raises:
        ValueError: as [`Hessian`], for numbers that are out of range, and for a loss that is not finite.
    """
    hessian = Hessian(model, batches, likelihood=likelihood, product=product, reduce=reduce)
    loss = hessian.value()
    if not math.isfinite(loss):
        raise ValueError("The model's loss on these data is not finite: its weights are broken.")
    with tqdm(desc="Hessian-vector products", disable=not progress, leave=False) as bar:
        hessian.after_product = bar.update
        largest = top_eigenvalues(hessian, top, tolerance=tolerance, max_steps=max_steps, seed=seed)
        trace = hessian_trace(hessian, probes=probes, krylov=largest.krylov, seed=seed + _TRACE_SEED)
        density = None
        if density_runs:
            density = spectral_density(hessian, runs=density_runs, steps=density_steps, seed=seed)
    return Curvature(
        loss=loss,
        eigenvalues=largest.values,
        eigenvalue_errors=largest.errors,
        converged=largest.converged,
        trace=trace.value,
        trace_error=trace.error,
        density=density,
        samples=hessian.samples,
        parameters=hessian.size,
        product_form=hessian.product_form,
        products=hessian.products,
    )
