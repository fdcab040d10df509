import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lora.engine.engine import LoraEngine
from lora.errors import LoraCorrupt, LoraError, LoraNotFound
from lora.fetch.sources import Reference
from lora.fetch.transfers import Transfer
from lora.volume import loader as library_module
from lora.volume.cache import Limits, VolumeCache
from lora.volume.loader import LoraLibrary
from tests.adapters import as_bytes, kohya, write
from tests.server import LOOPBACK, LoopbackServer
from tests.waiting import until


@pytest.fixture
def library(engine: LoraEngine, tmp_path: Path) -> LoraLibrary:
    cache = VolumeCache(tmp_path / "loras", Limits(tries=1), LOOPBACK)
    cache.shelf.prepare()
    return LoraLibrary(cache, engine.key_map)


def test_a_file_is_parsed_once_by_its_content(library: LoraLibrary) -> None:
    write(library.cache.shelf.root / "a.safetensors", kohya())
    write(library.cache.shelf.root / "b.safetensors", kohya())
    first, again, twin = (library.load(Reference(name)).file for name in ("a", "a", "b"))
    assert first is again is twin


def test_a_file_that_changed_under_its_name_is_parsed_anew(library: LoraLibrary) -> None:
    path = write(library.cache.shelf.root / "a.safetensors", kohya(seed=1))
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
    write(library.cache.shelf.root / "a.safetensors", kohya())
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
    (library.cache.shelf.root / "bad.safetensors").write_bytes(b"<html>")
    with pytest.raises(LoraCorrupt) as caught:
        library.load(Reference("bad"))
    assert str(caught.value).startswith("LORA_CORRUPT: bad: the file is a web page")
    with pytest.raises(LoraNotFound):
        library.load(Reference("gone"))


def test_the_loras_of_a_job_come_in_at_the_same_time(
    library: LoraLibrary, server: LoopbackServer
) -> None:
    gate = threading.Event()
    urls = [server.serve(f"/{n}.safetensors", as_bytes(kohya(seed=n)), gate=gate) for n in range(3)]
    told: list[Transfer] = []
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(library.load_all, [Reference(url) for url in urls], told.append)
        until(lambda: server.hits.total() == 3)  # and none of them has been answered
        gate.set()
        loaded = coming.result()
    assert [one.entry.path.name[0] for one in loaded] == ["0", "1", "2"]
    size = sum(one.entry.record.size for one in loaded)
    assert told[-1][:3] == (3, size, size)
    assert told[-1].rate > 0
    assert [now.done for now in told] == sorted(now.done for now in told)


def test_one_source_twice_in_a_job_is_one_download(
    library: LoraLibrary, server: LoopbackServer
) -> None:
    url = server.serve("/a.safetensors", as_bytes(kohya()), pause=0.2)
    first, second = library.load_all([Reference(url)] * 2)
    assert first.file.sha256 == second.file.sha256
    assert server.hits["/a.safetensors"] == 1


def test_the_faults_of_all_loras_are_told_at_once(
    library: LoraLibrary, server: LoopbackServer
) -> None:
    sources = [server.url("/gone.safetensors"), "no-such-name", server.url("/gone.safetensors")]
    with pytest.raises(LoraNotFound) as caught:
        library.load_all([Reference(source) for source in sources])
    assert str(caught.value).count("gone.safetensors does not exist (HTTP 404)") == 1
    assert "has no file 'no-such-name'." in str(caught.value)


def test_nothing_is_downloaded_if_a_reference_means_nothing(
    library: LoraLibrary, server: LoopbackServer
) -> None:
    url = server.serve("/a.safetensors", as_bytes(kohya()))
    with pytest.raises(LoraError) as caught:
        library.load_all([Reference(url), Reference("../x")])
    assert caught.value.code == "LORA_SOURCE_INVALID"
    assert not server.hits


def test_a_file_whose_bytes_rotted_is_set_aside_and_fetched_again(
    library: LoraLibrary, server: LoopbackServer
) -> None:
    url = server.serve("/a.safetensors", as_bytes(kohya()))
    path = library.load(Reference(url)).entry.path
    library.free()
    stat = path.stat()
    data = bytearray(path.read_bytes())
    data[-2:] = b"\xff\x7f"  # a NaN
    data[-4:-2] = b"\xff\x7f"
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    loaded = library.load(Reference(url))
    assert path.read_bytes() == as_bytes(kohya())
    assert loaded.warnings == (f"{path.name} was damaged on the volume; it was fetched again",)
    assert library.load(Reference(url)).warnings == ()
    assert [p.name.startswith(path.name) for p in (path.parent / ".damaged").iterdir()] == [True]


def test_what_a_source_has_is_not_fetched_again_because_it_cannot_be_read(
    library: LoraLibrary, server: LoopbackServer
) -> None:
    bad = {name: tensor * float("nan") for name, tensor in kohya().items()}
    url = server.serve("/a.safetensors", as_bytes(bad))
    for _ in range(2):
        with pytest.raises(LoraCorrupt):
            library.load(Reference(url))
    assert server.hits["/a.safetensors"] == 1
