import torch
from torch import Tensor

from lora.formats.algorithms import LoHa
from tests.adapters import randn
from tests.lora.checks import assert_delta, assert_misfits_are_told

LINEAR, CONV = (6, 5), (6, 4, 3, 3)


def flat(inputs: int, **options: Tensor) -> LoHa:
    return LoHa(
        hada_w1_a=randn(6, 2, seed=1),
        hada_w1_b=randn(2, inputs, seed=2),
        hada_w2_a=randn(6, 2, seed=3),
        hada_w2_b=randn(2, inputs, seed=4),
        **options,
    )


def tucker() -> LoHa:
    return LoHa(
        hada_w1_a=randn(2, 6, seed=1),
        hada_w1_b=randn(2, 4, seed=2),
        hada_w2_a=randn(2, 6, seed=3),
        hada_w2_b=randn(2, 4, seed=4),
        hada_t1=randn(2, 2, 3, 3, seed=5),
        hada_t2=randn(2, 2, 3, 3, seed=6),
        alpha=torch.tensor(3.0),
    )


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, one number at a time, in float64."""
    a, b = a.double().flatten(1), b.double().flatten(1)
    rows = [
        [sum(a[o, r] * b[r, i] for r in range(len(b))) for i in range(b.shape[1])]
        for o in range(len(a))
    ]
    return torch.tensor(rows, dtype=torch.float64)


def cored(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """sum over i, j of core[i, j] * a[i, out] * b[j, in], in float64."""
    total = torch.zeros(a.shape[1], b.shape[1], *core.shape[2:], dtype=torch.float64)
    for i in range(len(a)):
        for j in range(len(b)):
            outer = a[i].double()[:, None] * b[j].double()[None]
            total += outer[:, :, None, None] * core[i, j].double()
    return total


def test_delta_is_the_elementwise_product_scaled_once() -> None:
    part, weight = flat(5, alpha=torch.tensor(3.0)), randn(*LINEAR)
    hadamard = product(part.hada_w1_a, part.hada_w1_b) * product(part.hada_w2_a, part.hada_w2_b)
    assert_delta(part, weight, weight.double() + 1.5 * hadamard)
    assert_misfits_are_told(part, LINEAR)


def test_delta_of_a_convolution_is_the_flat_product_in_its_shape() -> None:
    part = flat(36)
    hadamard = product(part.hada_w1_a, part.hada_w1_b) * product(part.hada_w2_a, part.hada_w2_b)
    assert_delta(part, torch.zeros(CONV), hadamard.reshape(CONV))
    assert_misfits_are_told(part, CONV)


def test_four_dimensional_factors_mean_the_same_as_flat_ones() -> None:
    plain = flat(36, alpha=torch.tensor(1.0))
    shaped = LoHa(
        hada_w1_a=plain.hada_w1_a[:, :, None, None],
        hada_w1_b=plain.hada_w1_b.reshape(2, 4, 3, 3),
        hada_w2_a=plain.hada_w2_a[:, :, None, None],
        hada_w2_b=plain.hada_w2_b.reshape(2, 4, 3, 3),
        alpha=plain.alpha,
    )
    assert torch.equal(shaped.delta(torch.zeros(CONV)), plain.delta(torch.zeros(CONV)))
    assert_misfits_are_told(shaped, CONV)


def test_delta_in_tucker_form_has_a_core_for_each_pair() -> None:
    part = tucker()
    assert part.hada_t1 is not None
    assert part.hada_t2 is not None
    first = cored(part.hada_t1, part.hada_w1_a, part.hada_w1_b)
    second = cored(part.hada_t2, part.hada_w2_a, part.hada_w2_b)
    assert_delta(part, torch.zeros(CONV), 1.5 * first * second)
    assert_misfits_are_told(part, CONV)


def test_misfit_of_a_half_tucker_and_of_wrong_shapes() -> None:
    assert "do not fit" in (flat(5).misfit((6, 4)) or "")
    half = flat(5, hada_t1=randn(2, 2, 3, 3))
    assert "only one" in (half.misfit((6, 5, 3, 3)) or "")
