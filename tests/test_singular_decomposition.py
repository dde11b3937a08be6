"""The factors U, σ, Vᵀ: exact, and one and the same whatever routine found them."""

import pytest
import torch
from singular_cases import REAL_SVD, other_machine

from hf_fip.singular import decomposition
from hf_fip.singular.decomposition import decompose


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def with_values(m: int, n: int, values: list[float] | torch.Tensor) -> torch.Tensor:
    """A matrix in float64 with these singular values; those left out are zero."""
    values = torch.as_tensor(values, dtype=torch.float64)
    left = torch.linalg.qr(normal(m, m, seed=1, dtype=torch.float64)).Q[:, : len(values)]
    right = torch.linalg.qr(normal(n, n, seed=2, dtype=torch.float64)).Q[:, : len(values)]
    return (left * values) @ right.T


MATRICES = {
    "square": normal(9, 9),
    "tall": normal(40, 7),
    "wide": normal(7, 40),
    "one row": normal(1, 12),
    "one column": normal(12, 1),
    "one number": normal(1, 1),
    "a stack": normal(2, 3, 8, 5),
    "rank deficient": with_values(10, 8, [3.0, 2.0, 1.0]).float(),
    "rank deficient in float64": with_values(10, 8, [3.0, 2.0, 1.0]),
    "zero": torch.zeros(5, 7),
    "one zero in a stack": torch.stack([normal(6, 5), torch.zeros(6, 5)]),
    "float64": normal(9, 6, dtype=torch.float64),
    "bfloat16": normal(9, 6, dtype=torch.bfloat16),
    "float16": normal(9, 6, dtype=torch.float16),
    "badly conditioned": with_values(12, 12, torch.logspace(0, -9, 12)).float(),
    "tiny": 1e-30 * normal(8, 6),
    "identity": torch.eye(6),
}


@pytest.mark.parametrize("case", MATRICES)
def test_the_factors_are_orthonormal_and_give_the_weight_back_with_torchs_singular_values(case):
    weight = MATRICES[case]
    u, sigma, vt = decompose(weight)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    assert (u.dtype, sigma.dtype, vt.dtype) == (dtype,) * 3
    exact = weight.double()
    largest = torch.linalg.svdvals(exact).max()
    precision = 1e-12 if dtype == torch.float64 else 1e-6
    again = (u.double() * sigma.double().unsqueeze(-2)) @ vt.double()
    assert (again - exact).norm() <= precision * exact.norm()
    assert (sigma.double() - torch.linalg.svdvals(exact)).abs().max() <= 10 * precision * largest
    eye = torch.eye(sigma.shape[-1], dtype=torch.float64).expand(*sigma.shape[:-1], -1, -1)
    for gram in (u.double().mT @ u.double(), vt.double() @ vt.double().mT):
        assert (gram - eye).abs().max() <= 10 * precision
    assert (sigma >= 0).all() and (sigma.diff(dim=-1) <= 0).all()


def same_function(first, second, tolerance: float = 1e-6) -> bool:
    """Whether two triplets give the same U diag(x) Vᵀ for any x."""
    x = normal(first[1].shape[-1], seed=5, dtype=torch.float64)
    made = [(u.double() * x) @ vt.double() for u, _, vt in (first, second)]
    return bool((made[0] - made[1]).abs().max() <= tolerance and torch.allclose(first[1], second[1], rtol=1e-6))


NEARLY = 2.0 + 1e-10 * torch.arange(4, dtype=torch.float64).flip(0)
DEGENERATE = {
    "distinct": normal(9, 6),
    "identity": torch.eye(7),
    "permutation": torch.eye(7)[[3, 1, 0, 2, 6, 5, 4]],
    "orthogonal, wide": torch.linalg.qr(normal(12, 12, dtype=torch.float64)).Q[:5],
    "two groups of equal values": with_values(9, 7, [5.0, 5.0, 5.0, 2.0, 1.0, 1.0, 0.5]),
    "a group of nearly equal values": with_values(8, 6, torch.cat([NEARLY, torch.tensor([1.0, 0.5])])),
    "null directions": with_values(10, 8, [3.0, 2.0, 1.0]),
    "null directions, wide": with_values(6, 11, [3.0, 2.0, 2.0]),
    "null directions of float32": with_values(10, 8, [3.0, 2.0, 1.0]).to(torch.bfloat16),
    "zero": torch.zeros(6, 4),
    "equal rows": normal(1, 6).expand(4, 6).contiguous(),
}


