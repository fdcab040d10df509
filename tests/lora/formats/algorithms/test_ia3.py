import pytest
import torch

from lora.formats.algorithms.ia3 import IA3, PeftIA3
from tests.adapters import randn
from tests.lora.checks import assert_delta, assert_misfits_are_told, parts_of

LINEAR, CONV = (6, 5), (6, 5, 3, 3)


@pytest.mark.parametrize("on_input", [torch.tensor(0), torch.tensor(1), torch.tensor([True])])
@pytest.mark.parametrize("shape", [LINEAR, CONV], ids=["linear", "conv"])
def test_lycoris_adds_its_factors_to_one(shape: tuple[int, ...], on_input: torch.Tensor) -> None:
    side, weight = int(on_input), randn(*shape)
    count = shape[side]
    factors = randn(*((count,) if shape == LINEAR else (1, count, 1, 1)), seed=1)
    expected = weight.double().transpose(0, side).clone()
    for row, factor in zip(expected, factors.flatten().double(), strict=True):
        row.mul_(1 + factor)
    (taken,) = parts_of({"weight": factors, "on_input": on_input})
    assert taken.used == {"weight", "on_input"}
    assert isinstance(taken.part, IA3)
    assert_delta(taken.part, weight, expected.transpose(0, side))
    assert_misfits_are_told(taken.part, shape)


@pytest.mark.parametrize(
    ("shape", "given", "side"),
    [
        (LINEAR, (6, 1), 0),
        (LINEAR, (1, 5), 1),
        ((5, 5), (5, 1), 0),
        ((5, 5), (1, 5), 1),
        (CONV, (1, 6, 1, 1), 0),
        (CONV, (1, 5, 1, 1), 1),
    ],
)
def test_peft_multiplies_the_side_that_the_shape_tells(
    shape: tuple[int, ...], given: tuple[int, ...], side: int
) -> None:
    weight, factors = randn(*shape), randn(*given, seed=1)
    expected = weight.double().transpose(0, side).clone()
    for row, factor in zip(expected, factors.flatten().double(), strict=True):
        row.mul_(factor)
    part = PeftIA3(factors)
    assert_delta(part, weight, expected.transpose(0, side))


@pytest.mark.parametrize(
    ("shape", "given"),
    [(LINEAR, (6, 1)), (LINEAR, (1, 5)), (CONV, (1, 6, 1, 1)), (CONV, (1, 5, 1, 1))],
)
def test_misfits_of_peft_are_told(shape: tuple[int, ...], given: tuple[int, ...]) -> None:
    assert_misfits_are_told(PeftIA3(randn(*given)), shape)


def test_misfit_of_a_side_that_is_not_one_number() -> None:
    assert IA3(randn(6), torch.tensor([0, 1])).misfit(LINEAR) == "on_input is not one number"
