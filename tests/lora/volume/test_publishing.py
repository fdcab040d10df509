"""The old file serves until the new one has its name, wherever a worker is stopped between the two."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora.fetch.sources import Reference
from lora.volume.cache import CacheEntry, Limits, VolumeCache
from lora.volume.records import DAMAGED, INCOMING, Record, read_as, record_path
from tests.adapters import as_bytes, kohya
from tests.server import LOOPBACK, LoopbackServer

OLD, NEW = as_bytes(kohya(seed=1)), as_bytes(kohya(seed=2))

LIMITS = Limits(tries=1, pause=0.01, ttl=0)


class Killed(BaseException):
    """Ends a worker there and then: nothing catches it but what runs on the way out."""


def another_worker(root: Path) -> VolumeCache:
    return VolumeCache(root, LIMITS, LOOPBACK)


def get(cache: VolumeCache, url: str) -> CacheEntry:
    return cache.get(cache.resolve(Reference(url)))


def failing(real: Callable[..., Any], number: int, error: BaseException) -> Callable[..., Any]:
    """The function, whose call of this number fails."""
    calls = [0]

    def call(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == number:
            raise error
        return real(*args, **options)

    return call


PLACES: dict[str, tuple[object, str]] = {
    "sync": (os, "fsync"),
    "rename": (Path, "replace"),
    "time": (os, "utime"),
}


@pytest.mark.parametrize("number", range(1, 6))
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "error",
    [Killed(), OSError(errno.ENOSPC, "No space left"), OSError(errno.EIO, "Input/output error")],
    ids=["killed", "full", "broken"],
)
def test_whatever_ends_a_download_the_old_file_serves_while_its_source_is_down(
    tmp_path: Path,
    server: LoopbackServer,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    number: int,
    error: BaseException,
) -> None:
    url = server.serve("/lora.safetensors", OLD)
    old = get(another_worker(tmp_path), url)
    server.serve("/lora.safetensors", NEW)
    owner, name = PLACES[place]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing(getattr(owner, name), number, error))
        try:
            seen = get(another_worker(tmp_path), url).path.read_bytes()
        except Killed:
            seen = OLD
    assert seen in (OLD, NEW)
    bytes_now = old.path.read_bytes()
    assert bytes_now in (OLD, NEW)
    server.serve("/lora.safetensors", b"", status=500)
    served = get(another_worker(tmp_path), url)
    assert served.path.read_bytes() == bytes_now
    assert "may be out of date" in served.warnings[0]
    assert not list((tmp_path / DAMAGED).glob("*"))
    assert not list((tmp_path / INCOMING).glob("*.part"))


def test_a_worker_that_was_killed_twice_in_a_row_leaves_the_file_of_before(
    tmp_path: Path, server: LoopbackServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = server.serve("/lora.safetensors", OLD)
    old = get(another_worker(tmp_path), url)
    for seed in (2, 3):
        server.serve("/lora.safetensors", as_bytes(kohya(seed=seed)))
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Path, "replace", failing(Path.replace, 2, Killed()))
            get(another_worker(tmp_path), url)
    record = read_as(Record, record_path(old.path))
    assert record is not None
    assert record.before == old.record
    assert another_worker(tmp_path).shelf.verify() == {old.name: True}


def test_two_contents_of_one_size_within_a_tick_of_a_slow_clock_are_told_apart(
    tmp_path: Path, server: LoopbackServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.utime

    def whole_seconds(path: Any, times: Any = None, *, ns: tuple[int, int] | None = None) -> None:
        second = 10**9
        if ns:
            real(path, ns=(ns[0] // second * second, ns[1] // second * second))
        else:
            real(path, times)

    monkeypatch.setattr(os, "utime", whole_seconds)
    monkeypatch.setattr("time.time_ns", lambda: 1_800_000_000_500_000_000)
    url = server.serve("/lora.safetensors", OLD)
    first = get(another_worker(tmp_path), url)
    server.serve("/lora.safetensors", NEW)
    second = get(another_worker(tmp_path), url)
    assert first.record.size == second.record.size
    assert first.record.mtime_ns != second.record.mtime_ns
    assert second.path.read_bytes() == NEW
    server.serve("/lora.safetensors", b"", status=500)
    assert get(another_worker(tmp_path), url).record.sha256 == second.record.sha256
