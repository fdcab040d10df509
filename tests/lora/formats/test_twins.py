"""Tensors of different LoRAs are never mixed: each set is one name's and one adapter's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lora.engine.engine import LoraEngine
from lora.errors import LoraUnsupported
from lora.formats.adapter import LoraFile, load
from tests.adapters import SELF_ATTENTION, SELF_SGM, kohya, randn, write

DOTTED = f"unet.{SELF_ATTENTION}"
FLAT = f"lora_unet_{SELF_ATTENTION.replace('.', '_')}"


def pair(
    stem: str, seed: int, up: str = "lora_up.weight", down: str = "lora_down.weight"
) -> dict[str, Tensor]:
    return {f"{stem}.{up}": randn(64, 4, seed=seed), f"{stem}.{down}": randn(4, 64, seed=seed + 1)}


def read(engine: LoraEngine, folder: Path, tensors: dict[str, Tensor]) -> LoraFile:
    return load(write(folder / "a.safetensors", tensors), engine.key_map, "x")


PEFT = ("lora_B.weight", "lora_A.weight")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (pair(SELF_SGM, 1), pair(FLAT, 9)),
        (pair(SELF_SGM, 1), pair(DOTTED, 9, *PEFT)),
        (pair(DOTTED, 1, *PEFT), pair(DOTTED, 9)),
        (
            pair(DOTTED, 1, "lora_B.one.weight", "lora_A.one.weight"),
            pair(DOTTED, 9, "lora_B.two.weight", "lora_A.two.weight"),
        ),
        (pair(DOTTED, 1, *PEFT), pair(DOTTED, 9, "lora_B.two.weight", "lora_A.two.weight")),
        (pair(SELF_SGM, 1) | {f"{SELF_SGM}.alpha": torch.tensor(1.0)}, pair(FLAT, 1)),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_two_loras_in_a_file_are_refused_in_any_order(
    engine: LoraEngine,
    tmp_path: Path,
    one: dict[str, Tensor],
    other: dict[str, Tensor],
    turned: bool,
) -> None:
    tensors = {**other, **one} if turned else {**one, **other}
    with pytest.raises(LoraUnsupported) as caught:
        read(engine, tmp_path, tensors)
    assert "holds two LoRAs for the same layers" in caught.value.sentence


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_two_sets_that_say_the_same_count_once(
    engine: LoraEngine, tmp_path: Path, dtype: torch.dtype
) -> None:
    twin = {key: t.to(dtype) for key, t in pair(DOTTED, 1, *PEFT).items()}
    file = read(engine, tmp_path, {**pair(SELF_SGM, 1), **twin})
    assert (file.keys, file.modules, len(file.layers)) == (2, 1, 1)
    assert {one.key for one in file.unused} in (twin.keys(), pair(SELF_SGM, 1).keys())
    assert all("says the same as" in one.reason for one in file.unused)


@pytest.mark.parametrize(
    "orphan",
    [
        f"{SELF_SGM}_lora_magnitude_vector.weight",
        f"{SELF_SGM}.lora_magnitude_vector.what",
        f"{SELF_SGM}_dora_scale",
        f"module.{SELF_SGM}_bias.weight",
    ],
)
def test_an_orphan_of_a_module_blocks_it(engine: LoraEngine, tmp_path: Path, orphan: str) -> None:
    file = read(engine, tmp_path, kohya() | {orphan: randn(64)})
    blocked = {one.key for one in file.unused}
    assert blocked == {orphan} | {key for key in kohya() if key.startswith(SELF_SGM)}
    assert file.keys + len(file.unused) == len(kohya()) + 1


def test_magnitudes_half_flattened_are_understood(engine: LoraEngine, tmp_path: Path) -> None:
    """As diffusers' `convert_state_dict_to_kohya` leaves a key that has one dot less than the others."""
    half = f"{FLAT.removesuffix('_to_q')}.to_q.lora_magnitude_vector"
    file = read(engine, tmp_path, pair(FLAT, 1) | {half: randn(64)})
    assert file.unused == ()
    assert file.algorithms == ("dora",)


@pytest.mark.parametrize("alpha", [0.0, 4.0])
def test_an_alpha_of_the_rank_says_what_its_absence_says(
    engine: LoraEngine, tmp_path: Path, alpha: float
) -> None:
    tensors = pair(SELF_SGM, 1) | pair(DOTTED, 1, *PEFT)
    file = read(engine, tmp_path, tensors | {f"{SELF_SGM}.alpha": torch.tensor(alpha)})
    assert len(file.layers) == 1
    assert all("says the same" in one.reason for one in file.unused)
    with pytest.raises(LoraUnsupported):
        read(engine, tmp_path, tensors | {f"{SELF_SGM}.alpha": torch.tensor(2.0)})
