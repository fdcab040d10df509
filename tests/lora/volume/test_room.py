"""What goes when room is needed, and what stays."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

from lora.errors import CacheFull, LoraNotFound
from lora.fetch.sources import CachedName, Reference
from lora.volume import room as room_module
from lora.volume.adapters import adapters_in
from lora.volume.cache import CacheEntry, Limits, VolumeCache
from lora.volume.records import DAMAGED, INCOMING, Record, pin_path, record_path, write
from lora.volume.room import RESERVE, Room
from tests.adapters import as_bytes, kohya
from tests.server import LOOPBACK, LoopbackServer

MB = 1_000_000

SIZE = len(as_bytes(kohya()))


class Disk(NamedTuple):
    total: int
    used: int
    free: int


def put(root: Path, name: str, size: int, age: float, *, fetched: bool = True) -> Path:
    """A file of the cache that was used so many seconds ago; an operator's if it was not fetched."""
    path = root / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        stream.truncate(size)
    when = time.time() - age
    mtime = path.stat().st_mtime_ns
    write(root, record_path(path), Record(name, "0" * 64, size, mtime, when if fetched else None))
    os.utime(record_path(path), (when, when))
    return path


def free_bytes(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    """Lets the disk have so many bytes left."""
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Disk(10**12, 10**12 - free, free))


def names(root: Path) -> list[str]:
    """The files that are left, and their records."""
    files, records = (
        sorted(path.name.removesuffix(end) for path in root.glob(f"*{end}"))
        for end in (".safetensors", ".safetensors.json")
    )
    assert files == records
    return files


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """A folder with files of 10 MB; `old` was used longest ago."""
    for name, age in (("old", 300), ("new", 100), ("middle", 200)):
        put(tmp_path, name, 10 * MB, age)
    return tmp_path


def make_room(
    root: Path, size: int, to_write: int, budget: int | None, in_use: Iterable[Path]
) -> None:
    room = Room(budget)
    with ExitStack() as stack:
        for path in in_use:
            stack.enter_context(room.in_use(path))
        room.make(root, size, to_write)


# --- the budget --------------------------------------------------------------------------------------


def test_nothing_goes_as_long_as_the_budget_lasts(three: Path) -> None:
    make_room(three, 5 * MB, 5 * MB, 35 * MB, ())
    assert names(three) == ["middle", "new", "old"]


@pytest.mark.parametrize(
    ("size", "left"),
    [
        (5 * MB + 1, ["middle", "new"]),
        (15 * MB, ["middle", "new"]),
        (16 * MB, ["new"]),
        (35 * MB, []),
    ],
)
def test_what_was_used_longest_ago_goes_first_and_no_more_than_must(
    three: Path, size: int, left: list[str]
) -> None:
    make_room(three, size, size, 35 * MB, ())
    assert names(three) == left


def test_without_a_budget_and_with_room_on_the_disk_nothing_goes(three: Path) -> None:
    make_room(three, 500 * MB, 500 * MB, None, ())
    assert names(three) == ["middle", "new", "old"]


def test_what_must_stay_stays_and_the_next_goes(three: Path) -> None:
    make_room(three, 10 * MB, 10 * MB, 35 * MB, {three / "old.safetensors"})
    assert names(three) == ["new", "old"]


def test_what_is_pinned_stays_and_the_next_goes(three: Path) -> None:
    pin_path(three / "old.safetensors").touch()
    make_room(three, 10 * MB, 10 * MB, 35 * MB, ())
    assert names(three) == ["new", "old"]


def test_an_operators_files_are_neither_counted_nor_removed(three: Path) -> None:
    put(three, "mine", 900 * MB, 9000, fetched=False)
    (three / "bare.safetensors").write_bytes(bytes(MB))  # never asked for: it has no record
    make_room(three, 10 * MB, 10 * MB, 35 * MB, ())
    assert (three / "bare.safetensors").exists()
    (three / "bare.safetensors").unlink()
    assert names(three) == ["middle", "mine", "new"]


def test_downloads_under_way_and_damaged_files_are_neither_counted_nor_removed(three: Path) -> None:
    for folder in (INCOMING, DAMAGED):
        put(three / folder, "x", 500 * MB, 9000)
    make_room(three, 5 * MB, 5 * MB, 35 * MB, ())
    assert names(three) == ["middle", "new", "old"]
    for folder in (INCOMING, DAMAGED):
        assert (three / folder / "x.safetensors").exists()


