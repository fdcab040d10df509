import pytest
import torch
from torch import Tensor

from lora.formats.algorithms import Algorithm, DoRA, LoHa, LoKr, LoRA
from tests.adapters import randn
from tests.lora.checks import assert_delta, assert_misfits_are_told, parts_of

LINEAR, CONV = (6, 4), (6, 4, 3, 3)
ALPHA = torch.tensor(1.0)


def inner(kind: str, shape: tuple[int, ...]) -> Algorithm:
    kernel, ones = shape[2:], (1,) * len(shape[2:])
    if kind == "lora":
        return LoRA(randn(6, 2, *ones, seed=1), randn(2, *shape[1:], seed=2), alpha=ALPHA)
    if kind == "loha":
        b = 4 * (9 if kernel else 1)
        factors = (
            randn(6, 2, seed=1),
            randn(2, b, seed=2),
            randn(6, 2, seed=3),
            randn(2, b, seed=4),
        )
        return LoHa(*factors, alpha=ALPHA)
    return LoKr(lokr_w1=randn(2, 2, seed=1), lokr_w2=randn(3, 2, *kernel, seed=2), alpha=ALPHA)


def decomposed(weight: Tensor, delta: Tensor, magnitude: Tensor, axis: int) -> Tensor:
    """m * (W + D) / norm(W + D), slice by slice, in float64."""
    merged = (weight.double() + delta.double()).transpose(0, axis).clone()
    for row, length in zip(merged, magnitude.double().flatten(), strict=True):
        row.mul_(length / row.square().sum().sqrt())
    return merged.transpose(0, axis)


@pytest.mark.parametrize("axis", [0, 1], ids=["output", "input"])
@pytest.mark.parametrize("shape", [LINEAR, CONV], ids=["linear", "conv"])
@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_delta_gives_each_output_or_input_its_magnitude(
    kind: str, shape: tuple[int, ...], axis: int
) -> None:
    part, weight = inner(kind, shape), randn(*shape, seed=9)
    ones = (1,) * (len(shape) - 2)
    magnitude = randn(*((6, 1) if axis == 0 else (1, 4)), *ones, seed=8).abs() + 0.5
    expected = decomposed(weight, part.delta(weight), magnitude, axis)
    whole = DoRA(part, magnitude, may_be_input=True)
    assert_delta(whole, weight, expected)
    assert whole.rank == part.rank
    assert not whole.is_low_rank
    assert whole.low_rank() is None
    assert_misfits_are_told(whole, shape)


@pytest.mark.parametrize(("given", "axis"), [((4, 1), 0), ((1, 4), 1), ((4,), 0)])
def test_the_axis_of_a_square_weight_is_told_by_the_shape(
    given: tuple[int, ...], axis: int
) -> None:
    part, weight = LoRA(randn(4, 2, seed=1), randn(2, 4, seed=2)), randn(4, 4, seed=3)
    magnitude = randn(*given, seed=4)
    expected = decomposed(weight, part.delta(weight), magnitude, axis)
    assert_delta(DoRA(part, magnitude, may_be_input=True), weight, expected)


@pytest.mark.parametrize(
    ("shape", "given"), [((6, 4), (6,)), ((4, 4, 3, 3), (1, 4, 1, 1)), ((6, 4, 3, 3), (1, 6, 1, 1))]
)
def test_the_magnitude_of_peft_is_always_the_outputs(
    shape: tuple[int, ...], given: tuple[int, ...]
) -> None:
    slots = {"lora_up": randn(shape[0], 2, seed=1), "lora_down": randn(2, *shape[1:], seed=2)}
    magnitude, weight = randn(*given, seed=4), randn(*shape, seed=3)
    (taken,) = parts_of({**slots, "magnitude": magnitude})
    assert taken.used == {*slots, "magnitude"}
    delta = LoRA(**slots).delta(weight)
    assert_delta(taken.part, weight, decomposed(weight, delta, magnitude, 0))
    assert_misfits_are_told(taken.part, shape)


def test_a_row_of_zeros_stays_zero() -> None:
    weight = randn(6, 4)
    weight[2] = 0.0
    up = randn(6, 2, seed=1)
    up[2] = 0.0
    part = DoRA(LoRA(up, randn(2, 4, seed=2)), torch.ones(6, 1), may_be_input=True)
    delta = part.delta(weight)
    assert delta.isfinite().all()
    assert torch.equal(delta[2], torch.zeros(4))


def test_misfit_of_the_inner_part_and_of_the_magnitudes() -> None:
    part = DoRA(LoRA(randn(6, 2), randn(2, 4)), randn(6, 1), may_be_input=True)
    assert "factors" in (part.misfit((6, 5)) or "")
    assert "magnitudes" in (part.misfit((7, 4)) or "")
    assert "magnitudes" in (part.misfit((6,)) or "")
