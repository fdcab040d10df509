import pytest
import torch
from torch import Tensor

from lora.formats.algorithms import GLoRA
from tests.adapters import randn
from tests.lora.checks import assert_delta, assert_misfits_are_told

LINEAR, CONV = (6, 5), (6, 5, 3, 3)


def make(shape: tuple[int, ...], *, middle: bool = False) -> dict[str, Tensor]:
    ones = (1,) * len(shape[2:])
    tensors = {
        "a1": randn(5, 2, *ones, seed=1),
        "a2": randn(2, 5, *ones, seed=2),
        "b1": randn(6, 2, *ones, seed=3),
        "b2": randn(2, 5, *(ones if middle else shape[2:]), seed=4),
    }
    return tensors | ({"bm": randn(2, 2, *shape[2:], seed=5)} if middle else {})


def expected(weight: Tensor, tensors: dict[str, Tensor], scaling: float) -> Tensor:
    """W + scaling * (W A + B), kernel position by kernel position, in float64."""
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    base = weight.double()[..., None, None] if weight.dim() == 2 else weight.double()
    inside = wide["a1"].flatten(1) @ wide["a2"].flatten(1)
    right = wide["b2"].reshape(2, 5, *base.shape[2:] if "bm" not in wide else (1, 1))
    right = right.expand(2, 5, *base.shape[2:])
    merged = base.clone()
    for y in range(base.shape[2]):
        for x in range(base.shape[3]):
            added = right[:, :, y, x]
            if "bm" in wide:
                added = wide["bm"][:, :, y, x] @ added
            change = base[:, :, y, x] @ inside + wide["b1"].flatten(1) @ added
            merged[:, :, y, x] += scaling * change
    return merged.reshape(weight.shape)


CASES = {
    "linear": (LINEAR, make(LINEAR)),
    "conv": (CONV, make(CONV)),
    "conv bm": (CONV, make(CONV, middle=True)),
}


@pytest.mark.parametrize("alpha", [None, 1.0])
@pytest.mark.parametrize("case", CASES)
def test_delta_changes_the_input_side_and_adds_a_product(case: str, alpha: float | None) -> None:
    shape, tensors = CASES[case]
    weight = randn(*shape, seed=9)
    part = GLoRA(**tensors, alpha=None if alpha is None else torch.tensor(alpha))
    assert_delta(part, weight, expected(weight, tensors, 1.0 if alpha is None else alpha / 2))
    assert part.rank == 2


def test_the_older_layout_has_each_pair_swapped() -> None:
    tensors, weight = make(LINEAR), randn(*LINEAR, seed=9)
    swapped = {"a1": "a2", "a2": "a1", "b1": "b2", "b2": "b1"}
    part = GLoRA(**{swapped[name]: tensor for name, tensor in tensors.items()})
    assert_delta(part, weight, expected(weight, tensors, 1.0))
    assert part.rank == 2


@pytest.mark.parametrize("case", CASES)
def test_misfits_are_told(case: str) -> None:
    shape, tensors = CASES[case]
    assert_misfits_are_told(GLoRA(**tensors), shape)


def test_misfit_names_the_shapes() -> None:
    assert "[6, 4]" in (GLoRA(**make(LINEAR)).misfit((6, 4)) or "")
