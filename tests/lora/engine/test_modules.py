"""Layers that are packed, offloaded, transposed or otherwise unlike others; scales, ranges and modes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from lora.engine.engine import LoraEngine
from lora.engine.modules import compute_place, linear_shape, takes_low_rank, targets_of, writable
from lora.engine.stack import LoraUse, Mode
from lora.errors import LoraIncompatible, LoraUnsupported
from lora.formats.names.keys import KeyMap
from tests.adapters import randn
from tests.lora.small import MODES, adapter, as_fresh, bind, outputs, same, small
from tests.state import unchanged

EVERY_MODE = pytest.mark.parametrize("mode", MODES)


# --- weights that cannot be written -----------------------------------------------------------------


class PackedParameter(nn.Linear):
    """As bitsandbytes and torchao's older layers do it: int8 rows and a scale for each."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features)
        largest = plain.weight.detach().abs().amax(1, keepdim=True)
        self.register_buffer("scale", largest / 127)
        packed = (plain.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = plain.bias

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


class PackedBuffer(nn.Module):
    """As GGUF and AWQ layers do it: no nn.Linear, and no parameter called weight."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.register_buffer("qweight", plain.weight.detach().to(torch.float16).view(torch.uint8))
        self.bias = plain.bias

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.qweight.view(torch.float16).to(x.dtype), self.bias)


class ScaledTensor(Tensor):
    """As torchao does it: a tensor of a class of its own, which unpacks itself where it is multiplied."""

    packed: Tensor

    @staticmethod
    def __new__(cls, packed: Tensor) -> ScaledTensor:
        return Tensor._make_wrapper_subclass(cls, packed.shape, dtype=torch.float32)

    def __init__(self, packed: Tensor) -> None:
        self.packed = packed

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is functional.linear:
            x, weight, bias = args
            return functional.linear(x, weight.packed.to(x.dtype), bias)
        return super().__torch_function__(function, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].packed)
        raise NotImplementedError(f"a packed tensor has no {function}")


def subclassed(plain: nn.Linear) -> nn.Linear:
    layer = nn.Linear(plain.in_features, plain.out_features)
    layer.weight = nn.Parameter(ScaledTensor(plain.weight.detach().half()), requires_grad=False)
    layer.bias = plain.bias
    return layer


PACKINGS: tuple[Callable[[nn.Linear], nn.Module], ...] = (PackedParameter, PackedBuffer, subclassed)


@pytest.fixture(params=PACKINGS, ids=lambda packing: packing.__name__)
def packed(request: pytest.FixtureRequest) -> nn.Module:
    root = small()
    root.linear = request.param(root.linear)
    return root


@EVERY_MODE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_layer_takes_a_lora_beside_itself(
    packed: nn.Module, mode: Mode, dtype: torch.dtype
) -> None:
    engine, stack = LoraEngine({"unet": packed}), [LoraUse(adapter("lora"), 0.5)]
    assert writable(packed.linear, "weight") is None
    assert takes_low_rank(packed.linear)
    x = randn(5, 12).to(dtype)
    part = next(layer.algorithm for layer in stack[0].lora.layers if layer.target.path == "linear")
    change = functional.linear(x.float(), part.delta(torch.zeros(8, 12))) * 0.5
    packed.linear.bias.data = packed.linear.bias.data.to(dtype)
    with torch.no_grad():
        expected = packed.linear(x).float() + change
    packing = vars(packed.linear)["_parameters"].get("weight")
    with torch.no_grad(), engine.applied(stack, mode) as block:
        result = packed.linear(x)
        assert len(block.warnings) == (mode is Mode.MERGED)
        assert all("1 layers are quantised or offloaded" in text for text in block.warnings)
    assert result.dtype is dtype
    tolerance = 1e-5 if dtype is torch.float32 else 0.05
    torch.testing.assert_close(result.float(), expected, rtol=tolerance, atol=tolerance)
    assert vars(packed.linear)["_parameters"].get("weight") is packing
    assert "forward" not in vars(packed.linear)


@EVERY_MODE
@pytest.mark.parametrize("name", ["loha", "dora", "sparse", "glora"])
def test_a_packed_layer_refuses_what_needs_its_weight(
    packed: nn.Module, mode: Mode, name: str
) -> None:
    engine, before = LoraEngine({"unet": packed}), outputs(packed)
    stack = [LoraUse(adapter("full", seed=3)), LoraUse(adapter(name))]
    plain = [LoraUse(adapter("norms")), LoraUse(adapter(name))]
    for refused in (stack, plain):
        with pytest.raises(LoraUnsupported) as caught, engine.applied(refused, mode):
            pytest.fail("the block must not be entered")
        assert "unet.linear is quantised or offloaded" in str(caught.value)
        assert same(before, outputs(packed))
        assert not any("forward" in vars(module) for module in packed.modules())


@EVERY_MODE
def test_a_packed_layers_bias_is_merged(packed: nn.Module, mode: Mode) -> None:
    engine, before = LoraEngine({"unet": packed}), outputs(packed)
    with engine.applied([LoraUse(adapter("lora_bias"))], mode):
        after = outputs(packed)
    part = next(p.algorithm for p in adapter("lora_bias").layers if p.parameter == "bias")
    with engine.applied([LoraUse(adapter("lora"))], mode):
        pass
    assert same(before, outputs(packed))
    assert not same(before, after)
    assert part.delta(packed.linear.bias).shape == (8,)


@EVERY_MODE
def test_an_offloaded_layer_takes_a_lora_and_refuses_a_loha(mode: Mode) -> None:
    root, stack = small(), [LoraUse(adapter("lora"), 0.5), LoraUse(adapter("locon"))]
    engine = LoraEngine({"unet": root})
    expected, plain = as_fresh(small(), stack, mode), outputs(root)
    cpu_offload(root, execution_device=torch.device("cpu"))
    hooked = {name: vars(module)["forward"] for name, module in root.named_children()}
    with engine.applied(stack, mode) as block:
        torch.testing.assert_close(outputs(root), expected, rtol=1e-4, atol=1e-4)
        assert bool(block.warnings) == (mode is Mode.MERGED)
    with pytest.raises(LoraUnsupported), engine.applied([LoraUse(adapter("loha"))], mode):
        pytest.fail("the block must not be entered")
    assert same(outputs(root), plain)
    assert {name: vars(module)["forward"] for name, module in root.named_children()} == hooked
    assert all(parameter.is_meta for parameter in root.parameters())


@EVERY_MODE
def test_a_model_that_a_hook_moves_as_a_whole(mode: Mode) -> None:
    root, stack = small(), [LoraUse(adapter("lora")), LoraUse(adapter("loha"))]
    expected = as_fresh(root, stack, mode)
    engine = LoraEngine({"unet": root})
    _, hook = cpu_offload_with_hook(root, execution_device=torch.device("cpu"))
    with unchanged(root), engine.applied(stack, mode):
        torch.testing.assert_close(outputs(root), expected)
        hook.offload()
        torch.testing.assert_close(outputs(root), expected)


def test_what_the_engine_knows_of_a_module() -> None:
    conv, grouped = nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3, groups=2)
    circular, norm = nn.Conv2d(4, 6, 3, padding_mode="circular"), nn.LayerNorm(3)
    assert linear_shape(nn.Linear(3, 2)) == (2, 3)
    assert linear_shape(Conv1D(2, 3)) == (2, 3)
    assert [linear_shape(m) for m in (conv, norm, nn.Embedding(3, 2), nn.Bilinear(2, 3, 4))] == [
        None
    ] * 4
    assert [takes_low_rank(m) for m in (conv, grouped, circular, norm)] == [
        True,
        False,
        False,
        False,
    ]
    assert targets_of({"unet": nn.Sequential(Conv1D(2, 3), nn.ReLU())}) == {
        "unet": {"0": {"weight": (2, 3), "bias": (2,)}}
    }
    with torch.device("meta"):
        assert writable(nn.Linear(2, 2), "weight") is None
        assert compute_place(nn.Linear(2, 2)) == (torch.device("cpu"), torch.float32)
    assert compute_place(conv.to(torch.bfloat16)) == (torch.device("cpu"), torch.bfloat16)
    assert compute_place(nn.ReLU()) == (torch.device("cpu"), torch.float32)
    assert writable(conv, "no such") is None


# --- layers of other kinds --------------------------------------------------------------------------


def merged_copy(layer: nn.Module, delta: Tensor) -> nn.Module:
    twin = copy.deepcopy(layer)
    twin.weight.data += delta.reshape(twin.weight.shape)
    return twin


@EVERY_MODE
def test_transformers_conv1d_stores_its_weight_transposed(mode: Mode) -> None:
    layer = Conv1D(6, 4)
    nn.init.normal_(layer.weight)
    root = nn.Sequential(layer)
    engine = LoraEngine({"unet": root})
    down, up = randn(2, 4, seed=1), randn(6, 2, seed=2)
    diff, x = randn(6, 4, seed=4), randn(3, 5, 4, seed=3)
    lora = bind({"unet.0.lora_A.weight": down, "unet.0.lora_B.weight": up}, engine.key_map)
    full = bind({"unet.0.diff": diff}, engine.key_map)
    for stack, delta in (
        ([LoraUse(lora, 0.5)], 0.5 * up @ down),
        ([LoraUse(lora), LoraUse(full)], up @ down + diff),
    ):
        expected = merged_copy(layer, delta.t())
        with torch.no_grad(), unchanged(root), engine.applied(stack, mode):
            torch.testing.assert_close(root(x), expected(x), rtol=1e-5, atol=1e-5)


CONVOLUTIONS = (
    {"padding": 1},
    {"groups": 2},
    {"groups": 4, "padding_mode": "circular", "padding": 2},
    {"padding_mode": "reflect", "padding": 1},
    {"stride": 2, "padding": 1},
    {"dilation": 2, "padding": "same"},
    {"stride": (2, 1), "padding": (1, 0), "bias": False},
)


@EVERY_MODE
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=repr)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_convolutions_of_every_kind(
    options: dict[str, Any], mode: Mode, layout: torch.memory_format
) -> None:
    layer = nn.Conv2d(4, 8, 3, **options).to(memory_format=layout)
    root = nn.Sequential(layer)
    engine = LoraEngine({"unet": root})
    inputs = 4 // layer.groups
    down, up = randn(2, inputs, 3, 3, seed=1), randn(8, 2, 1, 1, seed=2)
    file = bind({"unet.0.lora_A.weight": down, "unet.0.lora_B.weight": up}, engine.key_map)
    expected = merged_copy(layer, 0.5 * (up.flatten(1) @ down.flatten(1)))
    for x in (randn(2, 4, 9, 8), randn(4, 9, 8), randn(2, 4, 9, 8).to(memory_format=layout)):
        with torch.no_grad(), unchanged(root), engine.applied([LoraUse(file, 0.5)], mode):
            torch.testing.assert_close(root(x), expected(x), rtol=1e-4, atol=1e-4)


INPUTS = {
    "vector": randn(12),
    "matrix": randn(4, 12),
    "images": randn(2, 3, 4, 12),
    "nothing": randn(0, 12),
    "transposed": randn(5, 2, 12).transpose(0, 1),
    "expanded": randn(1, 3, 12).expand(4, 3, 12),
    "sliced": randn(4, 3, 24)[..., ::2],
}


@EVERY_MODE
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("x", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("count", [1, 2])
def test_linear_layers_take_every_form_of_input(
    x: Tensor, bias: bool, mode: Mode, count: int
) -> None:
    root = small()
    if not bias:
        root.linear.bias = None
    stack = [LoraUse(adapter("lora", seed), 0.5) for seed in range(count)]
    delta = sum(
        0.5 * layer.algorithm.delta(root.linear.weight.detach())
        for use in stack
        for layer in use.lora.layers
        if layer.target.path == "linear"
    )
    expected = merged_copy(root.linear, delta)
    with torch.no_grad(), LoraEngine({"unet": root}).applied(stack, mode):
        torch.testing.assert_close(root.linear(x), expected(x), rtol=1e-4, atol=1e-4)


@EVERY_MODE
def test_the_input_is_not_changed_and_gradients_still_flow(mode: Mode) -> None:
    root, x = small(), randn(3, 12).requires_grad_()
    before = x.detach().clone()
    with LoraEngine({"unet": root}).applied([LoraUse(adapter("lora"))], mode):
        root.linear(x).sum().backward()
    assert torch.equal(x, before)
    assert x.grad is not None


@EVERY_MODE
def test_a_stack_made_in_inference_mode_serves_outside_of_it(mode: Mode) -> None:
    root, stack = small(), [LoraUse(adapter("lora")), LoraUse(adapter("loha"))]
    engine, expected = LoraEngine({"unet": root}), as_fresh(small(), stack, mode)
    with unchanged(root):
        with torch.inference_mode(), engine.applied(stack, mode):
            torch.testing.assert_close(outputs(root), expected)
        for _ in range(2):
            with engine.applied(stack, mode):
                torch.testing.assert_close(outputs(root), expected)
                root.linear(randn(3, 12)).sum().backward()
            root.zero_grad(set_to_none=True)


# --- overflow ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mode"),
    [*product(("full", "loha", "set_weight"), MODES), ("lora", Mode.MERGED)],
)
@pytest.mark.parametrize("scale", [1e6, -1e6, 1e30, 3e38])
def test_a_merge_that_overflows_is_refused_by_the_layers_name(
    name: str, mode: Mode, scale: float
) -> None:
    root = small(torch.float16)
    engine = LoraEngine({"unet": root})
    stack = [LoraUse(adapter("norms")), LoraUse(adapter(name), scale)]
    first = adapter(name).layers[0].target.path
    with unchanged(root):
        with pytest.raises(LoraIncompatible) as caught, engine.applied(stack, mode):
            pytest.fail("the block must not be entered")
        assert f"the weight of unet.{first} overflows float16" in str(caught.value)
        with engine.applied(stack[:1], mode) as block:
            with pytest.raises(LoraIncompatible):
                block.switch(stack)
            assert same(outputs(root), outputs(small(torch.float16)))


def test_what_fits_a_wider_precision_is_no_overflow() -> None:
    stack = [LoraUse(adapter("full"), 1e6)]
    for dtype in (torch.bfloat16, torch.float32):
        with LoraEngine({"unet": small(dtype)}).applied(stack, Mode.MERGED):
            pass
    root = small(torch.float16)
    root.linear.weight.data.fill_(0)
    engine = LoraEngine({"unet": root})
    largest = bind({"unet.linear.diff": torch.full((8, 12), 65519.0)}, engine.key_map)
    with unchanged(root), engine.applied([LoraUse(largest)], Mode.MERGED):
        assert root.linear.weight.unique().tolist() == [65504.0]  # it rounds down to the largest


@EVERY_MODE
def test_merging_keeps_every_address(mode: Mode) -> None:
    root = small(torch.bfloat16)
    pointers = [p.data_ptr() for p in root.parameters()]
    with LoraEngine({"unet": root}).applied([LoraUse(adapter("full"))], mode) as block:
        assert [p.data_ptr() for p in root.parameters()] == pointers
        block.switch([LoraUse(adapter("lora")), LoraUse(adapter("locon"))])
        assert [p.data_ptr() for p in root.parameters()] == pointers
    assert [p.data_ptr() for p in root.parameters()] == pointers


# --- choosing, scaling, and when --------------------------------------------------------------------


def test_auto_is_resolved_when_it_is_applied() -> None:
    root = small()
    engine = LoraEngine({"unet": root})
    with engine.applied([LoraUse(adapter("lora"))], Mode.AUTO, steps=1) as block:
        assert block.mode is Mode.DYNAMIC
        block.switch([LoraUse(adapter("lora"), start=0.5)], Mode.AUTO, steps=50)
        assert block.mode is Mode.DYNAMIC
    with engine.applied([], Mode.AUTO, steps=50) as block:
        assert block.warnings == ()


def changes(root: nn.Module, base: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value - base[name] for name, value in outputs(root).items()}


class Two(nn.Module):
    """A component's tree whose layers carry the names of a UNet's blocks."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for index, name in enumerate(names):
            parent: nn.Module = self
            *folders, leaf = name.split(".")
            for folder in folders:
                if folder not in parent._modules:
                    parent.add_module(folder, nn.Module())
                parent = parent._modules[folder]
            parent.add_module(leaf, nn.Linear(4, 4, bias=False))
            parent._modules[leaf].weight.data = randn(4, 4, seed=index)


TO_Q = "attentions.0.transformer_blocks.0.attn1.to_q"
LAYERS = {
    f"down_blocks.1.{TO_Q}": "IN04",
    f"mid_block.{TO_Q}": "MID",
    f"up_blocks.0.{TO_Q}": "OUT00",
    "time_proj": "BASE",
}


def unet_and_text_encoder() -> dict[str, nn.Module]:
    resnets = [f"down_blocks.{i}.resnets.{j}.conv1" for i in range(2) for j in range(2)]
    return {"unet": Two(*LAYERS, *resnets), "text_encoder": Two("layers.0.self_attn.q_proj")}


def identity_lora(key_map: KeyMap, *, whole: bool) -> Any:
    """Adds the identity to each layer, as factors or as a difference."""
    names = [f"unet.{layer}" for layer in LAYERS] + ["text_encoder.layers.0.self_attn.q_proj"]
    tensors = {}
    for name in names:
        if whole:
            tensors[f"{name}.diff"] = torch.eye(4)
        else:
            tensors |= {
                f"{name}.lora_A.weight": torch.eye(4),
                f"{name}.lora_B.weight": torch.eye(4),
            }
    return bind(tensors, key_map)


def factors_now(roots: dict[str, nn.Module]) -> dict[str, float]:
    """How strongly the identity is added to each layer now."""
    found, one = {}, torch.eye(4)
    for component, root in roots.items():
        for path, module in root.named_modules():
            if isinstance(module, nn.Linear) and "resnets" not in path:
                plain = unet_and_text_encoder()[component].get_submodule(path).weight
                with torch.no_grad():
                    added = module(one) - one @ plain.t()
                found[LAYERS.get(path, "TE") if component == "unet" else "TE"] = round(
                    float(added.diagonal().mean()), 4
                )
    return found


@EVERY_MODE
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (2, 2, 2, 2, 2)),
        ({"components": {"unet": 0.5}}, (1, 1, 1, 1, 2)),
        ({"components": {"text_encoder": 0.0}}, (2, 2, 2, 2, 0)),
        ({"blocks": {"IN04": 0.0, "MID": -1.0}}, (0, -2, 2, 2, 2)),
        ({"blocks": {"BASE": 0.5}}, (2, 2, 2, 1, 1)),
        ({"components": {"unet": 0.5}, "blocks": {"OUT00": 3.0}}, (1, 1, 3, 1, 2)),
    ],
)
def test_scales_per_component_and_per_block(
    options: dict[str, Any], expected: tuple[float, ...], mode: Mode, whole: bool
) -> None:
    roots = unet_and_text_encoder()
    engine = LoraEngine(roots)
    file = identity_lora(engine.key_map, whole=whole)
    with engine.applied([LoraUse(file, 2.0, **options)], mode) as block:
        assert factors_now(roots) == dict(zip([*LAYERS.values(), "TE"], expected, strict=True))
        block.switch([LoraUse(file, 1.0)])
        assert set(factors_now(roots).values()) == {1.0}
    assert set(factors_now(roots).values()) == {0.0}


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("mode", [Mode.DYNAMIC, Mode.AUTO])
def test_a_range_of_steps_comes_and_goes_in_the_unet_only(whole: bool, mode: Mode) -> None:
    roots = unet_and_text_encoder()
    engine = LoraEngine(roots)
    file = identity_lora(engine.key_map, whole=whole)
    stack = [LoraUse(file, 1.0, start=0.25, end=0.5), LoraUse(file, 2.0, start=0.5)]
    with engine.applied(stack, mode, steps=50) as block:
        assert block.mode is Mode.DYNAMIC
        for fraction, inside in [
            (0, 0),
            (0.2, 0),
            (0.25, 1),
            (0.49, 1),
            (0.5, 2),
            (1, 2),
            (0.1, 0),
        ]:
            block.at(fraction)
            now = factors_now(roots)
            assert now.pop("TE") == 3.0
            assert set(now.values()) == {float(inside)}
    assert set(factors_now(roots).values()) == {0.0}


def test_a_range_cannot_be_merged() -> None:
    root = small()
    with (
        unchanged(root),
        pytest.raises(LoraUnsupported) as caught,
        LoraEngine({"unet": root}).applied([LoraUse(adapter("lora"), end=0.5)], Mode.MERGED),
    ):
        pytest.fail("the block must not be entered")
    assert "cannot be merged" in str(caught.value)


def test_telling_the_time_does_nothing_where_nothing_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = LoraEngine({"unet": small()})
    for stack in ([], [LoraUse(adapter("lora"))], [LoraUse(adapter("lora"), start=0.5)]):
        with engine.applied(stack) as block, monkeypatch.context() as patch:
            patch.setattr(engine, "prepare", lambda *_: pytest.fail("something was done"))
            for fraction in (0.0, 0.2, 0.4):
                block.at(fraction)
