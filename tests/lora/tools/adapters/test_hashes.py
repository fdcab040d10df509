"""The hashes, against the trainers' own recipe written out with the safetensors library."""

from __future__ import annotations

import hashlib
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from lora.errors import LoraCorrupt
from lora.tools.adapters.hashes import hashes_of
from tests.adapters import kohya, randn

METADATA = {
    "ss_network_dim": "4",
    "ss_tag": "ü",
    "modelspec.title": "a title",
    "sshs_model_hash": "?",
}


def of_kohya(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> tuple[str, str]:
    """sd-scripts' `precalculate_safetensors_hashes`: model hash and legacy hash."""
    data = save(tensors, {k: v for k, v in metadata.items() if k.startswith("ss_")})
    start = 8 + int.from_bytes(data[:8], "little")
    legacy = hashlib.sha256(data[0x100000 : 0x100000 + 0x10000]).hexdigest()[:8]
    return hashlib.sha256(data[start:]).hexdigest(), legacy


@pytest.mark.parametrize("metadata", [METADATA, {"modelspec.title": "x"}, {}])
@pytest.mark.parametrize("numbers", [10, 300_000, 700_000])
def test_the_hashes_are_those_of_kohya_and_civitai(
    tmp_path: Path, metadata: dict[str, str], numbers: int
) -> None:
    tensors = {**kohya(), "lora_unet_big.diff": randn(numbers)}
    data = save(tensors, metadata or None)
    path = tmp_path / "file.safetensors"
    path.write_bytes(data)
    found = hashes_of(path)
    assert found.sha256 == hashlib.sha256(data).hexdigest()
    assert found.autov2 == found.sha256[:10]
    assert found.autov1 == hashlib.sha256(data[0x100000 : 0x100000 + 0x10000]).hexdigest()[:8]
    assert found.crc32 == f"{zlib.crc32(data):08x}"
    model_hash, legacy = of_kohya(tensors, metadata)
    assert found.model_hash == model_hash
    assert found.autov3 == model_hash[:12]
    assert found.legacy_hash == legacy


def test_other_metadata_changes_the_files_hash_and_not_the_tensors(tmp_path: Path) -> None:
    found = []
    for title in ("one", "two"):
        path = tmp_path / f"{title}.safetensors"
        path.write_bytes(save(kohya(), {"modelspec.title": title}))
        found.append(hashes_of(path))
    assert found[0].autov3 == found[1].autov3
    assert found[0].autov2 != found[1].autov2


def test_what_is_no_safetensors_has_the_hashes_of_a_whole_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    path.write_bytes(b"anything")
    found = hashes_of(path)
    assert found.sha256 == hashlib.sha256(b"anything").hexdigest()
    assert (found.model_hash, found.autov3, found.legacy_hash) == (None, None, None)


def test_a_cut_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    path.write_bytes(save(kohya())[:-1])
    with pytest.raises(LoraCorrupt):
        hashes_of(path)
