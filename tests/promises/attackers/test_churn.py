"""Lists, scans and clean-ups while another worker adds, renames, breaks and removes what they look at."""

from __future__ import annotations

import os
import random
import shutil
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from handler import Worker
from lora.fetch.sources import Reference
from lora.volume.cache import Limits, VolumeCache
from tests.adapters import as_bytes, kohya
from tests.promises.attackers.rounds import Rounds
from tests.server import LOOPBACK, LoopbackServer

ADAPTER = as_bytes(kohya())


class Churn:
    """A thread that changes a folder at random, as other workers and people do."""

    def __init__(self, folder: Path, chance: random.Random) -> None:
        self._folder, self._chance = folder, chance
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.changes = 0

    def __enter__(self) -> Churn:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self) -> Path:
        inner = self._chance.choice((".", "sub", "sub/deep", "peft"))
        name = self._chance.choice(("a", "b", "c", "adapter_model"))
        ending = self._chance.choice(
            (".safetensors", ".safetensors", ".pt", "", ".safetensors.json")
        )
        return self._folder / inner / f"{name}{ending}"

    def _run(self) -> None:
        ways = (self._write, self._grow, self._remove, self._rename, self._link, self._clear)
        while not self._ended.is_set():
            with suppress(OSError):
                path = self._path()
                path.parent.mkdir(parents=True, exist_ok=True)
                self._chance.choice(ways)(path)
            self.changes += 1

    def _write(self, path: Path) -> None:
        path.write_bytes(ADAPTER)

    def _grow(self, path: Path) -> None:
        with path.open("wb") as stream:
            for start in range(0, len(ADAPTER), 4096):
                stream.write(ADAPTER[start : start + 4096])
                stream.flush()

    def _remove(self, path: Path) -> None:
        path.unlink()

    def _rename(self, path: Path) -> None:
        path.rename(self._path())

    def _link(self, path: Path) -> None:
        path.symlink_to(self._chance.choice((path, Path("/nowhere"), self._path(), path.parent)))

    def _clear(self, path: Path) -> None:
        shutil.rmtree(path.parent, ignore_errors=True)
        os.utime(self._folder)


ACTIONS = (
    *("health", "loras.list", "library.scan", "library.list", "library.activate"),
    *("library.deactivate", "loras.inspect", "presets.list"),
)


def test_every_list_answers_under_churn(rounds: Rounds, demo_worker: Worker) -> None:
    folder = demo_worker.settings.lora_cache_dir / "churn"
    with Churn(folder, random.Random(7)) as churn:
        for chance in rounds(60, 3000):
            action = chance.choice(ACTIONS)
            name = chance.choice(("churn/a", "churn/sub/b", "churn/peft", "churn/sub/deep/c"))
            field = {"loras.inspect": "path"}.get(action, "name")
            needs = action in ("library.activate", "library.deactivate", "loras.inspect")
            about = {field: name} if needs else {}
            answer = demo_worker({"id": "x", "input": {"action": action, **about}})
            error = answer.get("error", "")
            assert not error.startswith("INTERNAL"), (action, name, error)
            assert needs or not error, (action, error)
            rounds.seen["errors" if error else "answers"] += 1
        rounds.seen["changes"] = churn.changes
    assert churn.changes


@pytest.fixture
def budget() -> Iterator[int]:
    yield 3 * len(ADAPTER)


def test_room_is_made_under_churn_and_no_volume_counts_as_lost(
    rounds: Rounds, server: LoopbackServer, tmp_path: Path, budget: int
) -> None:
    limits = Limits(total_bytes=budget, tries=1, pause=0.01)
    cache = VolumeCache(tmp_path / "loras", limits, LOOPBACK)
    with Churn(tmp_path / "loras" / "churn", random.Random(8)):
        for _ in rounds(15, 1000):
            url = server.serve(f"/{rounds.done}.safetensors", ADAPTER)
            entry = cache.get(cache.resolve(Reference(url)))
            assert entry.path.read_bytes() == ADAPTER
            assert cache.shelf.trouble is None
    downloaded = list((tmp_path / "loras").glob("*.safetensors"))
    assert len(downloaded) * len(ADAPTER) <= budget
