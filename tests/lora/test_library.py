from pathlib import Path

import pytest

from lora import library as library_module
from lora.cache import VolumeCache
from lora.engine import LoraEngine
from lora.errors import LoraCorrupt, LoraNotFound
from lora.library import LoraLibrary
from lora.sources import Reference
from tests.adapters import as_bytes, kohya, write


@pytest.fixture
def library(engine: LoraEngine, tmp_path: Path) -> LoraLibrary:
    cache = VolumeCache(tmp_path / "loras")
    cache.prepare()
    return LoraLibrary(cache, engine.key_map)


def test_a_file_is_parsed_once_by_its_content(library: LoraLibrary) -> None:
    write(library.cache.root / "a.safetensors", kohya())
    write(library.cache.root / "b.safetensors", kohya())
    first, again, twin = (library.load(Reference(name)).file for name in ("a", "a", "b"))
    assert first is again is twin


def test_a_file_that_changed_under_its_name_is_parsed_anew(library: LoraLibrary) -> None:
    path = write(library.cache.root / "a.safetensors", kohya(seed=1))
    first = library.load(Reference("a")).file
    path.unlink()
    write(path, kohya(seed=2))
    second = library.load(Reference("a")).file
    assert first.sha256 != second.sha256


def test_warm_files_are_bounded_by_bytes(engine: LoraEngine, tmp_path: Path) -> None:
    cache = VolumeCache(tmp_path)
    small = LoraLibrary(cache, engine.key_map, warm_bytes=2 * len(as_bytes(kohya())) + 10)
    for seed in range(3):
        write(tmp_path / f"{seed}.safetensors", kohya(seed=seed))
    first = small.load(Reference("0")).file
    last = [small.load(Reference(str(seed))).file for seed in (1, 2)]
    assert [small.load(Reference(str(seed))).file for seed in (1, 2)] == last
    assert small.load(Reference("0")).file is not first


def test_a_file_that_another_worker_evicted_meanwhile_is_asked_for_again(
    library: LoraLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(library.cache.root / "a.safetensors", kohya())
    tries: list[Path] = []
    load = library_module.load

    def gone_at_first(path: Path, *arguments: object, **options: object) -> object:
        tries.append(path)
        if len(tries) == 1:
            raise FileNotFoundError(path)
        return load(path, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(library_module, "load", gone_at_first)
    assert library.load(Reference("a")).file.layers
    assert len(tries) == 2


def test_errors_name_the_reference(library: LoraLibrary) -> None:
    (library.cache.root / "bad.safetensors").write_bytes(b"<html>")
    with pytest.raises(LoraCorrupt) as caught:
        library.load(Reference("bad"))
    assert str(caught.value).startswith("LORA_CORRUPT: bad: the file is a web page")
    with pytest.raises(LoraNotFound):
        library.load(Reference("gone"))
