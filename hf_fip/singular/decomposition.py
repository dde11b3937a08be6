"""W = U diag(σ) Vᵀ, as one and the same factors on every machine.

A shift of singular values means something only together with the vectors it belongs to, and those are not unique:
signs may flip, and within a group of equal singular values any rotation will do. Here they are made a function of W
alone: everything is computed in float64, and each group of (nearly) equal values gets the vectors that lie nearest to
a fixed reference. So a file of shifts, without U and V, stands for the same model wherever it is loaded.
"""

from __future__ import annotations

import torch
from torch import Tensor

_EQUAL = 1e-8  # of the largest: singular values closer than this are one group
_NULL = 1e-10  # of the largest: below, the weight does not have this direction
_GRAM = 1e-8  # of the largest: eigenvalues of W Wᵀ smaller or closer than this are left to a full SVD
_LARGE = 512  # sides; a smaller matrix is decomposed in full whatever the rank
_ITERATIONS = 60


def decompose(weight: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The thin singular value decomposition of each matrix in a stack, the largest values first.

    In full by the eigenvectors of the smaller Gram matrix in float64, or, where those cannot tell (small or equal
    singular values), by LAPACK's SVD. When only a few of a large matrix' values are wanted, by subspace iteration from
    a fixed start (Halko, Martinsson and Tropp 2011) until they stand still.

    Args:
        weight: `(..., m, n)`, of any floating type, on any device.
        rank: how many singular values are wanted; all `min(m, n)` when left out.

    Returns:
        U `(..., m, r)`, σ `(..., r)` and Vᵀ `(..., r, n)`, in float32 (float64 for float64 weights).

    Raises:
        ValueError: for numbers that are not finite.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    *stack, m, n = weight.shape
    matrices = weight.detach().reshape(-1, m, n).double()
    if not torch.isfinite(matrices).all():
        raise ValueError("the weight holds NaN or infinity.")
    rank = min(m, n) if rank is None else rank
    if 4 * rank <= min(m, n) >= _LARGE:
        factors = [_leading(matrix, rank) for matrix in matrices]
    else:
        factors = _in_full(matrices)
    factors = [_canonical(*parts) for parts in factors]  # before the cut, which may run through a group
    u, sigma, vt = (torch.stack(parts).to(dtype) for parts in zip(*factors, strict=True))
    u, sigma, vt = (part.contiguous() for part in (u[..., :rank], sigma[..., :rank], vt[..., :rank, :]))
    return u.reshape(*stack, m, rank), sigma.reshape(*stack, rank), vt.reshape(*stack, rank, n)


def _in_full(matrices: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """All singular triplets of each matrix of a stack `(b, m, n)`."""
    if matrices.shape[1] > matrices.shape[2]:
        return [(vt.mT, sigma, u.mT) for u, sigma, vt in _in_full(matrices.mT)]
    values, vectors = torch.linalg.eigh(matrices @ matrices.mT)
    values, vectors = values.flip(-1), vectors.flip(-1)
    largest = values[:, :1].clamp_min(torch.finfo(torch.float64).tiny)
    gaps = torch.cat([values[:, :-1] - values[:, 1:], values[:, -1:]], dim=-1)  # the last: its distance from zero
    clear = (gaps > _GRAM * largest).all(-1)
    factors = []
    for matrix, value, u, is_clear in zip(matrices, values, vectors, clear.tolist(), strict=True):
        if is_clear:
            sigma = value.sqrt()
            factors.append((u, sigma, u.mT @ matrix / sigma[:, None]))
        else:
            factors.append(tuple(torch.linalg.svd(matrix, full_matrices=False)))
    return factors


def _leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` largest singular triplets of one matrix `(m, n)`."""
    width = min(2 * rank + 8, *matrix.shape)
    basis, found = _normal(matrix.shape[1], width, 0).to(matrix.device), None
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(matrix.mT @ torch.linalg.qr(matrix @ basis).Q).Q
        u, sigma, vt = torch.linalg.svd(matrix @ basis, full_matrices=False)
        if found is not None and (sigma[:rank] - found).abs().max() <= 1e-9 * sigma[0]:
            break
        found = sigma[:rank]
    return u, sigma, vt @ basis.mT


def _canonical(u: Tensor, sigma: Tensor, vt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same product with the one choice of vectors that depends on nothing but the matrix."""
    largest = sigma[0].clamp_min(torch.finfo(torch.float64).tiny)
    present = int((sigma > _NULL * largest).sum())
    if present < len(sigma):  # directions that the weight does not have, completed from the reference
        sigma = sigma.clone()
        sigma[present:] = 0.0
        u = torch.cat([u[:, :present], _complement(u[:, :present], len(sigma) - present)], dim=1)
        vt = torch.cat([vt[:present], _complement(vt[:present].mT, len(sigma) - present).mT])
    signs = (u.mT @ _reference(len(u), 1, u)).sign().squeeze(1)
    signs[signs == 0] = 1.0
    signs[present:] = 1.0
    u, vt = u * signs, vt * signs[:, None]
    edges = ((sigma[:-1] - sigma[1:]) > _EQUAL * largest).tolist()
    start = 0
    for end in range(1, present + 1):
        if end == present or edges[end - 1]:
            if end - start > 1:
                group = slice(start, end)
                rotation = _nearest_orthogonal(u[:, group].mT @ _reference(len(u), end - start, u))
                u[:, group] = u[:, group] @ rotation
                vt[group] = rotation.mT @ vt[group]
            start = end
    return u, sigma, vt


def _complement(vectors: Tensor, count: int) -> Tensor:
    """`count` orthonormal columns at right angles to the columns given, nearest to the reference."""
    reference = _reference(len(vectors), count, vectors)
    return _nearest_orthogonal(reference - vectors @ (vectors.mT @ reference))


def _nearest_orthogonal(matrix: Tensor) -> Tensor:
    """The orthogonal factor of the polar decomposition."""
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right


def _reference(rows: int, columns: int, like: Tensor) -> Tensor:
    return _normal(columns, rows, 1).mT.to(like.device)


def _normal(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, dtype=torch.float64, generator=generator, device="cpu")
