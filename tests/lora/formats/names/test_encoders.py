"""A text encoder's own names, as PEFT saves them into its own folder, mean the encoder of their widths."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor, nn

from lora.engine.engine import LoraEngine
from lora.errors import LoraIncompatible, LoraUnsupported
from lora.formats.adapter import LoraFile, load
from tests.adapters import randn, write
from tests.lora.small import small


def encoder(width: int, layers: int) -> nn.Module:
    """The names of a CLIP's attention."""
    root = nn.Module()
    root.encoder = nn.Module()
    root.encoder.layers = nn.ModuleList()
    for _ in range(layers):
        layer = nn.Module()
        layer.self_attn = nn.Module()
        layer.self_attn.q_proj = nn.Linear(width, width)
        root.encoder.layers.append(layer)
    return root


def engine(*encoders: nn.Module) -> LoraEngine:
    names = ("text_encoder", "text_encoder_2")
    return LoraEngine({"unet": small(), **dict(zip(names, encoders, strict=False))})


def lora(stem: str, width: int) -> dict[str, Tensor]:
    return {
        f"{stem}.lora_A.weight": randn(2, width),
        f"{stem}.lora_B.weight": randn(width, 2),
    }


def read(
    folder: Path, engine: LoraEngine, tensors: dict[str, Tensor], config: str | None = None
) -> LoraFile:
    return load(write(folder / "a.safetensors", tensors), engine.key_map, "x", config=config)


STEMS = (
    "base_model.model.text_model.encoder.layers.{}.self_attn.q_proj",
    "base_model.model.encoder.layers.{}.self_attn.q_proj",
    "text_model.encoder.layers.{}.self_attn.q_proj",
    "module.base_model.model.text_model.encoder.layers.{}.self_attn.q_proj",
)


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize(("width", "name"), [(8, "text_encoder"), (16, "text_encoder_2")])
def test_the_widths_tell_which_encoder_is_meant(
    tmp_path: Path, stem: str, width: int, name: str
) -> None:
    two = engine(encoder(8, 1), encoder(16, 1))
    config = '{"r": 2, "lora_alpha": 8, "alpha_pattern": {"layers.0.self_attn.q_proj": 6}}'
    file = read(tmp_path, two, lora(stem.format(0), width), config)
    assert file.unused == ()
    (layer,) = file.layers
    assert str(layer.target) == f"{name}.encoder.layers.0.self_attn.q_proj"
    assert layer.algorithm.low_rank().scaling == 3.0


def test_so_does_a_block_that_only_one_has(tmp_path: Path) -> None:
    two = engine(encoder(8, 1), encoder(8, 2))
    tensors = lora(STEMS[0].format(0), 8) | lora(STEMS[0].format(1), 8)
    assert {t.target.component for t in read(tmp_path, two, tensors).layers} == {"text_encoder_2"}


def test_names_that_two_have_in_one_width_are_not_guessed(tmp_path: Path) -> None:
    with pytest.raises(LoraUnsupported) as caught:
        read(tmp_path, engine(encoder(8, 1), encoder(8, 1)), lora(STEMS[0].format(0), 8))
    assert "whether it is for text_encoder or text_encoder_2" in caught.value.sentence


@pytest.mark.parametrize("encoders", [(), (encoder(8, 1),), (encoder(8, 1), encoder(16, 1))])
def test_an_encoder_that_the_model_lacks_is_refused(
    tmp_path: Path, encoders: tuple[nn.Module, ...]
) -> None:
    with pytest.raises(LoraIncompatible):
        read(tmp_path, engine(*encoders), lora(STEMS[0].format(0), 32))
