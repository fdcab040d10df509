"""Workers and tools that are killed at random moments: whole files or none, and nothing left over.

The checker knows nothing of records and parts: it compares bytes with those that the server sent, or that the
tool made when nobody killed it.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from lora.fetch.sources import Reference
from lora.volume.cache import CacheEntry, Limits, VolumeCache
from lora.volume.records import DAMAGED, INCOMING
from tests.conftest import ROOT
from tests.lora.workers import Job, WorkerProcess, Workers, adapter, sha256
from tests.promises.attackers.rounds import Rounds
from tests.server import LOOPBACK, LoopbackServer

LIMITS = Limits(tries=1, pause=0.01, ttl=0)
SIZE = 200_000

COMMANDS = {
    "convert": ("convert", "{stripes}", "--naming", "original"),
    "resize": ("resize", "{stripes}", "--rank", "2"),
    "merge": ("merge", "--source-model", "{model}", "--lora-model", "{stripes}:0.8"),
}
ENDINGS = (".safetensors", ".pt")


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    """With what the tools import, so that a thousand of them cost little."""
    models = ("diffusers.models.unets.unet_2d_condition", "transformers.models.clip.modeling_clip")
    tools = ("convert", "resize", "merge", "models.outputs", "adapters.saving")
    with Workers("torch", *models, *(f"lora.tools.{name}" for name in tools)) as running:
        yield running


def kill(chance: random.Random, workers: Workers, job: Job, operations: int) -> WorkerProcess:
    """Starts a process that dies before a random file operation, or after a random time."""
    if chance.random() < 0.7:
        number = chance.randint(1, operations)
        process = workers.start(Job(**{**vars(job), "die_before": number}))
    else:
        process = workers.start(job)
        process.until("asks")
        time.sleep(chance.uniform(0, 0.3))
        process.send(signal.SIGKILL)
    return process


def get(cache: VolumeCache, url: str) -> CacheEntry:
    return cache.get(cache.resolve(Reference(url)))


def test_killed_workers_lose_no_file_and_leave_nothing(
    rounds: Rounds, workers: Workers, server: LoopbackServer, tmp_path: Path
) -> None:
    for chance in rounds(6, 260):
        root, path = tmp_path / str(rounds.done), f"/{rounds.done}/x.safetensors"
        old, new = (adapter(SIZE, chance.random()) for _ in range(2))
        url = server.serve(path, old)
        get(VolumeCache(root, LIMITS, LOOPBACK), url)
        server.serve(path, new, seconds=chance.choice((0.0, 0.1)))
        job = Job("fetch", str(root), url, refresh=True)
        told = kill(chance, workers, job, 25).rest()
        rounds.seen["killed" if not any("bytes" in news for news in told) else "too late"] += 1
        assert not [news for news in told if "error" in news], told
        server.serve(path, b"", status=500)
        entry = get(VolumeCache(root, LIMITS, LOOPBACK), url)
        assert entry.path.read_bytes() in (old, new)
        assert sha256(entry.path.read_bytes()) == entry.record.sha256
        assert not list((root / DAMAGED).glob("*"))
        assert not list((root / INCOMING).glob("*.part"))
    assert rounds.seen["killed"]


def content_of(output: Path) -> Mapping[str, bytes]:
    """Every file of what a tool made, and what is left of what it did not."""
    files = [output] if output.is_file() else output.rglob("*")
    return {str(one.relative_to(output.parent)): one.read_bytes() for one in files if one.is_file()}


def test_killed_tools_leave_whole_files_or_none(
    rounds: Rounds, workers: Workers, tmp_path: Path
) -> None:
    places = {"stripes": str(ROOT / "demo" / "loras" / "demo-stripes.safetensors")}
    places["model"] = str(ROOT / "demo" / "model" / "unet")
    whole: dict[tuple[str, str], Mapping[str, bytes]] = {}
    for chance in rounds(3, 260, share=5):
        name, ending = chance.choice(list(COMMANDS)), chance.choice(ENDINGS)
        folder = tmp_path / str(rounds.done)
        folder.mkdir()
        output = folder / f"made{ending}"
        arguments = [one.format(**places) for one in COMMANDS[name]]
        job = Job("tool", str(folder), arguments=(*arguments, "--output", str(output)))
        if (name, ending) not in whole:
            told = workers.start(job).rest()[-1]
            assert told["code"] == 0, told
            whole[name, ending] = content_of(output)
            output.unlink()
        kill(chance, workers, job, 12).rest()
        made = [one for one in folder.iterdir() if not one.name.startswith(".")]
        rounds.seen["killed" if not made else "too late"] += 1
        assert made in ([], [output])
        assert not made or content_of(output) == whole[name, ending]
        assert workers.start(Job("tool", str(folder), arguments=(*job.arguments, "--force"))).rest()
        assert content_of(output) == whole[name, ending], name
        assert list(folder.iterdir()) == [output], name
    assert rounds.seen["killed"]
