"""Factors on their way to the device: what is copied, what overflows, what is never called."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lora.engine.dynamic import make_factors
from lora.engine.engine import LoraEngine
from lora.engine.stack import LoraUse, Mode
from lora.errors import LoraIncompatible
from lora.formats.adapter import LoraFile, load
from tests.adapters import randn, write
from tests.state import unchanged


def parse(engine: LoraEngine, folder: Path, tensors: dict[str, torch.Tensor]) -> LoraFile:
    return load(write(folder / "a.safetensors", tensors), engine.key_map, "a")


def lora(
    name: str, inputs: int = 8, outputs: int = 8, size: float = 1.0
) -> dict[str, torch.Tensor]:
    return {
        f"unet.{name}.lora_A.weight": randn(2, inputs, seed=1) * size,
        f"unet.{name}.lora_B.weight": randn(outputs, 2, seed=2),
    }


@pytest.fixture
def narrow_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the products are in the layer's own precision."""
    monkeypatch.setattr("lora.engine.dynamic.product_dtype", lambda device, dtype: dtype)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_on_a_cpu_factors_stay_as_the_file_has_them(tmp_path: Path, kind: torch.dtype) -> None:
    root = nn.Sequential(nn.Linear(8, 8)).to(torch.bfloat16)
    engine = LoraEngine({"unet": root})
    file = parse(engine, tmp_path, {k: t.to(kind) for k, t in lora("0").items()})
    part = file.layers[0].algorithm.low_rank()
    assert part is not None
    (factors,) = make_factors([(root[0], "0", [part])])
    assert factors.down is part.down
    assert factors.up.data_ptr() == part.up.data_ptr()


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("layer", ["linear", "conv"])
def test_on_a_cpu_half_precision_is_rounded_once(tmp_path: Path, layer: str, count: int) -> None:
    kinds: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
        "linear": (nn.Linear(8, 8), (5, 8)),
        "conv": (nn.Conv2d(8, 8, 1), (1, 8, 3, 3)),
    }
    module, shape = kinds[layer]
    root = nn.Sequential(module).to(torch.bfloat16)
    engine = LoraEngine({"unet": root})
    dtypes = [torch.float16, torch.bfloat16, torch.float32][:count]
    stack, delta = [], torch.zeros(8, 8, dtype=torch.float64)
    for number, kind in enumerate(dtypes):
        tensors = {k: (t * 0.3 + number).to(kind) for k, t in lora("0").items()}
        stack.append(
            LoraUse(
                load(
                    write(tmp_path / f"{number}.safetensors", tensors), engine.key_map, f"{number}"
                ),
                0.5,
            )
        )
        down, up = (t.double() for t in tensors.values())
        delta += 0.5 * up @ down
    x = randn(*shape).to(torch.bfloat16)
    with torch.no_grad():
        plain = root(x)
        with engine.applied(stack, Mode.DYNAMIC):
            changed = root(x)
    pattern = "ni,oi->no" if layer == "linear" else "nihw,oi->nohw"
    exact = plain.double() + torch.einsum(pattern, x.double(), delta)
    assert torch.equal(changed, exact.to(torch.bfloat16))


@pytest.mark.usefixtures("narrow_products")
def test_a_layer_of_a_large_file_does_not_take_the_file_along(tmp_path: Path) -> None:
    root = nn.Sequential(nn.Linear(8, 8)).to(torch.bfloat16)
    engine = LoraEngine({"unet": root})
    file = parse(engine, tmp_path, lora("0") | {"unet.gone.alpha": randn(100_000)})
    part = file.layers[0].algorithm.low_rank()
    assert part is not None
    (factors,) = make_factors([(root[0], "0", [part])])
    assert factors.down.untyped_storage().nbytes() == factors.down.numel() * 2


@pytest.mark.usefixtures("narrow_products")
def test_most_of_a_file_goes_in_one_step(tmp_path: Path) -> None:
    root = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to(torch.bfloat16)
    engine = LoraEngine({"unet": root})
    file = parse(engine, tmp_path, lora("0") | lora("1"))
    parts = [layer.algorithm.low_rank() for layer in file.layers]
    made = make_factors([(m, "", [p]) for m, p in zip(root, parts, strict=True) if p])
    storages = {t.untyped_storage().data_ptr() for f in made for t in (f.down, f.up)}
    assert len(storages) == 1


@pytest.mark.usefixtures("narrow_products")
@pytest.mark.parametrize("what", ["a factor", "the scale"])
def test_what_overflows_half_precision_is_refused_and_nothing_is_changed(
    tmp_path: Path, what: str
) -> None:
    root = nn.Sequential(nn.Linear(8, 8)).to(torch.float16)
    engine = LoraEngine({"unet": root})
    tensors = lora("0", size=1e6 if what == "a factor" else 1.0)
    if what == "the scale":
        tensors["unet.0.alpha"] = torch.tensor(1e6)
    file = parse(engine, tmp_path, tensors)
    block = engine.applied([LoraUse(file)], Mode.DYNAMIC)
    with unchanged(root), pytest.raises(LoraIncompatible) as caught, block:
        pytest.fail("the block must not be entered")
    assert "overflow" in str(caught.value)
    assert "float16" in str(caught.value)


@pytest.mark.parametrize("mode", [Mode.DYNAMIC, Mode.MERGED])
def test_a_layer_whose_forward_is_never_called_is_merged(tmp_path: Path, mode: Mode) -> None:
    root = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, batch_first=True)})
    engine = LoraEngine({"unet": root})
    file = parse(engine, tmp_path, lora("attn.out_proj"))
    x = randn(1, 3, 8)
    plain = root["attn"](x, x, x)[0]
    with unchanged(root), engine.applied([LoraUse(file)], mode), torch.no_grad():
        assert not torch.allclose(root["attn"](x, x, x)[0], plain, atol=1e-3)


@pytest.mark.usefixtures("narrow_products")
def test_a_layer_that_moved_gets_factors_of_its_own(tmp_path: Path) -> None:
    root = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    engine = LoraEngine({"unet": root})
    stack = [LoraUse(parse(engine, tmp_path, lora("0") | lora("1")))]
    with engine.applied(stack, Mode.DYNAMIC):
        root.to(torch.bfloat16)
        root(randn(1, 8).to(torch.bfloat16))
        for module in root:
            down = module.__dict__["forward"].__self__.down
            assert down.untyped_storage().nbytes() == down.numel() * 2


@pytest.mark.usefixtures("narrow_products")
@pytest.mark.parametrize("scales", [(0.5,), (0.5, -2.0)])
def test_products_in_the_layers_own_precision_mean_the_same(
    tmp_path: Path, scales: tuple[float, ...]
) -> None:
    root = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Flatten(2), nn.Linear(9, 8)).to(torch.bfloat16)
    engine = LoraEngine({"unet": root})
    file = parse(engine, tmp_path, lora("0") | lora("2", inputs=9))
    x = randn(2, 8, 3, 3).to(torch.bfloat16)
    stack = [LoraUse(file, scale) for scale in scales]
    with torch.no_grad(), engine.applied(stack, Mode.MERGED):
        merged = root(x)
    with torch.no_grad(), unchanged(root), engine.applied(stack, Mode.DYNAMIC):
        assert root[0].__dict__["forward"].__self__.down.dtype is torch.bfloat16
        torch.testing.assert_close(root(x), merged, rtol=0.05, atol=0.05 * float(merged.std()))
