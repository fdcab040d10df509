import torch

from lora.algorithms import LoRA
from tests.adapters import randn


def test_delta_of_a_linear_layer_is_alpha_over_rank_times_up_down() -> None:
    up, down = randn(6, 2, seed=1), randn(2, 5, seed=2)
    part = LoRA(lora_up=up, lora_down=down, alpha=torch.tensor(1.0))
    expected = torch.zeros(6, 5)
    for o in range(6):
        for i in range(5):
            expected[o, i] = 0.5 * sum(up[o, r] * down[r, i] for r in range(2))
    torch.testing.assert_close(part.delta(torch.zeros(6, 5)), expected)


def test_delta_without_alpha_or_with_alpha_zero_has_scaling_one() -> None:
    up, down = randn(6, 2, seed=1), randn(2, 5, seed=2)
    for alpha in (None, torch.tensor(0.0)):
        part = LoRA(lora_up=up, lora_down=down, alpha=alpha)
        torch.testing.assert_close(part.delta(torch.zeros(6, 5)), up @ down)


def test_delta_of_a_convolution_equals_the_two_convolutions_of_the_trainer() -> None:
    up, down, x = randn(6, 2, 1, 1, seed=1), randn(2, 3, 3, 3, seed=2), randn(1, 3, 8, 8, seed=3)
    part = LoRA(lora_up=up, lora_down=down, alpha=torch.tensor(4.0))
    delta = part.delta(torch.zeros(6, 3, 3, 3))
    trained = torch.conv2d(torch.conv2d(x, down, padding=1), up) * (4.0 / 2)
    torch.testing.assert_close(torch.conv2d(x, delta, padding=1), trained)


def test_delta_in_tucker_form_equals_the_three_convolutions_of_the_trainer() -> None:
    up, mid, down = randn(6, 2, 1, 1), randn(2, 2, 3, 3, seed=1), randn(2, 3, 1, 1, seed=2)
    x = randn(1, 3, 8, 8, seed=3)
    part = LoRA(lora_up=up, lora_down=down, lora_mid=mid)
    delta = part.delta(torch.zeros(6, 3, 3, 3))
    trained = torch.conv2d(torch.conv2d(torch.conv2d(x, down), mid, padding=1), up)
    torch.testing.assert_close(torch.conv2d(x, delta, padding=1), trained)


def test_convolution_shaped_factors_fit_a_linear_layer() -> None:
    part = LoRA(lora_up=randn(6, 2, 1, 1), lora_down=randn(2, 5, 1, 1))
    assert part.misfit((6, 5)) is None
    assert part.delta(torch.zeros(6, 5)).shape == (6, 5)


def test_misfit_names_the_shapes() -> None:
    part = LoRA(lora_up=randn(6, 2), lora_down=randn(2, 5))
    assert part.misfit((6, 5)) is None
    for shape in ((6, 4), (7, 5), (6, 5, 3, 3)):
        assert "do not fit the layer" in (part.misfit(shape) or "")
    halves = LoRA(lora_up=randn(6, 3), lora_down=randn(2, 5))
    assert "do not fit together" in (halves.misfit((6, 5)) or "")
