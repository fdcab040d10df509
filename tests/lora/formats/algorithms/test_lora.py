import json
import math

import pytest
import torch
from torch import Tensor

from lora.formats.algorithms import LoRA
from lora.formats.algorithms.lora import LoRABias
from lora.formats.alphas import Alphas
from tests.adapters import randn
from tests.lora.checks import assert_delta, assert_misfits_are_told, parts_of, relative_error

LINEAR, CONV = (6, 5), (6, 3, 3, 3)


def matrices(up: Tensor, down: Tensor, mid: Tensor | None = None) -> Tensor:
    """up @ down in float64, one number at a time; with `mid`, the three convolutions' kernel."""
    up, down = up.double().flatten(1), down.double()
    if mid is None:
        total = torch.zeros(up.shape[0], *down.shape[1:], dtype=torch.float64)
        for o in range(up.shape[0]):
            for r in range(up.shape[1]):
                total[o] += up[o, r] * down[r]
        return total
    total = torch.zeros(up.shape[0], down.shape[1], *mid.shape[2:], dtype=torch.float64)
    for o in range(up.shape[0]):
        for i in range(down.shape[1]):
            for m in range(up.shape[1]):
                for n in range(down.shape[0]):
                    total[o, i] += up[o, m] * mid.double()[m, n] * down.flatten(1)[n, i]
    return total


@pytest.mark.parametrize(
    ("alpha", "scaling"), [(None, 1.0), (0.0, 1.0), (1.0, 0.5), (4.0, 2.0), (-2.0, -1.0)]
)
@pytest.mark.parametrize("shape", [LINEAR, CONV], ids=["linear", "conv"])
def test_delta_is_alpha_over_rank_times_up_down(
    alpha: float | None, scaling: float, shape: tuple[int, ...]
) -> None:
    up, down = randn(6, 2, *shape[2:3] and (1, 1), seed=1), randn(2, *shape[1:], seed=2)
    part = LoRA(up, down, alpha=None if alpha is None else torch.tensor(alpha))
    weight = randn(*shape)
    assert_delta(part, weight, weight.double() + scaling * matrices(up, down))


def test_delta_of_a_convolution_equals_the_two_convolutions_of_the_trainer() -> None:
    up, down, x = randn(6, 2, 1, 1, seed=1), randn(2, 3, 3, 3, seed=2), randn(1, 3, 8, 8, seed=3)
    part = LoRA(lora_up=up, lora_down=down, alpha=torch.tensor(4.0))
    delta = part.delta(torch.zeros(CONV))
    trained = torch.conv2d(torch.conv2d(x, down, padding=1), up) * (4.0 / 2)
    torch.testing.assert_close(torch.conv2d(x, delta, padding=1), trained)


def test_delta_in_tucker_form_equals_the_three_convolutions_of_the_trainer() -> None:
    up, mid, down = randn(6, 2, 1, 1), randn(2, 2, 3, 3, seed=1), randn(2, 3, 1, 1, seed=2)
    x, weight = randn(1, 3, 8, 8, seed=3), torch.zeros(CONV)
    part = LoRA(lora_up=up, lora_down=down, lora_mid=mid)
    assert_delta(part, weight, matrices(up, down, mid))
    trained = torch.conv2d(torch.conv2d(torch.conv2d(x, down), mid, padding=1), up)
    torch.testing.assert_close(torch.conv2d(x, part.delta(weight), padding=1), trained)


def test_convolution_shaped_factors_fit_a_linear_layer_and_flat_ones_a_convolution_of_1x1() -> None:
    up, down = randn(6, 2, seed=1), randn(2, 5, seed=2)
    shaped = LoRA(lora_up=up[:, :, None, None], lora_down=down[:, :, None, None])
    assert_delta(shaped, torch.zeros(6, 5), matrices(up, down))
    flat = LoRA(lora_up=up, lora_down=down)
    assert_delta(flat, torch.zeros(6, 5, 1, 1), matrices(up, down)[:, :, None, None])


def test_rs_lora_of_lycoris_is_plain_alpha_over_rank() -> None:
    up, down = randn(6, 4, seed=1), randn(4, 5, seed=2)
    stored = torch.tensor(
        3.0 * math.sqrt(4)
    )  # LyCORIS: scale = alpha / sqrt(r), stored alpha * sqrt(r)
    expected = 3.0 / math.sqrt(4) * matrices(up, down)
    assert_delta(LoRA(up, down, alpha=stored), torch.zeros(6, 5), expected)


