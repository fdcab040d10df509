"""How many singular values a layer keeps, by a rule and a budget together."""

from __future__ import annotations

import pytest
import torch

from lora.tools.factors.cutting import BUDGET_RANK, Cut, CutLayer
from lora.tools.factors.ranks import RankPolicy

LAYER = CutLayer("layer", None, torch.float32)


@pytest.mark.parametrize(
    ("policy", "values"),
    [
        (RankPolicy(rank=150, max_bytes=10**9), 150),
        (RankPolicy(energy=0.9, max_bytes=10**9), 144),
        (RankPolicy(max_bytes=10**9), BUDGET_RANK),
    ],
)
def test_a_rule_of_the_users_own_is_not_capped_by_a_budget(policy: RankPolicy, values: int) -> None:
    assert Cut.of_matrix(LAYER, torch.eye(160), (160,), policy, 0).factors.rank == values
