"""The largest eigenvalues of the Hessian and its spectral density, by Lanczos' method.

m steps from a start vector give an orthonormal basis Q of its Krylov space and the tridiagonal T = Qᵀ H Q. The
eigenvalues θ of T (Ritz values) approach the outer eigenvalues of H first; the residual of each is
‖H x − θ x‖ = β_m |s_m| with s its eigenvector in T, so convergence is known without another product. With a random
start vector v of ±1, the squared first entries of the eigenvectors are the weights of a Gauss quadrature of the
spectral density φ,

    vᵀ f(H) v / n = Σ_j w_j f(θ_j),   E_v[vᵀ f(H) v] / n = (1/n) Tr f(H) = ∫ f(t) φ(t) dt.

Every vector is made orthogonal to all earlier ones, which keeps copies of converged eigenvalues away.

Source: Golub and Welsch 1969; Parlett, *The Symmetric Eigenvalue Problem*, 1980 (error bounds); Ubaru, Chen and Saad,
*Fast Estimation of tr(f(A)) via Stochastic Lanczos Quadrature*, SIMAX 2017; Ghorbani et al., ICML 2019 (on networks).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .hessian import Hessian


@dataclass(frozen=True)
class Krylov:
    """What so many Lanczos steps found.

    Attributes:
        basis: m orthonormal vectors of shape `(size,)`.
        ritz_values: eigenvalues θ of T, the largest first, in float64, `(m,)`.
        first, last: first and last entries of T's eigenvectors, `(m,)` each, in the same order.
        beta: norm of what is left over after the last step; 0 when the basis spans an invariant space.
    """

    basis: list[Tensor]
    ritz_values: np.ndarray
    first: np.ndarray
    last: np.ndarray
    beta: float

    @property
    def errors(self) -> np.ndarray:
        """How far each Ritz value is from an eigenvalue, as far as T tells: min(r, r²/gap).

        r is the residual and a bound by itself; the gap is taken to the nearest other Ritz value, where there is one.
        """
        residual = self.beta * np.abs(self.last)
        if len(residual) == 1:
            return residual
        distance = np.abs(np.diff(self.ritz_values))
        gap = np.minimum(np.append(distance, np.inf), np.insert(distance, 0, np.inf))
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.fmin(residual, residual**2 / gap)


def lanczos(hessian: Hessian, start: Tensor, steps: int, done: Callable[[Krylov], bool] | None = None) -> Krylov:
    """At most `steps` Lanczos steps from `start`, until `done` or the Krylov space is exhausted.

    Takes one product a step and holds one vector of the size of the parameters for each.
    """
    vector = start / _norm(start)
    basis, alphas, betas = [], [], []
    while True:
        basis.append(vector)
        rest = hessian.product(vector)
        alphas.append((vector * rest).sum().item())
        rest -= alphas[-1] * vector
        before, beta = math.inf, _norm(rest)
        while beta < before / 2:  # much was taken out, so that rounding has left some of it
            before = beta
            for earlier in reversed(basis):
                remove_component(rest, earlier)
            beta = _norm(rest)
        scale = max(map(abs, alphas + betas))
        if beta <= 10 * torch.finfo(rest.dtype).eps * scale or len(basis) == hessian.size:
            beta = 0.0
        found = _solved(basis, alphas, betas, beta)
        if len(basis) >= steps or beta == 0.0 or (done is not None and done(found)):
            return found
        betas.append(beta)
        vector = rest / beta


def _solved(basis: list[Tensor], alphas: list[float], betas: list[float], beta: float) -> Krylov:
    values, vectors = np.linalg.eigh(np.diag(alphas) + np.diag(betas, 1) + np.diag(betas, -1))
    return Krylov(list(basis), values[::-1], vectors[0, ::-1], vectors[-1, ::-1], beta)


def remove_component(vector: Tensor, direction: Tensor) -> None:
    """Make a vector orthogonal to a unit vector, in place: no copy of the size of the parameters."""
    vector.sub_(direction, alpha=torch.dot(direction, vector).item())


def _norm(vector: Tensor) -> float:
    """By `sum`, which adds pairwise: `vector_norm` on CPU loses digits at millions of numbers."""
    return vector.square().sum().sqrt().item()


@dataclass(frozen=True)
class Eigenvalues:
    """The k algebraically largest eigenvalues, the largest (λ_max) first.

    Attributes:
        values: in units of the loss per parameter squared.
        errors: their distance to an eigenvalue of H, see `Krylov.errors`; without rounding and sampling of the data.
        converged: whether each error was below the tolerance when the steps ended.
        krylov: the space they were found in.
    """

    values: list[float]
    errors: list[float]
    converged: bool
    krylov: Krylov


def top_eigenvalues(
    hessian: Hessian, k: int = 1, *, tolerance: float = 1e-3, max_steps: int = 100, seed: int = 0
) -> Eigenvalues:
    """λ_max and the next k − 1 eigenvalues. One that occurs several times is found once.

    Args:
        tolerance: the error, relative to the eigenvalue, at which the steps end.
        max_steps: the most products; memory is one vector of the size of the parameters for each.
        seed: of the start vector.

    Raises:
        ValueError: when k is not from 1 to `max_steps`.
    """
    if not 1 <= k <= max_steps:
        raise ValueError(f"k={k} eigenvalues need from {max(k, 1)} steps on, and k ≥ 1; max_steps={max_steps}.")

    def good(krylov: Krylov) -> bool:
        errors, values = krylov.errors[:k], krylov.ritz_values[:k]
        return len(values) == k and bool((errors <= tolerance * np.abs(values)).all())

    start = hessian.random_signs(torch.Generator().manual_seed(seed))
    found = lanczos(hessian, start, max_steps, good)
    exhausted = found.beta == 0.0
    values, errors = found.ritz_values[:k].tolist(), found.errors[:k].tolist()
    return Eigenvalues(values, errors, exhausted or good(found), found)


@dataclass(frozen=True)
class SpectralDensity:
    """Nodes and weights of the quadratures of several random start vectors; the weights of each sum to 1.

    Attributes:
        nodes, weights: one array a run.
        size: n, the number of eigenvalues.
    """

    nodes: list[np.ndarray]
    weights: list[np.ndarray]
    size: int

    def moment(self, power: int) -> tuple[float, float]:
        """(1/n) Tr H^power: its mean over the runs and the standard error (NaN for one run)."""
        runs = [float((w * t**power).sum()) for t, w in zip(self.nodes, self.weights, strict=True)]
        error = np.std(runs, ddof=1) / math.sqrt(len(runs)) if len(runs) > 1 else math.nan
        return float(np.mean(runs)), float(error)

    def at(self, points: np.ndarray, width: float) -> np.ndarray:
        """φ at these points, smoothed by a Gaussian of this standard deviation; its integral is 1."""
        total = np.zeros(len(points))
        for nodes, weights in zip(self.nodes, self.weights, strict=True):
            bells = np.exp(-0.5 * ((points[:, None] - nodes) / width) ** 2)
            total += (bells * weights).sum(1)
        return total / (len(self.nodes) * width * math.sqrt(2 * math.pi))

    def to_dict(self) -> dict:
        """As JSON values."""
        nodes, weights = ([part.tolist() for part in parts] for parts in (self.nodes, self.weights))
        return {"nodes": nodes, "weights": weights, "size": self.size}


def spectral_density(hessian: Hessian, *, runs: int = 4, steps: int = 40, seed: int = 0) -> SpectralDensity:
    """The density of the eigenvalues, by stochastic Lanczos quadrature: `runs` · `steps` products at most.

    Raises:
        ValueError: when `runs` or `steps` is below 1.
    """
    if runs < 1 or steps < 1:
        raise ValueError(f"runs={runs} and steps={steps} have to be at least 1.")
    generator = torch.Generator().manual_seed(seed)
    nodes, weights = [], []
    for _ in range(runs):
        krylov = lanczos(hessian, hessian.random_signs(generator), steps)
        nodes.append(krylov.ritz_values)
        weights.append(krylov.first**2)
    return SpectralDensity(nodes, weights, hessian.size)