def test_files_in_folders_of_the_cache_count_and_go(three: Path) -> None:
    oldest = put(three, "folder/oldest", 10 * MB, 400)
    make_room(three, 5 * MB, 5 * MB, 35 * MB, ())
    assert not oldest.exists()
    assert not record_path(oldest).exists()
    assert names(three) == ["middle", "new", "old"]


def test_a_file_that_another_worker_removes_meanwhile_is_no_fault(
    three: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(three, "gone", 10 * MB, 0)
    adapters = list(adapters_in(three))
    monkeypatch.setattr(room_module, "adapters_in", lambda root: adapters)
    (three / "gone.safetensors").unlink()
    make_room(three, 10 * MB, 10 * MB, 35 * MB, ())
    record_path(three / "gone.safetensors").unlink()
    assert names(three) == ["middle", "new"]


# --- the disk ----------------------------------------------------------------------------------------


def test_a_full_disk_evicts_what_was_used_longest_ago(
    three: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free_bytes(monkeypatch, 2 * MB)
    make_room(three, 12 * MB, 12 * MB, None, ())
    assert names(three) == ["new"]


def test_only_what_is_still_to_be_written_needs_room_on_the_disk(
    three: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free_bytes(monkeypatch, RESERVE + MB)
    make_room(three, 900 * MB, MB, None, ())
    assert names(three) == ["middle", "new", "old"]


@pytest.mark.parametrize(
    ("budget", "free", "left"),
    [
        (35 * MB, RESERVE + 10 * MB, ["middle", "new"]),  # the budget asks for more
        (90 * MB, RESERVE, ["middle", "new"]),  # the disk does
        (35 * MB, RESERVE - 5 * MB, ["new"]),
    ],
)
def test_the_budget_and_the_disk_together_take_no_more_than_the_stricter(
    three: Path, monkeypatch: pytest.MonkeyPatch, budget: int, free: int, left: list[str]
) -> None:
    free_bytes(monkeypatch, free)
    make_room(three, 10 * MB, 10 * MB, budget, ())
    assert names(three) == left


# --- when it does not suffice ------------------------------------------------------------------------


def test_a_budget_that_cannot_be_met_says_by_how_much_and_removes_nothing(three: Path) -> None:
    with pytest.raises(CacheFull) as caught:
        make_room(three, 40 * MB, 40 * MB, 35 * MB, {three / "new.safetensors"})
    said = "CACHE_FULL: the LoRA cache lacks 15.0 MB of its budget. "
    assert str(caught.value) == said + "Raise LORA_CACHE_MAX_GB or remove files."
    assert names(three) == ["middle", "new", "old"]


def test_a_disk_that_cannot_be_freed_says_by_how_much_and_removes_nothing(
    three: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin_path(three / "middle.safetensors").touch()
    free_bytes(monkeypatch, RESERVE)
    with pytest.raises(CacheFull) as caught:
        make_room(three, 27 * MB, 27 * MB, None, {three / "new.safetensors"})
    said = "CACHE_FULL: the LoRA cache lacks 17.0 MB of room on the volume. "
    assert str(caught.value) == said + "Make the volume larger or remove files."
    assert names(three) == ["middle", "new", "old"]


def test_a_budget_that_can_be_met_goes_for_nothing_if_the_disk_cannot(
    three: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free_bytes(monkeypatch, 0)
    with pytest.raises(CacheFull):
        make_room(three, 10 * MB, 100 * MB, 35 * MB, ())
    assert names(three) == ["middle", "new", "old"]


# --- through the cache -------------------------------------------------------------------------------


def get(cache: VolumeCache, url: str) -> CacheEntry:
    return cache.get(cache.resolve(Reference(url)))


@pytest.fixture
def cache(tmp_path: Path) -> VolumeCache:
    """Room for two files."""
    return VolumeCache(tmp_path / "loras", Limits(total_bytes=int(2.5 * SIZE)), LOOPBACK)


@pytest.fixture
def two(cache: VolumeCache, server: LoopbackServer) -> list[CacheEntry]:
    """Two files, the first used before the second, and both a while ago."""
    entries = [get(cache, serve(server, number)) for number in (1, 2)]
    for age, entry in zip((200, 100), entries, strict=True):
        when = time.time() - age
        os.utime(record_path(entry.path), (when, when))
    return entries


def serve(server: LoopbackServer, number: int) -> str:
    return server.serve(f"/{number}.safetensors", as_bytes(kohya(seed=number)))


@pytest.mark.parametrize("by", ["url", "name"])
def test_a_use_saves_a_file_from_being_the_oldest(
    cache: VolumeCache, server: LoopbackServer, two: list[CacheEntry], by: str
) -> None:
    if by == "url":
        assert not get(cache, serve(server, 1)).downloaded
    else:
        cache.find(CachedName(two[0].name))
    third = get(cache, serve(server, 3))
    assert cache.shelf.files() == sorted([two[0].path, third.path])


def test_a_pin_saves_a_file_until_it_is_taken_away(
    cache: VolumeCache, server: LoopbackServer, two: list[CacheEntry]
) -> None:
    first, second = two
    cache.pin(first.name)
    os.utime(record_path(first.path), (1, 1))
    third = get(cache, serve(server, 3))
    assert cache.shelf.files() == sorted([first.path, third.path])
    cache.unpin(first.path.stem)
    os.utime(record_path(first.path), (1, 1))
    fourth = get(cache, serve(server, 4))
    assert cache.shelf.files() == sorted([third.path, fourth.path])
    assert not pin_path(first.path).exists()
    assert not second.path.exists()


def test_a_pin_is_seen_by_every_worker(
    cache: VolumeCache, server: LoopbackServer, two: list[CacheEntry]
) -> None:
    VolumeCache(cache.shelf.root).pin(two[0].name)
    os.utime(record_path(two[0].path), (1, 1))
    get(cache, serve(server, 3))
    assert two[0].path.exists()


def test_what_is_not_there_cannot_be_pinned(cache: VolumeCache) -> None:
    for change in (cache.pin, cache.unpin):
        with pytest.raises(LoraNotFound):
            change("no-such-lora")
    assert not cache.shelf.root.exists()


def test_a_pin_can_be_taken_away_twice(cache: VolumeCache, two: list[CacheEntry]) -> None:
    cache.pin(two[0].name)
    cache.pin(two[0].name)
    cache.unpin(two[0].name)
    cache.unpin(two[0].name)
    assert not pin_path(two[0].path).exists()


def test_files_in_use_stay_until_their_last_user_is_done(
    cache: VolumeCache, server: LoopbackServer, two: list[CacheEntry]
) -> None:
    first, second = two
    with cache.in_use(first.path), cache.in_use(second.path):
        with cache.in_use(first.path):
            pass
        with pytest.raises(CacheFull) as caught:
            get(cache, serve(server, 3))
        assert cache.shelf.files() == sorted([first.path, second.path])
    lacking = 3 * SIZE - int(2.5 * SIZE)
    assert f"lacks {lacking / 1e6:.1f} MB of its budget" in str(caught.value)
    third = get(cache, serve(server, 3))
    assert cache.shelf.files() == sorted([second.path, third.path])


def test_a_file_that_does_not_fit_is_refused_before_its_bytes_come(
    cache: VolumeCache, server: LoopbackServer, two: list[CacheEntry]
) -> None:
    for entry in two:
        cache.pin(entry.name)
    told: list[int] = []
    place = cache.resolve(Reference(serve(server, 3)))
    with pytest.raises(CacheFull):
        cache.get(place, lambda done, total: told.append(done))
    assert told == []
    assert list((cache.shelf.root / INCOMING).iterdir()) == []


def test_a_file_is_refreshed_in_a_budget_that_does_not_hold_it_twice(
    tmp_path: Path, server: LoopbackServer
) -> None:
    cache = VolumeCache(tmp_path, Limits(total_bytes=int(2.5 * SIZE)), LOOPBACK)
    first, other = (get(cache, serve(server, number)) for number in (1, 2))
    cache.pin(other.name)
    changed = as_bytes(kohya(seed=9))
    url = server.serve("/1.safetensors", changed)
    again = cache.get(cache.resolve(Reference(url, refresh=True)))
    assert again.path == first.path
    assert again.path.read_bytes() == changed
    assert other.path.exists()
