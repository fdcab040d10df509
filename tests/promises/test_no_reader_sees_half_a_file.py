"""Many worker processes on one folder, some of which die: nobody ever gets a wrong byte."""

from __future__ import annotations

import itertools
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from lora.fetch.sources import Reference
from lora.volume.cache import CacheEntry, Limits, VolumeCache
from lora.volume.records import DAMAGED, INCOMING
from tests.lora.workers import Job, Workers, adapter, sha256
from tests.server import LOOPBACK, LoopbackServer

pytestmark = pytest.mark.slow

SEED = int(os.environ.get("CACHE_TEST_SEED") or random.SystemRandom().randrange(1 << 32))
"""What the random moments are made of. To see a failure again: CACHE_TEST_SEED=… pytest …"""

KILLS = 100
"""A few more rounds are needed: some processes are done before their murderer comes."""

AT_ONCE = 4

SIZE = 300_000
SECONDS = 0.12
"""How long the slow server takes for a file."""

LEASE = 30.0
"""Seconds of silence: more than a busy machine keeps a living process from its work. A dead process of this
machine whose lease has its name is taken over at once."""

HONEST_OR_NOT = pytest.mark.parametrize("useless", [False, True], ids=["lease", "useless lease"])
NEW_OR_REFRESHED = pytest.mark.parametrize("refresh", [False, True], ids=["new", "refreshed"])


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with Workers() as running:
        yield running


@dataclass(frozen=True)
class Scene:
    """A folder and a file that many ask for."""

    job: Job
    new: str
    """The sha256 of what the server has."""
    old: str | None
    """That of what lies in the folder already."""

    @property
    def right(self) -> set[str]:
        """What a reader may see."""
        return {self.new, self.old} - {None}  # type: ignore[return-value]

    @property
    def root(self) -> Path:
        return Path(self.job.folder)

    def check(self, told: list[dict[str, Any]], why: str, *, gets: int | None = None) -> None:
        """Nothing but right bytes, each with its own hash. `gets`: so often, and always the new ones."""
        assert not [news for news in told if "error" in news], (why, told)
        got = [news for news in told if "bytes" in news]
        assert {news["bytes"] for news in got} <= self.right, (why, told)
        assert all(news.get("record", news["bytes"]) == news["bytes"] for news in got), (why, told)
        if gets is not None:
            assert [news["bytes"] for news in got] == [self.new] * gets, (why, told)

    def check_end(self, why: str) -> None:
        """The next one gets the right file; what the dead left is swept; nothing else lies around."""
        cache = VolumeCache(self.root, Limits(lease=LEASE), LOOPBACK)
        entry = get(cache, self.job.url, refresh=self.job.refresh)
        assert sha256(entry.path.read_bytes()) == entry.record.sha256 == self.new, why
        long_ago = time.time() - 3 * cache.limits.timeout
        for path in (self.root / INCOMING).iterdir():
            os.utime(path, (long_ago, long_ago))
        cache.shelf.prepare()
        assert list((self.root / INCOMING).iterdir()) == [], why
        assert cache.shelf.files() == [entry.path], why
        assert cache.shelf.verify() == {entry.name: True}, why


SetUp = Callable[..., Scene]


@pytest.fixture
def scene(server: LoopbackServer, tmp_path: Path) -> SetUp:
    def set_up(name: object, *, refresh: bool, useless: bool, seconds: float = SECONDS) -> Scene:
        """A file at the slow server; with `refresh` its older content is in the folder, and does not last."""
        folder, path = tmp_path / str(name), f"/{name}/lora.safetensors"
        old, new = (adapter(SIZE, (SEED, name, which)) for which in ("old", "new"))
        if refresh:
            get(VolumeCache(folder, web=LOOPBACK), serve(server, path, old))
        url = serve(server, path, new, seconds)
        job = Job("fetch", str(folder), url, LEASE, refresh=refresh, useless_lease=useless)
        return Scene(job, sha256(new), sha256(old) if refresh else None)

    return set_up


def serve(server: LoopbackServer, path: str, body: bytes, seconds: float = 0.0) -> str:
    return server.serve(path, body, etag=f'"{sha256(body)}"', seconds=seconds)


def get(cache: VolumeCache, url: str, *, refresh: bool = False) -> CacheEntry:
    return cache.get(cache.resolve(Reference(url, refresh=refresh)))


def test_eight_processes_of_four_threads_share_one_download(
    workers: Workers, server: LoopbackServer, tmp_path: Path
) -> None:
    body = adapter(64 << 20, "64 MB")
    gate = threading.Event()
    url = server.serve("/big.safetensors", body, gate=gate)
    folder = tmp_path / "loras"
    started = [workers.start(Job("fetch", str(folder), url, threads=4)) for _ in range(8)]
    for worker in started:
        worker.until("asks")
    gate.set()
    told = [news for worker in started for news in worker.rest()]
    assert not [news for news in told if "error" in news], told
    assert len(told) == 32
    assert {(news["bytes"], news["record"]) for news in told} == {(sha256(body), sha256(body))}
    assert server.hits["/big.safetensors"] == 1
    assert sum(news["downloaded"] for news in told) == 1
    assert [path.stat().st_size for path in folder.glob("*.safetensors")] == [len(body)]
    assert list((folder / INCOMING).iterdir()) == []


