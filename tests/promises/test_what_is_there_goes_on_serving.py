"""Files that change at their source, volumes that fill up, turn read-only or vanish, and bytes that rot."""

from __future__ import annotations

import ctypes
import errno
import io
import mmap
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora.engine.engine import LoraEngine
from lora.errors import CacheFull, LoraCorrupt, LoraError
from lora.fetch.sources import CachedName, Reference
from lora.formats.adapter import LoraFile
from lora.volume.cache import CacheEntry, Limits, VolumeCache
from lora.volume.lease import LeaseWatch
from lora.volume.loader import LoraLibrary
from lora.volume.records import DAMAGED, INCOMING, Record, read_as, record_path, write
from tests.adapters import as_bytes, kohya
from tests.server import LOOPBACK, LoopbackServer
from tests.waiting import until

OLD, NEW = as_bytes(kohya(seed=1)), as_bytes(kohya(seed=2))

LIMITS = Limits(tries=2, pause=0.01)

DAY = 86_400


@pytest.fixture
def cache(tmp_path: Path) -> VolumeCache:
    return VolumeCache(tmp_path / "loras", LIMITS, LOOPBACK)


@pytest.fixture
def with_fallback(tmp_path: Path) -> VolumeCache:
    return VolumeCache(tmp_path / "loras", LIMITS, LOOPBACK, fallback=tmp_path / "fallback")


def get(cache: VolumeCache, path: str, **options: Any) -> CacheEntry:
    return cache.get(cache.resolve(Reference(path, **options)))


def parts(cache: VolumeCache) -> list[Path]:
    """Whatever lies where nothing unfinished may lie."""
    return [path for root in cache.shelf.roots for path in (root / INCOMING).glob("*")]


def grow_old(entry: CacheEntry, seconds: float) -> None:
    """Lets the record be of so many seconds ago."""
    when = time.time() - seconds
    record = replace(entry.record, fetched=when, checked=when)
    write(entry.path.parent, record_path(entry.path), record)


# --- a source that changes ---------------------------------------------------------------------------


def test_two_urls_that_end_alike_are_two_entries(
    cache: VolumeCache, server: LoopbackServer
) -> None:
    urls = [
        server.serve(f"/{user}/lora.safetensors", body) for user, body in (("a", OLD), ("b", NEW))
    ]
    first, second = (get(cache, url) for url in urls)
    assert first.path.name != second.path.name
    for url, entry, body in zip(urls, (first, second), (OLD, NEW), strict=True):
        assert get(cache, url).path == entry.path
        assert entry.path.read_bytes() == body
    assert {path.read_bytes() for path in cache.shelf.files()} == {OLD, NEW}


def test_one_path_on_two_servers_or_with_two_queries_is_two_entries(
    cache: VolumeCache, server: LoopbackServer
) -> None:
    with LoopbackServer() as other:
        urls = [server.serve("/lora.safetensors", OLD), other.serve("/lora.safetensors", NEW)]
        urls += [f"{urls[0]}?version=1", f"{urls[0]}?version=2"]
        assert len({get(cache, url).path for url in urls}) == 4


def test_a_known_url_is_not_asked_again_within_its_time(
    cache: VolumeCache, server: LoopbackServer
) -> None:
    url = server.serve("/lora.safetensors", OLD)
    first = get(cache, url)
    grow_old(first, DAY - 60)
    server.serve("/lora.safetensors", NEW)
    assert get(cache, url).path.read_bytes() == OLD
    assert server.hits["/lora.safetensors"] == 1


@pytest.mark.parametrize("how", ["asked to refresh", "its time is over"])
def test_changed_content_comes_by_a_conditional_request(
    cache: VolumeCache, server: LoopbackServer, how: str
) -> None:
    url = server.serve("/lora.safetensors", OLD, headers={"ETag": '"old"'})
    first = get(cache, url)
    grow_old(first, 60 if how == "asked to refresh" else DAY + 60)
    server.serve("/lora.safetensors", NEW, headers={"ETag": '"new"'})
    second = get(cache, url, refresh=how == "asked to refresh")
    assert server.headers["/lora.safetensors"]["If-None-Match"] == '"old"'
    assert (second.downloaded, second.warnings, second.path) == (True, (), first.path)
    assert second.path.read_bytes() == NEW
    assert second.record.etag == '"new"'
    assert get(cache, url).record == second.record
    assert server.hits["/lora.safetensors"] == 2
    assert parts(cache) == []


