import torch

from lora.algorithms import LoHa
from tests.adapters import randn


def make(**options: torch.Tensor) -> LoHa:
    return LoHa(
        hada_w1_a=randn(6, 2, seed=1),
        hada_w1_b=randn(2, 5, seed=2),
        hada_w2_a=randn(6, 2, seed=3),
        hada_w2_b=randn(2, 5, seed=4),
        **options,
    )


def test_delta_is_the_elementwise_product_scaled_once() -> None:
    part = make(alpha=torch.tensor(3.0))
    expected = torch.zeros(6, 5)
    for o in range(6):
        for i in range(5):
            first = sum(part.hada_w1_a[o, r] * part.hada_w1_b[r, i] for r in range(2))
            second = sum(part.hada_w2_a[o, r] * part.hada_w2_b[r, i] for r in range(2))
            expected[o, i] = 1.5 * first * second
    torch.testing.assert_close(part.delta(torch.zeros(6, 5)), expected)


def test_delta_equals_what_peft_computes() -> None:
    from peft import LoHaConfig, inject_adapter_in_model

    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(5, 6, bias=False))
    config = LoHaConfig(r=2, alpha=3, target_modules=["0"], init_weights=False)
    wrapped = inject_adapter_in_model(config, layer)[0]
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    tensors = {name: getattr(wrapped, name)["default"].detach() for name in names}
    part = LoHa(**tensors, alpha=torch.tensor(3.0))
    x = randn(4, 5)
    ours = x @ (wrapped.base_layer.weight + part.delta(wrapped.base_layer.weight)).T
    torch.testing.assert_close(ours, wrapped(x))


def test_misfit_of_a_half_tucker_and_of_wrong_shapes() -> None:
    assert make().misfit((6, 5)) is None
    assert "do not fit" in (make().misfit((6, 4)) or "")
    assert "only one" in (make(hada_t1=randn(2, 2, 3, 3)).misfit((6, 5, 3, 3)) or "")
