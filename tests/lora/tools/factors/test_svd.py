"""The truncated SVD against torch's whole one, in float64."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from lora.tools.factors import svd
from lora.tools.factors.ranks import RankPolicy, choose
from lora.tools.factors.svd import Factors, energy, svd_by_policy, truncated_svd, tucker_svd
from tests.adapters import randn


def spectrum(values: Tensor, out: int, columns: int, seed: int = 0) -> Tensor:
    """A matrix with these singular values and random vectors."""
    up = torch.linalg.qr(randn(out, len(values), seed=seed).double()).Q
    down = torch.linalg.qr(randn(columns, len(values), seed=seed + 1).double()).Q
    return ((up * values.double()) @ down.t()).float()


def planted(out: int, columns: int, rank: int, noise: float, seed: int = 0) -> Tensor:
    low = randn(out, rank, seed=seed) @ randn(rank, columns, seed=seed + 1)
    return low + noise * randn(out, columns, seed=seed + 2)


def product(found: Factors) -> Tensor:
    return (found.up.double() * found.s.double()) @ found.down.double()


def error(matrix: Tensor, found: Factors) -> float:
    return float(torch.linalg.matrix_norm(matrix.double() - product(found)))


@cache
def _values(matrix: Tensor) -> Tensor:
    return torch.linalg.svdvals(matrix.double())


def best_error(matrix: Tensor, rank: int) -> float:
    return float(_values(matrix)[rank:].square().sum().sqrt())


count = torch.arange(1, 321)
MATRICES = {
    "a planted rank under noise": planted(640, 480, 24, 0.3),
    "a planted rank that is higher": planted(480, 640, 60, 0.3),
    "a planted rank under much noise": planted(640, 640, 16, 3.0),
    "noise alone": randn(640, 512),
    "noise alone, tall": randn(2880, 320),
    "noise alone, wide": randn(256, 1500),
    "values that fall slowly": spectrum(1 / count.sqrt(), 400, 320),
    "values that fall fast": spectrum(0.9**count, 400, 320),
    "a second tier that is a thousandth of the first": spectrum(
        torch.cat([torch.ones(24), torch.full((8,), 1e-3), torch.full((288,), 6e-4)]), 2880, 320
    ),
    "a second tier that stands out more": spectrum(
        torch.cat([torch.ones(24), torch.full((8,), 1e-3), torch.full((288,), 3e-4)]), 2880, 320
    ),
    "equal values": spectrum(torch.ones(320), 320, 320),
    "a small matrix": randn(40, 60),
}


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("rank", [1, 8, 32])
def test_the_error_is_within_a_hundredth_of_the_best(name: str, rank: int) -> None:
    matrix = MATRICES[name]
    found = truncated_svd(matrix, rank)
    assert found.rank == rank
    assert error(matrix, found) <= 1.01 * best_error(matrix, rank) + 1e-9


@pytest.mark.parametrize("name", MATRICES)
def test_the_vectors_are_orthonormal_and_the_values_fall(name: str) -> None:
    found = truncated_svd(MATRICES[name], 16)
    one = torch.eye(16)
    assert torch.allclose(found.up.t() @ found.up, one, atol=1e-4)
    assert torch.allclose(found.down @ found.down.t(), one, atol=1e-4)
    assert bool((found.s[:-1] >= found.s[1:] * (1 - 1e-6)).all())


@pytest.mark.parametrize("name", MATRICES)
def test_the_residual_is_the_error_squared(name: str) -> None:
    matrix = MATRICES[name]
    found = truncated_svd(matrix, 16)
    assert found.residual == pytest.approx(error(matrix, found) ** 2, abs=1e-5 * found.total)


@pytest.mark.parametrize("shape", [(500, 300), (300, 500), (100, 90)])
def test_a_matrix_of_lower_rank_than_asked_for_is_given_whole(shape: tuple[int, int]) -> None:
    matrix = planted(*shape, 10, 0.0)
    found = truncated_svd(matrix, 32)
    assert error(matrix, found) <= 2e-6 * float(torch.linalg.matrix_norm(matrix))


@pytest.mark.parametrize("shape", [(1, 700), (700, 1), (1, 1), (5, 400), (400, 400)])
def test_nothing_is_made_of_nothing(shape: tuple[int, int]) -> None:
    found = truncated_svd(torch.zeros(shape), 8)
    assert found.rank == min(8, *shape)
    assert not product(found).any()
    assert all(bool(t.isfinite().all()) for t in (*found.balanced(), found.up, found.down))


@pytest.mark.parametrize("shape", [(1, 700), (700, 1), (1, 1), (3, 900)])
def test_a_matrix_that_is_thin_already_is_exact(shape: tuple[int, int]) -> None:
    matrix = randn(*shape)
    found = truncated_svd(matrix, 8)
    assert torch.allclose(product(found).float(), matrix, atol=1e-5)


def test_the_same_seed_gives_the_same_numbers_and_another_almost_the_same() -> None:
    matrix = planted(640, 480, 24, 0.3)
    before = matrix.clone()
    one, again, other = (truncated_svd(matrix, 24, seed) for seed in (1, 1, 2))
    assert torch.equal(one.up, again.up)
    assert torch.equal(one.down, again.down)
    assert not torch.equal(one.up, other.up)
    assert torch.allclose(one.s, other.s, rtol=1e-4)
    assert torch.equal(matrix, before)


def test_the_search_serves_large_matrices_and_not_the_whole_decomposition(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(matrix: Tensor, total: float) -> Factors:
        raise AssertionError(f"{list(matrix.shape)} was decomposed whole")

    monkeypatch.setattr(svd, "_exact", refuse)
    truncated_svd(planted(640, 480, 24, 0.3), 32)
    truncated_svd(randn(640, 512), 32)
    assert 32 < svd_by_policy(planted(900, 700, 60, 1.0), RankPolicy(ratio=0.5)).rank < 60


def test_a_search_that_does_not_come_to_an_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(svd, "MAX_TURNS", 3)
    matrix = randn(640, 512)
    found = truncated_svd(matrix, 32)
    assert error(matrix, found) <= 1.00001 * best_error(matrix, 32)


def test_the_two_factors_share_the_size() -> None:
    found = truncated_svd(planted(640, 480, 24, 0.3), 24)
    up, down = found.balanced()
    assert torch.allclose((up @ down).double(), product(found), atol=1e-3)
    assert torch.allclose(up.norm(dim=0), down.norm(dim=1), rtol=1e-4)


def test_energy_is_the_sum_of_squares_of_any_tensor() -> None:
    for shape in [(7,), (30, 40), (8, 4, 3, 3), (0, 4)]:
        tensor = randn(*shape)
        assert energy(tensor) == pytest.approx(float(tensor.double().square().sum()))
    big = torch.full((3000, 3000), 1e-3)
    assert energy(big) == pytest.approx(9.0, rel=1e-6)


POLICIES = {
    "energy": RankPolicy(energy=0.9),
    "energy that takes many": RankPolicy(energy=0.97),
    "ratio": RankPolicy(ratio=0.5),
    "threshold": RankPolicy(threshold=300.0),
    "energy, held": RankPolicy(energy=0.999, max_rank=20),
    "ratio, held": RankPolicy(ratio=0.01, max_rank=70),
    "rank": RankPolicy(rank=12),
    "largest rank": RankPolicy(max_rank=9),
}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_a_policy_chooses_what_it_would_of_all_singular_values(policy: RankPolicy) -> None:
    matrix = planted(900, 700, 60, 1.0)
    values = torch.linalg.svdvals(matrix.double())
    wanted = choose(values, float(values.square().sum()), policy)
    found = svd_by_policy(matrix, policy)
    assert abs(found.rank - wanted) <= (1 if wanted > 60 else 0)
    assert error(matrix, found) <= 1.01 * best_error(matrix, found.rank)


def test_a_policy_that_wants_everything_gets_everything() -> None:
    matrix = randn(300, 200)
    found = svd_by_policy(matrix, RankPolicy(energy=1.0))
    assert error(matrix, found) <= 1e-5 * float(torch.linalg.matrix_norm(matrix))


def test_a_policy_makes_nothing_of_nothing() -> None:
    assert svd_by_policy(torch.zeros(500, 400), RankPolicy(energy=0.9)).rank == 0
    assert svd_by_policy(torch.zeros(500, 400), RankPolicy(rank=4)).rank == 0


def test_the_sweep_over_a_tucker_core_gains_over_a_single_pass() -> None:
    weight = randn(48, 40, 3, 3)
    found = tucker_svd(weight, 6)
    down = truncated_svd(weight.movedim(1, 0).flatten(1), 6).up.t()
    once = torch.linalg.svdvals(torch.einsum("oihw,ni->onhw", weight, down).flatten(1))
    kept = float(once[:6].double().square().sum())
    assert found.total - found.residual > 1.01 * kept
    up, core, down = found.balanced()
    back = torch.einsum("om,mnhw,ni->oihw", up, core, down)
    error = float((weight.double() - back.double()).square().sum())
    assert error == pytest.approx(found.residual, rel=1e-4)
    sizes = [float(t.norm()) for t in (up / 6**0.5, core, down / 6**0.5)]
    assert max(sizes) < 1.01 * min(sizes)