def test_rs_lora_of_peft_is_known_from_its_config() -> None:
    config = {"r": 4, "lora_alpha": 3, "use_rslora": True, "alpha_pattern": {"other": 9}}
    slots = {"lora_up": randn(6, 4, seed=1), "lora_down": randn(4, 5, seed=2)}
    Alphas.of({}, json.dumps(config)).complete(slots, "unet", "base_model.model.layer")
    (taken,) = parts_of(slots)
    expected = 3.0 / math.sqrt(4) * matrices(slots["lora_up"], slots["lora_down"])
    assert_delta(taken.part, torch.zeros(6, 5), expected)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int64])
def test_sparse_rest_is_added_and_scaled_with_the_product(dtype: torch.dtype) -> None:
    up, down = randn(6, 2, 1, 1, seed=1), randn(2, 3, 3, 3, seed=2)
    indices = torch.tensor([[0, 5, 5, 2], [26, 0, 7, 13]], dtype=dtype)
    values = randn(4, seed=3)
    size = torch.tensor([6, 27], dtype=dtype)
    part = LoRA(up, down, None, indices, values, size, torch.tensor(1.0))
    total = matrices(up, down).reshape(6, 27)
    for row, column, value in zip(*indices.tolist(), values.double(), strict=True):
        total[row, column] += value
    assert_delta(part, torch.zeros(CONV), 0.5 * total.reshape(CONV))
    assert part.low_rank() is None
    assert_misfits_are_told(part, CONV)


def test_sparse_indices_out_of_the_layer_are_told() -> None:
    for column in (27, -1):
        indices = torch.tensor([[0], [column]])
        part = LoRA(randn(6, 2), randn(2, 3, 3, 3), None, indices, randn(1), None, None)
        assert "outside" in (part.misfit(CONV) or "")
    half = LoRA(randn(6, 2), randn(2, 3, 3, 3), None, None, randn(1), None, None)
    assert "only one" in (half.misfit(CONV) or "")


def test_the_bias_of_lora_b_goes_to_the_bias_with_the_same_scaling() -> None:
    slots = {"lora_up": randn(6, 4), "lora_down": randn(4, 5), "lora_up_bias": randn(6, seed=3)}
    found = list(parts_of({**slots, "alpha": torch.tensor(2.0)}))
    by_parameter = {taken.part.parameter: taken.part for taken in found}
    assert by_parameter.keys() == {"weight", "bias"}
    assert set().union(*(taken.used for taken in found)) == {*slots, "alpha"}
    bias = randn(6, seed=4)
    expected = bias.double() + 0.5 * slots["lora_up_bias"].double()
    assert_delta(by_parameter["bias"], bias, expected)
    assert isinstance(by_parameter["bias"], LoRABias)
    assert by_parameter["bias"].misfit((7,))


SHAPED = pytest.mark.parametrize(
    ("part", "shape"),
    [
        (LoRA(randn(6, 2, seed=1), randn(2, 5, seed=2), alpha=torch.tensor(3.0)), LINEAR),
        (LoRA(randn(6, 2, 1, 1, seed=1), randn(2, 5, 1, 1, seed=2)), LINEAR),
        (LoRA(randn(6, 2, 1, 1, seed=1), randn(2, 3, 3, 3, seed=2)), CONV),
        (LoRA(randn(6, 2, 1, 1), randn(2, 3, 1, 1, seed=2), randn(2, 2, 3, 3, seed=1)), CONV),
    ],
    ids=["linear", "1x1 on linear", "conv", "tucker"],
)


@SHAPED
def test_low_rank_is_the_same_change(part: LoRA, shape: tuple[int, ...]) -> None:
    factors = part.low_rank()
    assert factors is not None
    assert part.is_low_rank
    product = factors.up.double() @ factors.down.double().flatten(1)
    delta = part.delta(torch.zeros(shape))
    assert relative_error(delta.flatten(1), factors.scaling * product) < 1e-6


@SHAPED
def test_misfits_are_told(part: LoRA, shape: tuple[int, ...]) -> None:
    assert_misfits_are_told(part, shape)


def test_misfit_names_the_shapes() -> None:
    part = LoRA(lora_up=randn(6, 2), lora_down=randn(2, 5))
    for shape in ((6, 4), (7, 5), (6, 5, 3, 3)):
        assert "do not fit the layer" in (part.misfit(shape) or "")
    vector = LoRA(lora_up=randn(6, 2), lora_down=randn(2))
    assert "do not fit" in (vector.misfit((6,)) or "")
    halves = LoRA(lora_up=randn(6, 3), lora_down=randn(2, 5))
    assert "do not fit together" in (halves.misfit((6, 5)) or "")