@pytest.mark.parametrize("refresh", [True, False])
@pytest.mark.parametrize(
    ("told", "asked"),
    [
        ({"ETag": 'W/"1"'}, {"If-None-Match": 'W/"1"'}),
        (
            {"Last-Modified": "Tue, 01 Jul 2025 10:00:00 GMT"},
            {"If-Modified-Since": "Tue, 01 Jul 2025 10:00:00 GMT"},
        ),
    ],
    ids=["etag", "date"],
)
def test_content_that_did_not_change_is_kept(
    cache: VolumeCache,
    server: LoopbackServer,
    told: dict[str, str],
    asked: dict[str, str],
    refresh: bool,
) -> None:
    url = server.serve("/lora.safetensors", OLD, headers=told)
    first = get(cache, url)
    inode = first.path.stat().st_ino
    grow_old(first, DAY + 60)
    server.serve("/lora.safetensors", status=304)
    begun = time.time()
    second = get(cache, url, refresh=refresh)
    assert asked.items() <= server.headers["/lora.safetensors"].items()
    assert (second.downloaded, second.warnings) == (False, ())
    assert second.path.read_bytes() == OLD
    assert second.path.stat().st_ino == inode
    assert second.record.checked is not None
    assert second.record.checked >= begun
    assert get(cache, url).record == second.record  # and is not asked for again for a while
    assert server.hits["/lora.safetensors"] == 2
    assert parts(cache) == []


def test_the_hash_that_a_request_names_brings_the_content_that_has_it(
    cache: VolumeCache, server: LoopbackServer
) -> None:
    url = server.serve("/lora.safetensors", OLD)
    first = get(cache, url)
    server.serve("/lora.safetensors", NEW)
    with pytest.raises(LoraCorrupt):
        get(cache, url, sha256="0" * 64)
    assert first.path.read_bytes() == OLD
    assert get(cache, url, sha256=first.record.sha256).downloaded is False


def test_an_open_file_and_a_mapped_one_keep_their_bytes_when_it_is_refreshed(
    cache: VolumeCache, server: LoopbackServer
) -> None:
    url = server.serve("/lora.safetensors", OLD)
    path = get(cache, url).path
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        server.serve("/lora.safetensors", NEW)
        assert get(cache, url, refresh=True).path == path
        assert path.read_bytes() == NEW
        assert mapped[:] == OLD
        assert stream.read() == OLD


def tensors(file: LoraFile) -> list[torch.Tensor]:
    """Every tensor of the file's layers."""
    values = [value for layer in file.layers for value in vars(layer.algorithm).values()]
    return [value for value in values if isinstance(value, torch.Tensor)]


def test_a_job_that_uses_the_old_file_keeps_it_when_another_refreshes(
    engine: LoraEngine, cache: VolumeCache, server: LoopbackServer
) -> None:
    library = LoraLibrary(cache, engine.key_map)
    url = server.serve("/lora.safetensors", OLD)
    used = library.load(Reference(url))
    assert used.entry.mappable
    before = [tensor.clone() for tensor in tensors(used.file)]
    server.serve("/lora.safetensors", NEW)
    newer = library.load(Reference(url, refresh=True))
    library.free()
    assert newer.file.sha256 != used.file.sha256
    assert newer.entry.path == used.entry.path
    assert len(before) >= 6
    for now, then in zip(tensors(used.file), before, strict=True):
        assert torch.equal(now, then)
    assert not all(map(torch.equal, tensors(newer.file), before))
    assert library.load(Reference(url)).file.sha256 == newer.file.sha256


GONE: dict[str, dict[str, Any]] = {
    "404": {"status": 404},
    "403": {"status": 403},
    "500": {"fail_first": 99},
    "a web page": {"body": b"<!doctype html><p>closed"},
    "cut off": {"body": NEW, "cut_after": 100},
}