@pytest.mark.parametrize("rank", [None, 2, 4])
@pytest.mark.parametrize("case", DEGENERATE)
def test_any_right_svd_leads_to_the_same_factors(case, rank, monkeypatch):
    here = decompose(DEGENERATE[case], rank)
    for seed in range(3):
        other_machine(monkeypatch, seed)
        assert same_function(here, decompose(DEGENERATE[case], rank))


def test_the_other_machine_of_these_tests_is_right_and_another_one(monkeypatch):
    weight = DEGENERATE["two groups of equal values"]
    other_machine(monkeypatch)
    here, there = REAL_SVD(weight, full_matrices=False), torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close((there[0] * there[1]) @ there[2], weight)
    assert not same_function(here, there, 1e-2)
    values, vectors = torch.linalg.eigh(weight @ weight.T)
    torch.testing.assert_close((vectors * values) @ vectors.T, weight @ weight.T)


@pytest.mark.parametrize("case", ["square", "tall", "wide", "a stack", "identity", "zero"])
def test_fewer_values_are_the_leading_ones_of_all(case):
    weight = MATRICES[case]
    u, sigma, vt = decompose(weight)
    for found, whole in zip(decompose(weight, 3), (u[..., :3], sigma[..., :3], vt[..., :3, :]), strict=True):
        assert torch.equal(found, whole) and found.is_contiguous()


FLAT = normal(520, 600)  # neighbouring values differ by less than a hundredth
FALLING = with_values(640, 520, torch.logspace(0, -6, 520)).float()


@pytest.mark.parametrize(("weight", "tolerance"), [(FLAT, 2e-4), (FALLING, 1e-6)], ids=["flat", "falling"])
def test_subspace_iteration_finds_the_leading_part(weight, tolerance, monkeypatch):
    calls = []
    leading = decomposition._leading
    monkeypatch.setattr(decomposition, "_leading", lambda *args: calls.append(args) or leading(*args))
    u, sigma, vt = decompose(weight, 8)
    assert len(calls) == 1
    whole = decompose(weight)
    best = (whole[0][:, :8] * whole[1][:8]) @ whole[2][:8]
    assert (sigma - whole[1][:8]).abs().max() <= tolerance * whole[1][0]
    error = torch.linalg.matrix_norm((u * sigma) @ vt - best, 2)
    assert error <= 100 * tolerance * whole[1][0]
    # What counts for a function: the part is as good as the best one.
    left = torch.linalg.matrix_norm(weight - (u * sigma) @ vt, 2)
    assert left <= (1 + tolerance) * whole[1][8]


def test_a_degenerate_large_matrix_gets_the_same_leading_factors_from_any_svd(monkeypatch):
    weight = torch.eye(520, 512)
    here = decompose(weight, 8)
    other_machine(monkeypatch)
    assert same_function(here, decompose(weight, 8))


@pytest.mark.parametrize("rank", [None, 8])
def test_the_factors_do_not_depend_on_torchs_random_state_nor_move_it(rank):
    weight = torch.cat([normal(515, 300), torch.zeros(515, 215)], dim=1) if rank else DEGENERATE["null directions"]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = decompose(weight, rank)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = decompose(weight, rank)
    assert all(map(torch.equal, first, second))


def test_a_matrix_gets_the_same_factors_alone_and_in_a_stack():
    stack = normal(3, 8, 5)
    alone = [decompose(matrix) for matrix in stack]
    for found, parts in zip(decompose(stack), zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(found, torch.stack(parts))


def test_the_weight_may_require_a_gradient_and_gets_none():
    weight = normal(4, 3).requires_grad_()
    assert not any(part.requires_grad for part in decompose(weight))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("rank", [None, 2])
def test_numbers_that_are_not_finite_are_refused(value, rank):
    weight = normal(2, 6, 5)
    weight[1, 2, 3] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        decompose(weight, rank)
