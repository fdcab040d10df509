"""The rules for ranks, and a budget spent over layers against every way to spend it."""

from __future__ import annotations

import itertools

import pytest
import torch

from lora.errors import ToolError
from lora.tools.factors.ranks import RankPolicy, Spectrum, choose, spend
from tests.adapters import randn

VALUES = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5])
TOTAL = float(VALUES.square().sum())


@pytest.mark.parametrize(
    ("policy", "rank"),
    [
        (RankPolicy(rank=3), 3),
        (RankPolicy(rank=9), 5),
        (RankPolicy(max_rank=2), 2),
        (RankPolicy(rank=4, max_rank=2), 2),
        (RankPolicy(energy=0.5), 1),
        (RankPolicy(energy=80 / TOTAL), 2),
        (RankPolicy(energy=80.01 / TOTAL), 3),
        (RankPolicy(energy=1.0), 5),
        (RankPolicy(energy=1.0, max_rank=4), 4),
        (RankPolicy(threshold=2.0), 3),
        (RankPolicy(threshold=2.1), 2),
        (RankPolicy(threshold=100.0), 1),
        (RankPolicy(ratio=0.25), 3),
        (RankPolicy(ratio=0.26), 2),
        (RankPolicy(ratio=1.0), 1),
        (RankPolicy(max_bytes=10), 5),
    ],
)
def test_choose_takes_the_smallest_rank_that_fulfils_the_rule(
    policy: RankPolicy, rank: int
) -> None:
    assert choose(VALUES, TOTAL, policy) == rank


def test_choose_drops_only_what_is_nothing() -> None:
    assert choose(torch.zeros(4), 0.0, RankPolicy(rank=2)) == 0
    assert choose(torch.zeros(0), 0.0, RankPolicy(rank=2)) == 0
    assert choose(torch.tensor([1e-9]), 1e-18, RankPolicy(threshold=1.0)) == 1


def test_all_of_the_energy_needs_no_values_that_are_zero() -> None:
    values = torch.tensor([3.0, 1.0, 0.0, 0.0])
    assert choose(values, 10.0, RankPolicy(energy=1.0)) == 2
    assert choose(values, 10.0 * (1 + 1e-9), RankPolicy(energy=1.0)) == 2


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"rank": 0},
        {"rank": -1},
        {"max_rank": 0, "energy": 0.5},
        {"max_bytes": 0},
        {"energy": 0.0},
        {"energy": 1.1},
        {"energy": float("nan")},
        {"ratio": 0.0},
        {"ratio": 2.0},
        {"threshold": 0.0},
        {"threshold": -1.0},
        {"threshold": float("inf")},
        {"rank": 4, "energy": 0.9},
        {"ratio": 0.5, "threshold": 1.0},
    ],
    ids=str,
)
def test_a_policy_that_makes_no_sense_is_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ToolError):
        RankPolicy(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("policy", "seen", "settled"),
    [
        (RankPolicy(rank=3), 2, False),
        (RankPolicy(rank=3), 3, True),
        (RankPolicy(energy=0.9), 1, False),
        (RankPolicy(energy=0.9), 2, True),
        (RankPolicy(energy=1.0, max_rank=3), 3, True),
        (RankPolicy(threshold=2.0), 3, False),
        (RankPolicy(threshold=2.0), 4, True),
        (RankPolicy(ratio=0.25), 3, False),
        (RankPolicy(ratio=0.25), 4, True),
        (RankPolicy(ratio=0.25), 0, False),
        (RankPolicy(max_bytes=100), 5, False),
    ],
)
def test_a_choice_is_settled_once_more_values_cannot_change_it(
    policy: RankPolicy, seen: int, settled: bool
) -> None:
    assert policy.settled(VALUES[:seen], TOTAL) is settled


def energy_of(spectra: list[Spectrum], ranks: tuple[int, ...]) -> float:
    return sum(
        float(one.values[:rank].double().square().sum())
        for one, rank in zip(spectra, ranks, strict=True)
    )


def bytes_of(spectra: list[Spectrum], ranks: tuple[int, ...]) -> int:
    return sum(one.bytes_per_rank * rank for one, rank in zip(spectra, ranks, strict=True))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("budget", [0, 3, 10, 17, 1000])
def test_spend_is_the_best_of_all_ways_where_every_layer_costs_the_same(
    seed: int, budget: int
) -> None:
    spectra = [
        Spectrum(randn(3, seed=seed * 10 + i).abs().sort(descending=True).values, 2)
        for i in range(4)
    ]
    ranks = tuple(spend(spectra, budget))
    ways = [w for w in itertools.product(range(4), repeat=4) if bytes_of(spectra, w) <= budget]
    assert bytes_of(spectra, ranks) <= budget
    assert energy_of(spectra, ranks) == pytest.approx(max(energy_of(spectra, w) for w in ways))


@pytest.mark.parametrize("seed", range(8))
def test_spend_is_the_best_for_the_bytes_that_it_takes_where_they_cost_differently(
    seed: int,
) -> None:
    spectra = [
        Spectrum(randn(3, seed=seed * 10 + i).abs().sort(descending=True).values, cost)
        for i, cost in enumerate((2, 3, 7, 5))
    ]
    gains = sorted(
        (float(v.double().square()) / one.bytes_per_rank, i, one.bytes_per_rank)
        for i, one in enumerate(spectra)
        for v in one.values
    )[::-1]
    for count in range(len(gains) + 1):
        budget = sum(cost for _, _, cost in gains[:count])
        ranks = tuple(spend(spectra, budget))
        ways = itertools.product(range(4), repeat=4)
        best = max(energy_of(spectra, w) for w in ways if bytes_of(spectra, w) <= budget)
        assert energy_of(spectra, ranks) == pytest.approx(best)


def test_spend_gives_equal_values_to_the_earlier_layer_and_goes_on_where_one_does_not_fit() -> None:
    equal = [Spectrum(torch.ones(2), 4), Spectrum(torch.ones(2), 4)]
    assert spend(equal, 4) == [1, 0]
    assert spend(equal, 13) == [2, 1]
    assert spend([Spectrum(torch.tensor([9.0]), 100), Spectrum(torch.tensor([1.0]), 10)], 50) == [
        0,
        1,
    ]


def test_spend_pays_for_nothing_that_is_nothing() -> None:
    spectra = [Spectrum(torch.tensor([1.0, 0.0]), 1), Spectrum(torch.zeros(0), 1)]
    assert spend(spectra, 100) == [1, 0]
    assert spend([], 100) == []


def test_spend_begins_with_the_least_ranks_and_refuses_less() -> None:
    spectra = [Spectrum(torch.tensor([1.0, 1.0]), 10, least=1), Spectrum(torch.tensor([9.0]), 10)]
    assert spend(spectra, 20) == [1, 1]
    assert spend(spectra, 19) == [1, 0]
    with pytest.raises(ToolError, match="9 bytes are left"):
        spend(spectra, 9)
