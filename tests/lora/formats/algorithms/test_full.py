import pytest
import torch

from lora.formats.names.slots import slot_of
from tests.adapters import randn
from tests.lora.checks import assert_delta, assert_misfits_are_told, parts_of

SHAPES = [(6, 5), (6, 5, 3, 3), (6,), (1, 6, 8)]
DIFFERENCES = {
    "diff": "weight",
    "w_norm": "weight",
    "diff_b": "bias",
    "b_norm": "bias",
    "diff_m": "modulation",
}
VALUES = {
    "set_weight": "weight",
    "weight": "weight",
    "modules_to_save.weight": "weight",
    "modules_to_save.default.weight": "weight",
    "bias": "bias",
    "modules_to_save.bias": "bias",
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("suffix", DIFFERENCES | VALUES)
def test_a_difference_is_added_and_a_value_is_put_in_place(
    suffix: str, shape: tuple[int, ...]
) -> None:
    weight, given = randn(*shape), randn(*shape, seed=1)
    (taken,) = parts_of({slot_of(suffix): given})
    base = weight.double() if suffix in DIFFERENCES else 0.0
    assert taken.part.parameter == (DIFFERENCES | VALUES)[suffix]
    assert_delta(taken.part, weight, base + given.double())
    assert_misfits_are_told(taken.part, shape)


def test_axes_of_length_one_do_not_count() -> None:
    (taken,) = parts_of({"diff": randn(6, 5, 1, 1)})
    assert taken.part.delta(randn(6, 5)).shape == (6, 5)
    assert taken.part.misfit((5, 6))


def test_weight_and_bias_are_two_parts_and_alpha_has_no_meaning() -> None:
    tensors = {"diff": randn(6, 5), "diff_b": randn(6), "alpha": torch.tensor(3.0)}
    found = {taken.part.parameter: taken for taken in parts_of(tensors)}
    assert found.keys() == {"weight", "bias"}
    assert found["weight"].used == {"diff", "alpha"}
    assert_delta(found["weight"].part, torch.zeros(6, 5), tensors["diff"].double())
    assert found["weight"].part.rank is None