@pytest.mark.parametrize("options", GONE.values(), ids=GONE.keys())
def test_a_source_that_fails_later_leaves_the_old_file_in_service_with_a_warning(
    cache: VolumeCache, server: LoopbackServer, options: dict[str, Any]
) -> None:
    url = server.serve("/lora.safetensors", OLD)
    first = get(cache, url)
    grow_old(first, DAY + 60)
    server.serve("/lora.safetensors", **options)
    for _ in range(2):
        entry = get(cache, url)
        assert entry.path.read_bytes() == OLD
        assert entry.record.sha256 == first.record.sha256
        assert len(entry.warnings) == 1
        assert entry.warnings[0].startswith(f"{first.name} may be out of date: ")
    with pytest.raises(LoraError):
        get(cache, url, refresh=True)
    assert first.path.read_bytes() == OLD
    assert parts(cache) == []


def test_a_source_that_cannot_be_reached_leaves_the_old_file_in_service(
    cache: VolumeCache,
) -> None:
    with LoopbackServer() as server:
        url = server.serve("/lora.safetensors", OLD)
        grow_old(get(cache, url), DAY + 60)
    entry = get(cache, url)
    assert entry.path.read_bytes() == OLD
    assert "the connection failed" in entry.warnings[0]


# --- a volume that is full ---------------------------------------------------------------------------


class FullFile(io.FileIO):
    """A file on a disk that takes so many bytes and no more."""

    def __init__(self, path: Path, room: int, code: int) -> None:
        super().__init__(path, "w")
        self._room, self._code = room, code

    def write(self, data: Any) -> int:
        piece = bytes(memoryview(data)[: self._room])
        if not piece:
            raise OSError(self._code, os.strerror(self._code))
        self._room -= len(piece)
        return super().write(piece)


def fill_up(monkeypatch: pytest.MonkeyPatch, room: int, code: int, only: str = "") -> None:
    """Lets new part files (whose name begins so) have so many bytes of room: as the system would say it."""
    opened = Path.open

    def on_a_full_disk(self: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        if "w" not in mode or self.suffix != ".part" or not self.name.startswith(only):
            return opened(self, mode, *args, **options)
        raw = FullFile(self, room, code)
        return raw if "b" in mode else io.TextIOWrapper(io.BufferedWriter(raw))

    monkeypatch.setattr(Path, "open", on_a_full_disk)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT], ids=["disk", "quota"])
