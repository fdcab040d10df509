"""For tests with real workers: a platform that serves the demo model, and a fixed random mix of jobs."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.conftest import ROOT
from tests.emulator.running import Emulator, emulator

ENVIRONMENT: dict[str, Any] = {
    "WORKER_MODEL": "demo",
    "WORKER_DEVICE": "cpu",
    "LORA_ALLOW_PRIVATE_URLS": "1",
    "OMP_NUM_THREADS": "1",
}
"""One thread per worker: the sums' order, and so the last digits, depend on their number."""


@contextmanager
def platform(
    folder: Path, *, workers: int = 2, program: Sequence[str] = ("handler.py",)
) -> Iterator[Emulator]:
    """An emulator whose workers serve the demo model, its adapters on the volume."""
    shutil.copytree(ROOT / "demo" / "loras", loras_of(folder))
    options = ("--workers", str(workers), "--volume", str(folder / "volume"))
    with emulator(folder, *options, program=program, **ENVIRONMENT) as running:
        running.wait_for_workers(workers)
        yield running


def loras_of(folder: Path) -> Path:
    """The cache on a platform's volume."""
    return folder / "volume" / "loras"


def kinds(url: str) -> dict[str, dict[str, Any]]:
    """The inputs of the mix. `url` serves an adapter."""
    base = {
        "prompt": "a big red circle on a blue background",
        "num_inference_steps": 4,
        "seed": 7,
        "scheduler": "K_EULER",
    }
    loras: dict[str, list[Any]] = {
        "plain": [],
        "plain, another seed": [],
        "stripes": ["demo-stripes"],
        "stripes, half": [{"path": "demo-stripes", "scale": 0.5}],
        "night": ["demo-night"],
        "by URL": [url],
        "stacked": ["demo-stripes", {"path": "demo-outline", "scale": 0.7}],
        "stacked with night": ["demo-night", url],
        "for a while": [{"path": "demo-outline", "end": 0.5}],
        "with a word": ["demo-spiral"],
    }
    # Not `auto`: that chooses by the memory that is free, and the modes differ in the last digits.
    found = {name: {**base, "loras": one, "lora_mode": "merged"} for name, one in loras.items()}
    found["plain, another seed"]["seed"] = 8
    for name in ("stripes, half", "for a while"):
        found[name]["lora_mode"] = "dynamic"
    return found


BAD: dict[str, dict[str, Any]] = {
    "no such LoRA": {"prompt": "x", "loras": ["no-such-lora"]},
    "no prompt": {"seed": 1},
    "out of the cache": {"prompt": "x", "loras": ["../../etc/passwd"]},
}


def mix(count: int, good: list[str], seed: int) -> list[tuple[str, float | None]]:
    """(kind, seconds after which it is cancelled or None) of each job."""
    chance = random.Random(seed)
    found: list[tuple[str, float | None]] = []
    for _ in range(count):
        draw = chance.random()
        if draw < 0.1:
            found.append((chance.choice(list(BAD)), None))
        else:
            cancelled = chance.uniform(0, 1.5) if draw < 0.2 else None
            found.append((chance.choice(good), cancelled))
    return found