@HONEST_OR_NOT
@NEW_OR_REFRESHED
def test_a_hundred_processes_killed_at_random_moments_harm_nobody(
    workers: Workers, scene: SetUp, refresh: bool, useless: bool
) -> None:
    def one_round(number: int) -> tuple[bool, float]:
        return _killed_at_random(workers, scene(number, refresh=refresh, useless=useless), number)

    rounds: list[tuple[bool, float]] = []
    numbers = itertools.count()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        while (missing := KILLS - sum(killed for killed, _ in rounds)) > 0:
            assert len(rounds) < 2 * KILLS, f"CACHE_TEST_SEED={SEED}: most are never killed"
            rounds += pool.map(one_round, itertools.islice(numbers, missing))
    times = sorted(seconds for _, seconds in rounds)
    print(
        f"CACHE_TEST_SEED={SEED}: {KILLS} were killed in {len(rounds)} rounds; the others had the file "
        f"{times[len(times) // 2]:.2f} s later, {times[-1]:.2f} s at most"
    )
    # Who dies between making a lease and writing its name into it must be waited for. It is seldom.
    assert times[len(times) * 9 // 10] < LEASE, f"CACHE_TEST_SEED={SEED}"


def _killed_at_random(workers: Workers, scene: Scene, number: int) -> tuple[bool, float]:
    """One round: a process dies while two wait for its download and two read.

    Whether it died in time, and the seconds until the last of the others had the file.
    """
    rng = random.Random(f"{SEED} {number}")
    operation, delay = rng.randrange(1, 20), rng.uniform(0, SECONDS)
    by_clock = rng.random() < 0.5
    why = f"CACHE_TEST_SEED={SEED}, round {number}, killed "
    why += f"after {delay:.3f} s" if by_clock else f"before file operation {operation}"
    job = scene.job
    readers = [workers.start(replace(job, what="watch"))]
    if scene.old:
        readers.append(workers.start(replace(job, what="read", refresh=False)))
    victim = workers.start(replace(job, die_before=None if by_clock else operation))
    if by_clock:
        victim.until("asks")
    waiting = [workers.start(replace(job, threads=2)) for _ in range(2)]
    if by_clock:
        time.sleep(delay)
        victim.send(signal.SIGKILL)
    told = victim.rest()
    died = time.monotonic()
    results = [news for worker in waiting for news in worker.rest()]
    scene.check(results, why, gets=4)
    seconds = max(news.get("at", 0.0) for news in results) - died
    scene.check([*told, *(news for reader in readers for news in reader.end())], why)
    scene.check_end(why)
    return not any("bytes" in news for news in told), seconds


@HONEST_OR_NOT
@NEW_OR_REFRESHED
def test_a_process_killed_before_any_of_its_file_operations_harms_nobody(
    workers: Workers, scene: SetUp, refresh: bool, useless: bool
) -> None:
    def one_round(operation: int) -> tuple[bool, int]:
        """Whether it died (it is done before the last numbers), and how many files were set aside."""
        why = f"killed before file operation {operation}"
        one = scene(operation, refresh=refresh, useless=useless, seconds=0.0)
        told = workers.start(replace(one.job, die_before=operation)).rest()
        one.check(told, why)
        if refresh:  # whoever does not ask for the newest gets one of both
            one.check(workers.start(replace(one.job, refresh=False)).rest(), why)
        one.check(workers.start(one.job).rest(), why, gets=1)
        set_aside = len(list((one.root / DAMAGED).glob("*")))
        one.check_end(why)
        return not any("bytes" in news for news in told), set_aside

    with ThreadPoolExecutor(AT_ONCE) as pool:
        rounds = list(pool.map(one_round, range(1, 41)))
    died, set_aside = zip(*rounds, strict=True)
    count = died.index(False)
    assert count > 15
    assert not any(died[count:])
    # A kill between the two renames leaves a new record and the old file, which the record names, too.
    assert not any(set_aside), set_aside


def test_a_process_that_freezes_is_overtaken_and_harms_nobody_when_it_wakes(
    workers: Workers, scene: SetUp
) -> None:
    silence = 0.6

    def one_round(number: int) -> None:
        rng = random.Random(f"{SEED} freeze {number}")
        delay = rng.uniform(0, SECONDS)
        why = f"CACHE_TEST_SEED={SEED}, round {number}, frozen after {delay:.3f} s"
        one = scene(number, refresh=number % 2 == 1, useless=False)
        job = replace(one.job, lease=silence)
        frozen = workers.start(job)
        frozen.until("asks")
        time.sleep(delay)
        frozen.send(signal.SIGSTOP)
        waiting = [workers.start(job) for _ in range(2)]
        results = [news for worker in waiting for news in worker.rest()]
        frozen.send(signal.SIGCONT)  # not before: they did not wait for it
        one.check(results, why, gets=2)
        one.check(frozen.rest(), why, gets=1)
        assert list((one.root / INCOMING).iterdir()) == [], why
        one.check_end(why)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(one_round, range(12)))


def test_each_reader_gets_the_hash_of_its_bytes_while_everybody_refreshes(
    workers: Workers, scene: SetUp, server: LoopbackServer
) -> None:
    one = scene("changing", refresh=True, useless=True)
    path = "/changing/lora.safetensors"
    bodies = [adapter(SIZE, (SEED, number)) for number in range(6)]
    readers = [workers.start(replace(one.job, what="read")) for _ in range(3)]
    readers.append(workers.start(replace(one.job, what="read", refresh=False)))
    end = time.monotonic() + 5
    for number in range(10_000):
        serve(server, path, bodies[number % len(bodies)], 0.005)
        time.sleep(0.02)
        if time.monotonic() > end:
            break
    told = [news for reader in readers for news in reader.end()]
    known = {sha256(body) for body in bodies} | one.right
    assert not [news for news in told if "error" in news], told
    wrong = [news for news in told if "bytes" in news and news["bytes"] != news["record"]]
    assert not wrong, f"CACHE_TEST_SEED={SEED}: {wrong}"
    assert {news["bytes"] for news in told if "bytes" in news} <= known
