"""Random subsets of random files: every tensor is told of, and a module is used whole or not at all.

The names may be a wrapper's, and tensors that nobody knows may stand beside the known ones.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from lora.errors import LoraError
from lora.formats.adapter import load
from lora.formats.names.slots import split_key
from tests.adapters import write
from tests.lora.tools import narrow

STRANGE = ("oft_R.of_tomorrow", "lokr_w1.scale", "lora_gate", "dora_scale.of_tomorrow")
"""Suffixes of no tensor that is read: a module that has one is not used without it."""


@pytest.mark.parametrize("seed", range(40))
def test_a_subset_of_files_is_used_by_whole_modules(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    every = {
        k: t for name in chance.sample(narrow.NAMES, 2) for k, t in narrow.tensors_of(name).items()
    }
    word = chance.choice(("", "", "module.", "_orig_mod.", "module._orig_mod."))
    kept = {f"{word}{k}": t.contiguous() for k, t in every.items() if chance.random() < 0.8}
    for key in chance.sample(sorted(kept), min(2, len(kept))):
        stem = (split_key(key) or (key, ""))[0]
        if chance.random() < 0.3:
            kept[f"{stem}.{chance.choice(STRANGE)}"] = torch.ones(2)
    path = write(tmp_path / "a.safetensors", kept)
    try:
        file = load(path, narrow.key_map(), "x")
    except LoraError as error:
        assert error.sentence
        return
    unused = {one.key for one in file.unused}
    assert file.keys + len(unused) == len(kept)
    assert unused <= kept.keys()
    stems = {key: _stem(key) for key in kept}
    used = {stems[key] for key in kept.keys() - unused}
    mixed = {stems[key] for key in unused if not key.endswith(".alpha")} & used
    assert not mixed


def _stem(key: str) -> str:
    strange = next((s for s in STRANGE if key.endswith(f".{s}")), None)
    return key.removesuffix(f".{strange}") if strange else (split_key(key) or (key, ""))[0]
