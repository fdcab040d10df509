"""A network's own `save_lora_adapter` names no component, in its keys and in its config."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from safetensors import safe_open

from lora.engine.stack import LoraUse
from lora.formats.alphas import CONFIG_IN_FILE
from lora.tools.adapters.saving import WriteOptions
from lora.tools.convert import ConvertOptions, convert
from tests.lora.tools import narrow


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    unet = copy.deepcopy(narrow.components()["unet"])
    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=["to_q", "proj_in"], init_lora_weights=False
    )
    unet.add_adapter(config)  # type: ignore[operator]
    unet.save_lora_adapter(tmp_path)  # type: ignore[operator]
    return tmp_path / "pytorch_lora_weights.safetensors"


def test_its_alpha_is_read(saved: Path) -> None:
    file = narrow.read(saved)
    (alpha,) = {float(layer.algorithm.alpha) for layer in file.layers}  # type: ignore[attr-defined]
    assert (alpha, file.rank) == (6.0, 2)


def test_it_is_kept_by_the_tools(saved: Path, tmp_path: Path) -> None:
    after = tmp_path / "after.safetensors"
    convert(saved, after, ConvertOptions(WriteOptions(dtype=torch.float32)))
    one, other = (narrow.merged(LoraUse(narrow.read(path), 1.0)) for path in (saved, after))
    assert narrow.same(one, other)
    with safe_open(after, "pt") as opened:
        assert '"lora_alpha": 6' in opened.metadata()[CONFIG_IN_FILE]