@pytest.mark.parametrize("room", [0, 1, 10_000], ids=str)
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # a buffer's last try
def test_a_volume_that_fills_up_gives_a_clear_answer_and_keeps_no_part(
    cache: VolumeCache,
    server: LoopbackServer,
    monkeypatch: pytest.MonkeyPatch,
    room: int,
    code: int,
) -> None:
    kept = get(cache, server.serve("/kept.safetensors", OLD))
    url = server.serve("/lora.safetensors", NEW)
    with monkeypatch.context() as patch:
        fill_up(patch, room, code)
        with pytest.raises(CacheFull) as caught:
            get(cache, url)
        assert "the volume of the LoRA cache is full" in str(caught.value)
        assert cache.shelf.files() == [kept.path]
        assert parts(cache) == []
        assert get(cache, kept.name).path.read_bytes() == OLD
    assert get(cache, url).path.read_bytes() == NEW  # there is room again, and the worker goes on


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_volume_that_is_full_when_the_record_is_written_keeps_the_old_file(
    cache: VolumeCache, server: LoopbackServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = server.serve("/lora.safetensors", OLD)
    first = get(cache, url)
    server.serve("/lora.safetensors", NEW)
    replaced = Path.write_text

    def full(self: Path, text: str, *args: Any, **options: Any) -> int:
        if self.suffix == ".part":
            raise OSError(errno.ENOSPC, "No space left on device")
        return replaced(self, text, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(CacheFull):
            get(cache, url, refresh=True)
        assert parts(cache) == []
        again = get(cache, url)
        assert (again.record, again.path.read_bytes()) == (first.record, OLD)
    assert get(cache, url, refresh=True).path.read_bytes() == NEW


def test_a_volume_that_tells_only_at_the_end_that_it_is_full_keeps_no_part(
    cache: VolumeCache, server: LoopbackServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CacheFull):
            get(cache, server.serve("/lora.safetensors", NEW))
    assert cache.shelf.files() == []
    assert parts(cache) == []


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small file system, or mounts it again with other options."""
    place = tmp_path / "volume"
    place.mkdir()

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here ({done.stderr.strip()})")
        return place

    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("only root can mount a file system; the tests beside this one do without")
    yield mount
    subprocess.run(["umount", str(place)], capture_output=True, check=False)


def test_a_small_volume_evicts_then_says_what_lacks_then_fills_up(
    tmpfs: Callable[[str], Path], server: LoopbackServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = VolumeCache(tmpfs("size=4m") / "loras", LIMITS, LOOPBACK)
    bodies = [as_bytes(kohya(seed=seed, rank=560)) for seed in range(3)]  # 1.4 MB
    urls = [server.serve(f"/{n}.safetensors", body) for n, body in enumerate(bodies)]
    first, second = (get(cache, url) for url in urls[:2])
    os.utime(record_path(first.path), (1, 1))
    third = get(cache, urls[2])
    assert cache.shelf.files() == sorted([second.path, third.path])
    too_big = server.serve("/big.safetensors", as_bytes(kohya(rank=2100)))
    with pytest.raises(CacheFull) as caught:
        get(cache, too_big)
    assert "MB of room on the volume" in str(caught.value)
    assert cache.shelf.files() == sorted([second.path, third.path])
    lies = shutil.disk_usage(Path(__file__))._replace(free=1 << 40)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: lies)
    with pytest.raises(CacheFull) as caught:
        get(cache, too_big)
    assert "the volume of the LoRA cache is full" in str(caught.value)
    assert cache.shelf.files() == sorted([second.path, third.path])
    assert parts(cache) == []
    assert not get(cache, urls[2]).downloaded


# --- a volume that cannot be written -----------------------------------------------------------------


@contextmanager
def without_roots_rights() -> Iterator[None]:
    """Permissions count for this thread, and for those that it starts, even if it is root's."""
    if os.geteuid() != 0:
        yield
        return
    # man capset: a header of version 3 for this thread, and the effective, permitted and inheritable bits.
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    before = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, before) == 0
    without = type(before).from_buffer_copy(before)
    without[0] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, without) == 0
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nothing can be written, made or removed in the folder and those below it."""
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    for path in folders:
        path.chmod(0o555)
    try:
        with without_roots_rights():
            with pytest.raises(PermissionError):
                (folder / "probe").touch()
            yield
    finally:
        for path in folders:
            path.chmod(0o755)


def test_a_volume_that_turns_read_only_serves_what_it_has_and_the_rest_goes_elsewhere(
    with_fallback: VolumeCache, server: LoopbackServer, caplog: pytest.LogCaptureFixture
) -> None:
    cache = with_fallback
    volume, fallback = cache.shelf.roots
    known, new = server.serve("/known.safetensors", OLD), server.serve("/new.safetensors", NEW)
    kept = get(cache, known)
    (volume / "mine.safetensors").write_bytes(OLD)  # an operator's, never hashed so far
    with read_only(volume):
        assert get(cache, known).record == kept.record
        assert get(cache, "mine").path.read_bytes() == OLD
        assert cache.shelf.trouble is None
        entry = get(cache, new)
        assert entry.path.is_relative_to(fallback)
        assert entry.path.read_bytes() == NEW
        assert "the LoRA cache on the volume cannot be written" in str(cache.shelf.trouble)
        assert "this container's disk" in caplog.text
        assert not get(cache, new).downloaded
        assert server.hits["/new.safetensors"] == 1
    assert sorted(path.name for path in cache.shelf.files()) == sorted(
        [kept.path.name, "mine.safetensors", entry.path.name]
    )
    assert parts(cache) == []
    get(cache, server.serve("/later.safetensors", as_bytes(kohya(seed=3))))
    assert cache.shelf.trouble is None
    assert len(list(volume.glob("*.safetensors"))) == 3


def test_what_a_read_only_volume_has_of_old_is_refreshed_elsewhere(
    with_fallback: VolumeCache, server: LoopbackServer
) -> None:
    cache = with_fallback
    url = server.serve("/lora.safetensors", OLD, headers={"ETag": '"old"'})
    kept = get(cache, url)
    server.serve("/lora.safetensors", NEW)
    with read_only(cache.shelf.root):
        entry = get(cache, url, refresh=True)
        assert entry.path.read_bytes() == NEW
        assert entry.path != kept.path
        assert kept.path.read_bytes() == OLD


def test_a_read_only_volume_without_another_folder_gives_a_clear_answer(
    cache: VolumeCache, server: LoopbackServer
) -> None:
    known, new = server.serve("/known.safetensors", OLD), server.serve("/new.safetensors", NEW)
    get(cache, known)
    with read_only(cache.shelf.root):
        with pytest.raises(CacheFull) as caught:
            get(cache, new)
        assert "cannot be written" in str(caught.value)
        assert "/loras" not in str(caught.value)
        assert get(cache, known).path.read_bytes() == OLD
    assert get(cache, new).path.read_bytes() == NEW


def test_a_dead_workers_lease_that_cannot_be_removed_holds_nobody_up(
    cache: VolumeCache, server: LoopbackServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[LeaseWatch] = []

    def stays(self: LeaseWatch) -> bool:
        tries.append(self)
        assert len(tries) < 100
        return False

    url = server.serve("/lora.safetensors", OLD)
    path = get(cache, url).path
    lease = cache.shelf.root / INCOMING / f"{path.name}.lease"
    lease.touch()
    server.serve("/lora.safetensors", NEW)
    monkeypatch.setattr(LeaseWatch, "is_dead", lambda self: True)
    monkeypatch.setattr(LeaseWatch, "remove", stays)
    assert get(cache, url, refresh=True).path.read_bytes() == NEW
    assert lease.exists()


def test_a_file_system_that_is_mounted_read_only_serves_what_it_has(
    tmpfs: Callable[[str], Path], tmp_path: Path, server: LoopbackServer
) -> None:
    volume, fallback = tmpfs("size=4m") / "loras", tmp_path / "fallback"
    cache = VolumeCache(volume, LIMITS, LOOPBACK, fallback=fallback)
    known, new = server.serve("/known.safetensors", OLD), server.serve("/new.safetensors", NEW)
    get(cache, known)
    tmpfs("remount,ro")
    assert get(cache, known).path.is_relative_to(volume)
    assert get(cache, new).path.is_relative_to(fallback)
    assert "Read-only file system" in str(cache.shelf.trouble)
    tmpfs("remount,rw")
    get(cache, server.serve("/later.safetensors", NEW))
    assert cache.shelf.trouble is None


# --- a volume that vanishes --------------------------------------------------------------------------


def while_it_comes_in(
    cache: VolumeCache, server: LoopbackServer, deed: Callable[[], None]
) -> CacheEntry:
    """Gets a file, and does the deed while the server still keeps its bytes back."""
    gate = threading.Event()
    url = server.serve("/lora.safetensors", NEW, gate=gate)
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(get, cache, url)
        until(lambda: server.hits["/lora.safetensors"])
        deed()
        gate.set()
        return coming.result()


def test_a_volume_that_is_emptied_while_a_file_comes_in_harms_no_job(
    with_fallback: VolumeCache, server: LoopbackServer
) -> None:
    cache, root = with_fallback, with_fallback.shelf.root
    entry = while_it_comes_in(cache, server, lambda: shutil.rmtree(root))
    assert entry.path.read_bytes() == NEW
    assert parts(cache) == []
    later = get(cache, server.serve("/later.safetensors", OLD))
    assert later.path.is_relative_to(root)
    assert cache.shelf.trouble is None


def test_a_volume_that_vanishes_while_a_file_comes_in_is_replaced_by_the_other_folder(
    with_fallback: VolumeCache, server: LoopbackServer
) -> None:
    cache, root = with_fallback, with_fallback.shelf.root
    known = server.serve("/known.safetensors", OLD)
    get(cache, known)

    def vanish() -> None:
        shutil.rmtree(root)
        root.write_text("no folder can be made here")

    entry = while_it_comes_in(cache, server, vanish)
    assert entry.path.read_bytes() == NEW
    assert entry.path.is_relative_to(cache.shelf.roots[1])
    assert cache.shelf.trouble is not None
    assert get(cache, known).path.read_bytes() == OLD  # fetched again
    assert parts(cache) == []
    root.unlink()
    assert get(cache, server.serve("/3.safetensors", OLD)).path.is_relative_to(root)
    assert cache.shelf.trouble is None


def test_a_volume_that_vanishes_without_another_folder_gives_a_clear_answer(
    cache: VolumeCache, server: LoopbackServer
) -> None:
    root = cache.shelf.root

    def vanish() -> None:
        shutil.rmtree(root)
        root.write_text("no folder can be made here")

    with pytest.raises(CacheFull) as caught:
        while_it_comes_in(cache, server, vanish)
    assert "The volume may be gone" in str(caught.value)
    with pytest.raises(LoraError):
        get(cache, "some-name")
    root.unlink()
    url = server.url("/lora.safetensors")
    assert get(cache, url).path.read_bytes() == NEW  # the worker goes on
    assert parts(cache) == []


# --- bytes that rot ----------------------------------------------------------------------------------


def flip(path: Path, *, quietly: bool) -> None:
    """Changes a byte in the middle of a file; quietly: so that its time does not tell."""
    stat = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + (0 if quietly else 1)))


def test_a_damaged_file_is_set_aside_and_fetched_again_once_with_a_warning(
    cache: VolumeCache, server: LoopbackServer
) -> None:
    url = server.serve("/lora.safetensors", OLD)
    path = get(cache, url).path
    flip(path, quietly=False)
    rotten = path.read_bytes()
    entry = get(cache, url)
    assert entry.downloaded
    assert entry.path.read_bytes() == OLD
    said = "was changed on the volume since it was fetched; it was fetched again"
    assert entry.warnings == (f"{entry.name} {said}",)
    assert [one.read_bytes() for one in (path.parent / DAMAGED).iterdir()] == [rotten]
    assert get(cache, url).warnings == ()
    assert server.hits["/lora.safetensors"] == 2


def test_a_damaged_file_whose_source_is_gone_is_served_by_nobody(
    cache: VolumeCache, server: LoopbackServer
) -> None:
    url = server.serve("/lora.safetensors", OLD)
    entry = get(cache, url)
    flip(entry.path, quietly=False)
    server.serve("/lora.safetensors", status=404)
    for _ in range(2):
        with pytest.raises(LoraError):
            get(cache, url)
    assert cache.shelf.files() == []
    server.serve("/lora.safetensors", OLD)
    assert get(cache, url, refresh=True).path.read_bytes() == OLD


def test_a_damaged_file_that_is_named_by_its_file_name_is_an_error(
    cache: VolumeCache, server: LoopbackServer
) -> None:
    entry = get(cache, server.serve("/lora.safetensors", OLD))
    flip(entry.path, quietly=False)
    with pytest.raises(LoraCorrupt) as caught:
        cache.find(CachedName(entry.name))
    assert "was changed on the volume" in str(caught.value)


def test_verify_finds_a_flipped_byte_that_no_time_tells_of(
    cache: VolumeCache, server: LoopbackServer
) -> None:
    urls = [server.serve(f"/{n}.safetensors", as_bytes(kohya(seed=n))) for n in range(3)]
    entries = [get(cache, url) for url in urls]
    (cache.shelf.root / "mine.safetensors").write_bytes(OLD)
    (cache.shelf.root / "half.safetensors").write_bytes(OLD[:-1])
    names = {entry.name: True for entry in entries} | {
        "mine.safetensors": True,
        "half.safetensors": False,
    }
    assert cache.shelf.verify() == names
    flip(entries[1].path, quietly=True)
    assert not get(cache, urls[1]).downloaded  # nothing tells until somebody reads all of it
    assert cache.shelf.verify() == {**names, entries[1].name: False}
    record = read_as(Record, record_path(entries[1].path))
    assert record == entries[1].record


def test_a_record_that_cannot_be_read_is_made_anew(
    cache: VolumeCache, server: LoopbackServer
) -> None:
    url = server.serve("/lora.safetensors", OLD)
    entry = get(cache, url)
    for text in ("", "{", "[]", '{"source": 1}', "\0" * 300):
        record_path(entry.path).write_text(text)
        again = get(cache, url)
        assert again.path.read_bytes() == OLD
        assert again.record.sha256 == entry.record.sha256
