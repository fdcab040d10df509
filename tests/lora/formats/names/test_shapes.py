"""Shapes by an adapter's own tensors: each tensor of a file has a place where no model is at hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora.formats.contents import read_contents
from lora.formats.header import read_header
from lora.tools.adapters.own_names import own_key_map
from tests.adapters import randn, write
from tests.lora import small

PEFT = {
    "hra": {"a.hra_u": (12, 2)},
    "miss": {"a.miss_block": (4, 8)},
    "miss, mini": {"a.miss_block": (4, 2)},
    "miss, bat": {"a.miss_block": (4, 2, 2)},
    "boft": {"a.boft_R": (2, 4, 2, 2), "a.boft_s": (8, 1)},
    "adalora": {"a.lora_A": (2, 12), "a.lora_B": (8, 2), "a.lora_E": (2, 1)},
    "randlora": {
        **{"a.randlora_lambda": (2, 4), "a.randlora_gamma": (4, 8)},
        **{"a.randlora_A": (2, 1, 8), "a.randlora_B": (12, 4, 2)},
    },
    "dora over oft": {"a.oft_R.weight": (3, 6), "a.dora_log_multiplier": (8,)},
}


@pytest.mark.parametrize("name", [*small.NAMES, *PEFT])
def test_every_tensor_has_a_place(tmp_path: Path, name: str) -> None:
    tensors = (
        small.tensors_of(name)
        if name in small.NAMES
        else {f"base_model.model.{key}": randn(*shape) for key, shape in PEFT[name].items()}
    )
    path = write(tmp_path / "a.safetensors", {k: torch.Tensor.clone(t) for k, t in tensors.items()})
    header = read_header(path)
    config = "{}" if name in PEFT else None
    contents = read_contents(path, header, own_key_map(header), config=config)
    assert contents.unused == []
