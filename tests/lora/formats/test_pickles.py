import hashlib
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from lora.engine.engine import LoraEngine
from lora.errors import LoraError, LoraUnsupported
from lora.fetch.sources import CachedName, Reference
from lora.formats.pickles import convert, looks_like_pickle
from lora.volume.cache import VolumeCache
from lora.volume.loader import LoraLibrary
from tests.adapters import kohya
from tests.server import LOOPBACK, LoopbackServer


def saved(folder: Path, value: Any, name: str = "lora.pt", **options: Any) -> Path:
    path = folder / name
    torch.save(value, path, **options)
    return path


@pytest.mark.parametrize("old_form", [False, True])
def test_tensors_numbers_and_text_are_kept(tmp_path: Path, old_form: bool) -> None:
    tensors = kohya()
    first = next(iter(tensors))
    shared = {**tensors, "twin": tensors[first], "part": tensors[first][:1].t()}
    value = OrderedDict({**shared, "x.alpha": 4.0, "note": "hello", "more": {"a": [1]}})
    path = saved(tmp_path, value, _use_new_zipfile_serialization=not old_form)
    convert(path, tmp_path / "out.safetensors", 1 << 30)
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == {*shared, "x.alpha"}
    assert all(torch.equal(found[key], tensor) for key, tensor in shared.items())
    assert float(found["x.alpha"]) == 4.0
    header = (tmp_path / "out.safetensors").read_bytes()[:4000]
    assert b'"note":"hello"' in header


def test_tensors_in_a_wrapper_are_found(tmp_path: Path) -> None:
    path = saved(tmp_path, {"state_dict": kohya(), "epoch": 3})
    convert(path, tmp_path / "out", 1 << 30)
    assert load_file(tmp_path / "out").keys() == kohya().keys()


class Harmful:
    """Would make a file if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_nothing_in_a_pickle_is_run(tmp_path: Path) -> None:
    proof = tmp_path / "ran"
    zipped = saved(tmp_path, {"a": Harmful(proof)})
    bare = tmp_path / "bare.pt"
    bare.write_bytes(pickle.dumps({"a": Harmful(proof)}, protocol=2))
    for path in (zipped, bare):
        with pytest.raises(LoraError) as caught:
            convert(path, tmp_path / "out", 1 << 30)
        assert caught.value.code in ("LORA_UNSUPPORTED", "LORA_CORRUPT")
        assert not (tmp_path / "out").exists()
    assert not proof.exists()


def test_what_is_no_table_of_tensors_is_refused(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.pt"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(20_000_000))
    plain_zip = tmp_path / "plain.pt"
    with zipfile.ZipFile(plain_zip, "w") as archive:
        archive.writestr("a.txt", "x")
    cut = tmp_path / "cut.pt"
    cut.write_bytes(saved(tmp_path, kohya()).read_bytes()[:-500])
    cases = {
        saved(tmp_path, torch.zeros(2), "tensor.pt"): "LORA_UNSUPPORTED",
        saved(tmp_path, {"a": "text"}, "text.pt"): "LORA_UNSUPPORTED",
        saved(tmp_path, [torch.zeros(2)], "list.pt"): "LORA_UNSUPPORTED",
        bomb: "LORA_TOO_LARGE",
        plain_zip: "LORA_CORRUPT",
        cut: "LORA_CORRUPT",
    }
    for path, code in cases.items():
        with pytest.raises(LoraError) as caught:
            convert(path, tmp_path / "out", 10_000_000)
        assert caught.value.code == code, path.name


def test_a_downloaded_pickle_is_published_as_safetensors(
    tmp_path: Path, server: LoopbackServer, engine: LoraEngine
) -> None:
    body = saved(tmp_path, kohya()).read_bytes()
    digest = hashlib.sha256(body).hexdigest()
    library = LoraLibrary(VolumeCache(tmp_path / "loras", None, LOOPBACK), engine.key_map)
    for name in ("/lora.pt", "/no-extension"):
        url = server.serve(name, body)
        loaded = library.load(Reference(url, sha256=digest))
        assert loaded.entry.path.suffix == ".safetensors"
        assert loaded.entry.record.source_sha256 == digest
        assert loaded.entry.record.sha256 == loaded.file.sha256 != digest
        assert not loaded.file.unused
        again = library.load(Reference(url, sha256=digest))
        assert not again.entry.downloaded
        assert again.file is loaded.file
    left = {p.suffix for p in (tmp_path / "loras").rglob("*") if p.is_file()}
    assert left == {".safetensors", ".json"}


def test_an_operators_pickle_is_converted_once_per_version(
    tmp_path: Path, engine: LoraEngine
) -> None:
    cache = VolumeCache(tmp_path)
    cache.shelf.prepare()
    path = saved(tmp_path, kohya())
    first, again = cache.find(CachedName("lora")), cache.find(CachedName("lora.pt"))
    assert first.path == again.path != path
    assert (first.downloaded, again.downloaded) == (True, False)
    saved(tmp_path, kohya(seed=5))
    assert cache.find(CachedName("lora")).record.sha256 != first.record.sha256
    assert path.exists()
    assert LoraLibrary(cache, engine.key_map).load(Reference("lora")).file.layers


def test_a_peft_folder_is_named_by_its_folder(tmp_path: Path, engine: LoraEngine) -> None:
    folder = tmp_path / "mine" / "checkpoint-500"
    folder.mkdir(parents=True)
    saved(folder, kohya(), "adapter_model.bin")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8}')
    cache = VolumeCache(tmp_path)
    cache.shelf.prepare()
    entry = cache.find(CachedName("mine/checkpoint-500"))
    assert entry.record.config is not None
    assert LoraLibrary(cache, engine.key_map).load(Reference("mine/checkpoint-500")).file.layers


def test_a_safetensors_file_whose_length_looks_like_a_pickles_start_is_none(tmp_path: Path) -> None:
    """Its first bytes are the header's length, here 0x0480 and 0x0280 in a little-endian number."""
    for length in (0x0280, 0x0380, 0x0480):
        bare = len(save({"a": torch.ones(1)}, {"x": ""})) - 4 - 8
        path = tmp_path / f"{length}.safetensors"
        save_file({"a": torch.ones(1)}, path, {"x": "y" * (length - bare)})
        assert path.read_bytes()[:2] == length.to_bytes(2, "little")
        assert not looks_like_pickle(path)
    assert looks_like_pickle(saved(tmp_path, {"a": torch.ones(1)}))
    old = saved(tmp_path, {"a": torch.ones(1)}, "old.pt", _use_new_zipfile_serialization=False)
    assert looks_like_pickle(old)


def test_a_hypernetwork_is_refused_by_its_name(tmp_path: Path) -> None:
    layers = ({"linear.0.weight": torch.ones(2, 2)}, {"linear.0.weight": torch.ones(2, 2)})
    torch.save({768: layers, "layer_structure": [1, 2, 1], "step": 9}, tmp_path / "a.pt")
    with pytest.raises(LoraUnsupported) as caught:
        convert(tmp_path / "a.pt", tmp_path / "a.safetensors", 1_000_000)
    assert "a hypernetwork" in caught.value.sentence
