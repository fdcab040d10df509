import itertools

import pytest
import torch
from torch import Tensor

from lora.formats.algorithms import LoKr
from tests.adapters import randn
from tests.lora.checks import assert_delta, assert_misfits_are_told

LINEAR, CONV = (6, 20), (6, 20, 3, 3)
"""w1 is [2, 4] and w2 [3, 5(, 3, 3)]."""


def kron(first: Tensor, second: Tensor) -> Tensor:
    """The Kronecker product over the first two axes, one block at a time, in float64."""
    (a, b), (c, d) = first.shape, second.shape[:2]
    total = torch.zeros(a * c, b * d, *second.shape[2:], dtype=torch.float64)
    for i, j in itertools.product(range(a), range(b)):
        total[i * c : (i + 1) * c, j * d : (j + 1) * d] = first[i, j] * second
    return total


FIRST = {
    "w1": {"lokr_w1": randn(2, 4, seed=1)},
    "w1_a w1_b": {"lokr_w1_a": randn(2, 2, seed=2), "lokr_w1_b": randn(2, 4, seed=3)},
}
SECOND = {
    "w2": {"lokr_w2": randn(3, 5, seed=4)},
    "w2_a w2_b": {"lokr_w2_a": randn(3, 2, seed=5), "lokr_w2_b": randn(2, 5, seed=6)},
    "conv w2": {"lokr_w2": randn(3, 5, 3, 3, seed=7)},
    "conv w2_a w2_b": {"lokr_w2_a": randn(3, 2, seed=8), "lokr_w2_b": randn(2, 45, seed=9)},
    "conv tucker": {
        "lokr_w2_a": randn(2, 3, seed=10),
        "lokr_w2_b": randn(2, 5, seed=11),
        "lokr_t2": randn(2, 2, 3, 3, seed=12),
    },
}


def whole(tensors: dict[str, Tensor], name: str, *shape: int) -> Tensor:
    """One factor of the product, from its factors if it has some."""
    tensors = {key.removeprefix(name): value.double() for key, value in tensors.items()}
    if "" in tensors:
        return tensors[""]
    a, b = tensors["_a"], tensors["_b"]
    core = tensors.get("lokr_t2")
    if core is None:
        return sum(torch.outer(a[:, r], b[r]) for r in range(len(b))).reshape(shape)
    total = torch.zeros(shape, dtype=torch.float64)
    for i, j in itertools.product(range(len(a)), range(len(b))):
        total += torch.outer(a[i], b[j])[:, :, None, None] * core[i, j]
    return total


@pytest.mark.parametrize("alpha", [None, 3.0, 9999999999.0])
@pytest.mark.parametrize("second", SECOND)
@pytest.mark.parametrize("first", FIRST)
def test_delta_is_the_kronecker_product_scaled_only_where_there_is_a_rank(
    first: str, second: str, alpha: float | None
) -> None:
    tensors = FIRST[first] | SECOND[second]
    part = LoKr(**tensors, alpha=None if alpha is None else torch.tensor(alpha))
    shape = CONV if second.startswith("conv") else LINEAR
    full = (first, second.removeprefix("conv ")) == ("w1", "w2")
    scaling = 1.0 if full or alpha is None else alpha / 2
    w1, w2 = (
        whole(FIRST[first], "lokr_w1", 2, 4),
        whole(SECOND[second], "lokr_w2", 3, 5, *shape[2:]),
    )
    assert_delta(part, torch.zeros(shape), scaling * kron(w1, w2))
    assert part.rank == (None if full else 2)


@pytest.mark.parametrize("second", SECOND)
@pytest.mark.parametrize("first", FIRST)
def test_misfits_are_told(first: str, second: str) -> None:
    part = LoKr(**FIRST[first], **SECOND[second])
    assert_misfits_are_told(part, CONV if second.startswith("conv") else LINEAR)


@pytest.mark.parametrize("missing", ["lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"])
def test_misfit_of_a_missing_factor(missing: str) -> None:
    tensors = FIRST["w1_a w1_b"] | SECOND["w2_a w2_b"]
    part = LoKr(**{name: tensor for name, tensor in tensors.items() if name != missing})
    assert "neither one whole matrix nor two factors" in (part.misfit(LINEAR) or "")


def test_misfit_of_a_factor_that_is_there_twice() -> None:
    part = LoKr(**FIRST["w1"], **FIRST["w1_a w1_b"], **SECOND["w2"])
    assert "neither" in (part.misfit(LINEAR) or "")


def test_the_rank_is_the_second_factors() -> None:
    first = {"lokr_w1_a": randn(2, 1, seed=2), "lokr_w1_b": randn(1, 4, seed=3)}
    part = LoKr(**first, **SECOND["w2_a w2_b"], alpha=torch.tensor(4.0))
    expected = (
        4 / 2 * kron(whole(first, "lokr_w1", 2, 4), whole(SECOND["w2_a w2_b"], "lokr_w2", 3, 5))
    )
    assert_delta(part, torch.zeros(LINEAR), expected)
