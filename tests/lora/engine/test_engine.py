"""The engine's promise: applied as the formula says, and afterwards bit for bit what it was."""

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora.engine.engine import EngineBusy, LoraEngine, RestoreFailed
from lora.engine.stack import LoraUse, Mode
from lora.formats.adapter import LoraFile, load
from lora.formats.algorithms import LowRank
from lora.formats.algorithms.lora import LoRA
from tests.adapters import (
    CONV_SGM,
    CONVOLUTION,
    CROSS_ATTENTION,
    SELF_ATTENTION,
    SELF_SGM,
    kohya,
    loha,
    randn,
    write,
)
from tests.state import State, unchanged

MODES = (Mode.DYNAMIC, Mode.MERGED)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def parse(
    engine: LoraEngine, folder: Path, tensors: dict[str, Tensor], name: str = "a"
) -> LoraFile:
    path = write(folder / f"{name}.safetensors", tensors)
    return load(path, engine.key_map, sha256=name)


def test_state_sees_hooks_values_wrappers_and_attributes() -> None:
    def with_hook(root: nn.Sequential) -> None:
        root[0].register_forward_hook(lambda *_: None)

    def with_value(root: nn.Sequential) -> None:
        root[0].weight.data[0, 0] += 1e-6

    def with_attribute(root: nn.Sequential) -> None:
        root[0].scale = 1.0

    def with_wrapper(root: nn.Sequential) -> None:
        root[0] = nn.Sequential(root[0])

    def with_other_parameter(root: nn.Sequential) -> None:
        root[0].weight = nn.Parameter(root[0].weight.detach().clone())

    for change in (with_hook, with_value, with_attribute, with_wrapper, with_other_parameter):
        root = nn.Sequential(nn.Linear(2, 2))
        before = State(root)
        before.assert_same(root)
        change(root)
        with pytest.raises((AssertionError, KeyError)):
            before.assert_same(root)


def expected_weight(weight: Tensor, tensors: dict[str, Tensor], stem: str, scale: float) -> Tensor:
    """The formula in float64, not rounded."""
    up, down = (
        tensors[f"{stem}.lora_up.weight"].double(),
        tensors[f"{stem}.lora_down.weight"].double(),
    )
    scaling = float(tensors[f"{stem}.alpha"]) / down.shape[0]
    delta = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    return weight.detach().double() + scale * scaling * delta


