"""Clocks that jump: nothing alive is swept, and nothing old counts as new."""

from __future__ import annotations

import os
import random
import threading
import time
from pathlib import Path

import pytest

from lora.fetch.sources import Reference
from lora.volume.cache import CacheEntry, Limits, VolumeCache
from lora.volume.records import INCOMING
from tests.adapters import as_bytes, kohya
from tests.promises.attackers.rounds import Rounds
from tests.server import LOOPBACK, LoopbackServer
from tests.waiting import PATIENCE, until

HOUR = 3600.0
LIMITS = Limits(tries=1, pause=0.01, ttl=HOUR, timeout=PATIENCE, stall=PATIENCE)
OLD, NEW = as_bytes(kohya(seed=1)), as_bytes(kohya(seed=2))


class Wall:
    """A clock on the wall that jumps. What measures how long something takes is another one."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._real, self.ahead = time.time, 0.0
        patch.setattr(time, "time", lambda: self._real() + self.ahead)

    def jump(self, chance: random.Random) -> float:
        """By seconds, hours or years, forwards or back."""
        size = chance.choice((30.0, HOUR, 30 * HOUR, 9000 * HOUR, 90_000 * HOUR))
        self.ahead = chance.choice((-1, 1)) * size * chance.uniform(1.1, 2)
        return self.ahead


def get(cache: VolumeCache, url: str) -> CacheEntry:
    return cache.get(cache.resolve(Reference(url)))


def test_no_jump_of_a_clock_sweeps_what_lives_or_keeps_what_is_old(
    rounds: Rounds, server: LoopbackServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wall = Wall(monkeypatch)
    for chance in rounds(12, 1000):
        root, path = tmp_path / str(rounds.done), f"/{rounds.done}.safetensors"
        gate, got = threading.Event(), list[CacheEntry]()
        url = server.serve(path, OLD, gate=gate)
        mine, other = (VolumeCache(root, LIMITS, LOOPBACK) for _ in range(2))
        thread = threading.Thread(target=lambda: got.append(get(mine, url)))  # noqa: B023
        thread.start()
        until(lambda: server.hits[path])  # noqa: B023
        alive = root / INCOMING / ".x.anotherboot_pid:[1]_7_7.0123456789abcdef.part"
        dead = root / INCOMING / ".y.anotherboot_pid:[1]_7_7.0123456789abcdef.part"
        for part in (alive, dead):
            part.write_bytes(b"x")
        long_ago = dead.stat().st_mtime - 3 * LIMITS.timeout
        os.utime(dead, (long_ago, long_ago))
        wall.jump(chance)
        other.shelf.prepare()
        assert (alive.exists(), dead.exists()) == (True, False)
        wall.jump(chance)
        gate.set()
        thread.join(PATIENCE)
        assert got[0].path.read_bytes() == OLD
        jumped = -wall.ahead
        wall.ahead = chance.choice((0.0, wall.jump(chance)))
        jumped += wall.ahead
        server.serve(path, NEW)
        seen = get(other, url).path.read_bytes()
        assert seen in (OLD, NEW)
        if abs(jumped) > 1.05 * HOUR:
            rounds.seen["asked again"] += 1
            assert seen == NEW
        assert (root / INCOMING).exists()
        wall.ahead = 0.0
