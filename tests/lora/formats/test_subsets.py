"""Random subsets of random files: every tensor is told of, and a module is used whole or not at all."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from lora.errors import LoraError
from lora.formats.adapter import load
from lora.formats.names.slots import split_key
from tests.adapters import write
from tests.lora.tools import narrow


@pytest.mark.parametrize("seed", range(25))
def test_a_subset_of_files_is_used_by_whole_modules(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    every = {
        k: t for name in chance.sample(narrow.NAMES, 2) for k, t in narrow.tensors_of(name).items()
    }
    kept = {k: t.contiguous() for k, t in every.items() if chance.random() < 0.8}
    path = write(tmp_path / "a.safetensors", kept)
    try:
        file = load(path, narrow.key_map(), "x")
    except LoraError as error:
        assert error.sentence
        return
    unused = {one.key for one in file.unused}
    assert file.keys + len(unused) == len(kept)
    assert unused <= kept.keys()
    stems = {key: (split_key(key) or (key, ""))[0] for key in kept}
    used = {stems[key] for key in kept.keys() - unused}
    mixed = {stems[key] for key in unused if not key.endswith(".alpha")} & used
    assert not mixed