def half_an_ulp(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Of the dtype's numbers that lie around each number."""
    exponent = torch.floor(torch.log2(exact.abs().clamp_min(torch.finfo(dtype).tiny)))
    return torch.exp2(exponent) * torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_merged_weights_equal_the_formula_rounded_once(
    engine: LoraEngine, unet: nn.Module, tmp_path: Path, dtype: torch.dtype
) -> None:
    unet.to(dtype)
    tensors = kohya()
    file = parse(engine, tmp_path, tensors)
    expected = {
        SELF_ATTENTION: expected_weight(
            unet.get_submodule(SELF_ATTENTION).weight, tensors, SELF_SGM, 0.7
        ),
        CONVOLUTION: expected_weight(
            unet.get_submodule(CONVOLUTION).weight, tensors, CONV_SGM, 0.7
        ),
    }
    with unchanged(unet), engine.applied([LoraUse(file, 0.7)], Mode.MERGED):
        for path, exact in expected.items():
            error = (unet.get_submodule(path).weight.detach().double() - exact).abs()
            # The sum in float32 goes up to the magnitude of its terms, wherever it ends.
            allowed = half_an_ulp(exact, dtype) + 1e-5 * exact.abs() + 1e-6
            assert bool((error <= allowed).all())


@pytest.mark.parametrize("path", [SELF_ATTENTION, CROSS_ATTENTION, CONVOLUTION])
def test_dynamic_output_equals_the_merged_output(
    engine: LoraEngine, unet: nn.Module, tmp_path: Path, path: str
) -> None:
    stack = [
        LoraUse(parse(engine, tmp_path, kohya(seed=0), "a"), 0.8),
        LoraUse(parse(engine, tmp_path, kohya(seed=10, rank=2, alpha=None), "b"), -0.3),
    ]
    module = unet.get_submodule(path)
    x = randn(2, 7, module.in_features) if isinstance(module, nn.Linear) else randn(2, 32, 8, 8)
    outputs = {}
    for mode in MODES:
        with torch.no_grad(), unchanged(unet), engine.applied(stack, mode):
            outputs[mode] = module(x)
    plain = module(x)
    torch.testing.assert_close(outputs[Mode.DYNAMIC], outputs[Mode.MERGED], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(outputs[Mode.DYNAMIC], plain, atol=0.1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tensors", [kohya(), loha()], ids=["lora", "loha"])
def test_restored_exactly_after_a_normal_exit_and_after_an_error(
    engine: LoraEngine,
    unet: nn.Module,
    tmp_path: Path,
    mode: Mode,
    dtype: torch.dtype,
    tensors: dict[str, Tensor],
) -> None:
    unet.to(dtype)
    stack = [LoraUse(parse(engine, tmp_path, tensors), 3.0)]
    before = State(unet)
    with engine.applied(stack, mode), pytest.raises(AssertionError):
        before.assert_same(unet)
    before.assert_same(unet)
    with unchanged(unet), pytest.raises(KeyError), engine.applied(stack, mode):
        raise KeyError("the body failed")


@pytest.mark.parametrize("mode", MODES)
def test_restored_exactly_when_applying_fails_midway(
    engine: LoraEngine, unet: nn.Module, tmp_path: Path, mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = parse(engine, tmp_path, kohya())
    last, low_rank, calls = file.layers[-1].algorithm, LoRA.low_rank, 0

    def failing(self: LoRA) -> LowRank | None:
        nonlocal calls
        calls += 1
        if self is last:
            raise MemoryError
        return low_rank(self)

    monkeypatch.setattr(LoRA, "low_rank", failing)
    with unchanged(unet), pytest.raises(MemoryError), engine.applied([LoraUse(file)], mode):
        pytest.fail("the block must not be entered")
    assert calls > 1  # others were applied before


def test_two_adapters_on_one_layer_add_up_and_are_restored(
    engine: LoraEngine, unet: nn.Module, tmp_path: Path
) -> None:
    a, b = kohya(seed=0), loha(seed=5)
    stack = [
        LoraUse(parse(engine, tmp_path, a, "a"), 1.0),
        LoraUse(parse(engine, tmp_path, b, "b"), 2.0),
    ]
    module = unet.get_submodule(SELF_ATTENTION)
    stem = "lycoris_" + SELF_ATTENTION.replace(".", "_")
    hadamard = (b[f"{stem}.hada_w1_a"] @ b[f"{stem}.hada_w1_b"]) * (
        b[f"{stem}.hada_w2_a"] @ b[f"{stem}.hada_w2_b"]
    )
    first = expected_weight(module.weight, a, SELF_SGM, 1.0).float()
    expected = first + 2.0 * 0.5 * hadamard
    x = randn(3, 64)
    for mode in MODES:
        with torch.no_grad(), unchanged(unet), engine.applied(stack, mode):
            torch.testing.assert_close(
                module(x), nn.functional.linear(x, expected), rtol=1e-4, atol=1e-3
            )


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("adapted", [("first",), ("second",), ("first", "second")])
def test_tied_modules_are_changed_each_by_its_own_part_in_both_modes(
    tmp_path: Path, adapted: tuple[str, ...], mode: Mode
) -> None:
    root = Tied()
    engine = LoraEngine({"unet": root})
    shapes = {"lora_A": (1, 4), "lora_B": (4, 1)}
    tensors = {
        f"unet.{name}.{slot}.weight": randn(*shape, seed=len(name + slot))
        for name in adapted
        for slot, shape in shapes.items()
    }
    file, x = parse(engine, tmp_path, tensors), randn(3, 4, seed=9)
    with torch.no_grad(), unchanged(root), engine.applied([LoraUse(file, 0.5)], mode):
        for name in ("first", "second"):
            expected = root.first.weight
            if name in adapted:
                a, b = (tensors[f"unet.{name}.{slot}.weight"] for slot in shapes)
                expected = expected + 0.5 * b @ a
            torch.testing.assert_close(root.get_submodule(name)(x), x @ expected.t())


def test_an_instance_forward_that_was_there_before_is_put_back(
    engine: LoraEngine, unet: nn.Module, tmp_path: Path
) -> None:
    module = unet.get_submodule(SELF_ATTENTION)
    seen = []

    def hooked(x: Tensor) -> Tensor:
        seen.append(x.shape)
        return nn.functional.linear(x, module.weight, module.bias)

    module.__dict__["forward"] = hooked
    file = parse(engine, tmp_path, kohya())
    with engine.applied([LoraUse(file)], Mode.DYNAMIC), torch.no_grad():
        module(randn(3, 64))
    assert module.__dict__["forward"] is hooked
    assert seen == [(3, 64)]


def test_scale_zero_touches_nothing(engine: LoraEngine, unet: nn.Module, tmp_path: Path) -> None:
    file = parse(engine, tmp_path, kohya())
    for mode in MODES:
        with unchanged(unet), engine.applied([LoraUse(file, 0.0)], mode):
            assert not any("forward" in m.__dict__ for m in unet.modules())


def test_a_second_block_is_refused_and_harms_nothing(
    engine: LoraEngine, unet: nn.Module, tmp_path: Path
) -> None:
    file = parse(engine, tmp_path, kohya())
    errors: list[Exception] = []

    def enter() -> None:
        try:
            with engine.applied([LoraUse(file)]):
                pass
        except EngineBusy as error:
            errors.append(error)

    with unchanged(unet), engine.applied([LoraUse(file)]):
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
    assert len(errors) == 1
    with engine.applied([LoraUse(file)]):
        assert sum("forward" in module.__dict__ for module in unet.modules()) == 3


@pytest.mark.parametrize("options", [{"padding_mode": "circular"}, {"groups": 2}, {"stride": 2}])
@pytest.mark.parametrize("mode", MODES)
def test_convolutions_of_every_kind_equal_the_merged_weight(
    tmp_path: Path, options: dict[str, Any], mode: Mode
) -> None:
    root = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, **options))
    engine = LoraEngine({"unet": root})
    down, up = randn(2, 4 // root[0].groups, 3, 3, seed=1), randn(6, 2, 1, 1, seed=2)
    file = parse(engine, tmp_path, {"unet.0.lora_A.weight": down, "unet.0.lora_B.weight": up})
    weight = root[0].weight.detach() + (up.flatten(1) @ down.flatten(1)).reshape(
        root[0].weight.shape
    )
    expected = copy.deepcopy(root)
    expected[0].weight.data = weight
    x = randn(2, 4, 8, 8, seed=3)
    with torch.no_grad(), unchanged(root), engine.applied([LoraUse(file)], mode):
        torch.testing.assert_close(root(x), expected(x), rtol=1e-4, atol=1e-4)


def test_a_weight_that_cannot_be_put_back_is_told_and_the_others_are(
    engine: LoraEngine, unet: nn.Module, tmp_path: Path
) -> None:
    file = parse(engine, tmp_path, kohya())
    other = unet.get_submodule(CONVOLUTION).weight
    before = other.detach().clone()
    with pytest.raises(RestoreFailed) as caught, engine.applied([LoraUse(file)], Mode.MERGED):
        weight = unet.get_submodule(SELF_ATTENTION).weight
        weight.data = torch.zeros(3, 3)  # stands for a device that fails: the copy back cannot work
    assert "1 weights could not be restored" in str(caught.value)
    assert torch.equal(other, before)
