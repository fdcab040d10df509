"""Factors on their way to the device: what is copied, what overflows, what is never called."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lora.dynamic import make_factors
from lora.engine import LoraEngine
from lora.errors import LoraIncompatible
from lora.files import LoraFile, load
from lora.stack import LoraUse, Mode
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


def test_a_layer_of_a_large_file_does_not_take_the_file_along(tmp_path: Path) -> None:
    root = nn.Sequential(nn.Linear(8, 8)).to(torch.bfloat16)
    engine = LoraEngine({"unet": root})
    file = parse(engine, tmp_path, lora("0") | {"unet.gone.alpha": randn(100_000)})
    part = file.layers[0].part.low_rank()
    assert part is not None
    (factors,) = make_factors([(root[0], "0", [part])])
    assert factors.down.untyped_storage().nbytes() == factors.down.numel() * 2


def test_most_of_a_file_goes_in_one_step(tmp_path: Path) -> None:
    root = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to(torch.bfloat16)
    engine = LoraEngine({"unet": root})
    file = parse(engine, tmp_path, lora("0") | lora("1"))
    parts = [layer.part.low_rank() for layer in file.layers]
    made = make_factors([(m, "", [p]) for m, p in zip(root, parts, strict=True) if p])
    storages = {t.untyped_storage().data_ptr() for f in made for t in (f.down, f.up)}
    assert len(storages) == 1


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


def test_a_layer_that_moved_gets_factors_of_its_own(tmp_path: Path) -> None:
    root = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    engine = LoraEngine({"unet": root})
    stack = [LoraUse(parse(engine, tmp_path, lora("0") | lora("1")))]
    with engine.applied(stack, Mode.DYNAMIC):
        root.to(torch.bfloat16)
        root(randn(1, 8).to(torch.bfloat16))
        for module in root:
            down = module.__dict__["forward"].down
            assert down.untyped_storage().nbytes() == down.numel() * 2
