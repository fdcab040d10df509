"""Several workers on one library, some of which die: no state is lost, none tells of another version."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from lora.errors import LoraCorrupt, LoraNotFound
from lora.formats.adapter import load
from lora.formats.names.keys import KeyMap
from lora.library.catalog import Catalog, Query, Standing
from lora.library.states import read_state
from lora.volume.cache import Limits, VolumeCache
from lora.volume.records import INCOMING
from tests.lora.workers import sha256
from tests.waiting import PATIENCE, until

SEED = int(os.environ.get("CATALOG_TEST_SEED") or random.SystemRandom().randrange(1 << 32))
"""What the random moments are made of. To see a failure again: CATALOG_TEST_SEED=… pytest …"""

PATH = "down_blocks.0.attentions.0.proj_in"
NAMES = ("a", "b", "sub/c")
BAD = 9
"""The rank of versions that hold NaN."""


def key_map() -> KeyMap:
    return KeyMap({"unet": {PATH: {"weight": (16, 16)}}})


def catalog(root: Path) -> Catalog:
    cache = VolumeCache(root / "loras", Limits())
    return Catalog(cache, key_map(), root / "training")


def adapter(rank: int) -> bytes:
    """A version of an adapter: its rank says which, and whether it can be used."""
    value = float("nan") if rank == BAD else 1.0
    factors = {
        "lora_A.weight": torch.full((rank, 16), value),
        "lora_B.weight": torch.ones(16, rank),
    }
    return save({f"unet.{PATH}.{name}": tensor for name, tensor in factors.items()})


def publish(path: Path, data: bytes) -> None:
    """As an operator who knows what he does: whole, at once."""
    part = path.parent / f".{os.getpid()}-{random.random()}"
    part.write_bytes(data)
    part.replace(path)


def peft(folder: Path, alpha: float) -> None:
    config = {"r": 4, "lora_alpha": alpha, "base_model_name_or_path": ""}
    publish(folder / "adapter_model.safetensors", adapter(4))
    publish(folder / "adapter_config.json", json.dumps(config).encode())


# --- in the worker processes ---------------------------------------------------------------------


def anything(root: Path, seed: int) -> None:
    """Does whatever workers and operators do, in a random order, until all is over."""
    torch.set_num_threads(1)
    chance, library = random.Random(seed), catalog(root)
    acts: list[Callable[[str], object]] = [
        lambda name: library.scan(),
        library.activate,
        library.activate,
        library.deactivate,
        library.delete,
        lambda name: library.page(Query()),
        lambda name: publish(
            root / "loras" / f"{name}.safetensors", adapter(chance.choice([1, 2, 4, 8, BAD]))
        ),
        lambda name: peft(root / "training" / "run", chance.choice([4, 8, 16])),
        lambda name: library.activate("training:run"),
        lambda name: library.activate("training:run"),
        lambda name: [library.delete(one.name) for one in library.page(Query(text="run-")).items],
    ]
    while not over(root).exists():
        with suppress(LoraNotFound, LoraCorrupt):  # another was faster
            chance.choice(acts)(chance.choice(NAMES))


def scanning(root: Path) -> None:
    library = catalog(root)
    while not over(root).exists():
        library.scan()


def over(root: Path) -> Path:
    """A file that ends the work in all processes."""
    return root / "over"


# --- in the test ---------------------------------------------------------------------------------

Start = Callable[..., ForkServerProcess]


@pytest.fixture(scope="module")
def fork() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.promises.test_workers_agree_on_the_library"])
    return context


@contextmanager
def running(fork: Any, root: Path, *jobs: tuple[Any, ...]) -> Iterator[list[Any]]:
    """Does the jobs in processes of their own during the block; waits for them after it."""
    processes = [fork.Process(target=job[0], args=(root, *job[1:])) for job in jobs]
    for process in processes:
        process.start()
    try:
        yield processes
    finally:
        over(root).touch()
        for process in processes:
            process.join(PATIENCE)
            process.kill()
        over(root).unlink()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for folder in ("loras/sub", "training/run"):
        (tmp_path / folder).mkdir(parents=True)
    return tmp_path


def check_whole(root: Path) -> None:
    """Whoever looks at any moment finds whole states."""
    for path in [*root.rglob("*.state.json")]:
        with suppress(FileNotFoundError):
            text = path.read_text()
            assert text.endswith("}"), (SEED, path, text)


def check(root: Path) -> None:
    """Each state that fits tells of the version that lies there; any two workers see the same."""
    items = catalog(root).page(Query()).items
    assert items == catalog(root).page(Query()).items, SEED
    for item in items:
        state, version = item.state, item.adapter.version
        if not state.at or not item.adapter.weights:
            continue
        path = item.adapter.root / item.adapter.weights
        rank = (
            next(rank for rank in (1, 2, 4, 8, BAD) if len(adapter(rank)) == version.size)
            if (not item.name.startswith("run_") and "run-" not in item.name)
            else 4
        )
        why = SEED, item
        if state.state == Standing.ACTIVE:
            assert (rank != BAD, state.rank) == (True, rank), why
            if "training" not in item.name:
                assert state.sha256 == sha256(path.read_bytes()), why
        if state.state == Standing.FAILED and "training" not in item.name:
            assert rank == BAD, why
        if "run-" in item.name:
            file = load(path, key_map(), "x")
            metadata = json.loads(file.metadata["lora_adapter_metadata"])
            assert (
                file.layers[0].algorithm.delta(torch.zeros(16, 16))[0, 0] == metadata[".lora_alpha"]
            ), why


@pytest.mark.slow
def test_workers_that_do_all_at_once_never_disagree(fork: Any, root: Path) -> None:
    end = time.monotonic() + 12
    with running(fork, root, *[(anything, SEED + n) for n in range(3)]) as processes:
        while time.monotonic() < end:
            check_whole(root)
            time.sleep(0.01)
    assert [process.exitcode for process in processes] == [0, 0, 0], SEED
    check(root)
    for place in ("loras", "training"):
        parts = list((root / place / INCOMING).glob("*.part"))
        assert parts == [], (SEED, parts)


@pytest.mark.slow
def test_an_activation_is_never_undone_by_those_who_only_look(fork: Any, root: Path) -> None:
    library, chance = catalog(root), random.Random(SEED)
    path = root / "loras" / "a.safetensors"
    told = path.with_name("a.safetensors.state.json")
    with running(fork, root, (scanning,), (scanning,)):
        for round_ in range(100):
            publish(path, adapter(chance.choice([1, 2, 4, 8])))
            time.sleep(chance.random() * 0.01)
            assert library.activate("a").state.state == "active"
            time.sleep(chance.random() * 0.02)
            # For a moment it may be away: who took it for one of another version puts it back.
            until(
                lambda: (state := read_state(told)) and state.state == "active",
                lambda: (SEED, round_),  # noqa: B023 - called within the round
            )


@pytest.mark.slow
def test_workers_that_are_killed_leave_nothing_wrong(fork: Any, root: Path) -> None:
    chance = random.Random(SEED)
    for round_ in range(8):
        jobs = [(anything, SEED + 10 * round_ + n) for n in range(2)]
        with running(fork, root, *jobs) as processes:
            time.sleep(0.3 + chance.random())
            for process in processes:
                os.kill(process.pid, signal.SIGKILL)
        check_whole(root)
        check(root)
    library = catalog(root)
    for place in ("loras", "training"):
        for part in (root / place / INCOMING).iterdir():
            os.utime(part, (1, 1))
    library.scan()
    publish(root / "loras" / "a.safetensors", adapter(2))
    peft(root / "training" / "run", 8)
    assert library.activate("a").state.state == "active"
    published = library.activate("training:run").file
    assert published
    assert (root / "loras" / published).is_file()
    for place in ("loras", "training"):
        assert list((root / place / INCOMING).iterdir()) == []
    check(root)
