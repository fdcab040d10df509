"""What `benchmarks.live` checks in processes of their own: that frames are exact, and that memory stays."""

from __future__ import annotations

import ctypes
import gc
import random
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.live_demo import PICTURES, PROMPTS, Demo, new_demo
from live.monitor import memory_mb
from live.painter import Drawn
from lora.engine.rows import Rows
from lora.engine.stack import Mode, Stack

LEVEL = 100
"""Switches after which memory has its level."""


def run_checks(folder: Path, frames: int, switches: int) -> dict[str, Any]:
    """All checks, two at a time; the longest come first. `folder`: the cache."""
    counts = {name: frames if name in FRAMES else switches for name in CHECKS}
    with ProcessPoolExecutor(2, get_context("spawn"), max_tasks_per_child=1) as pool:
        futures = {name: pool.submit(_check, name, count, folder) for name, count in counts.items()}
        found = {name: future.result() for name, future in futures.items()}
    memory = {name: found.pop(name) for name in counts if name not in FRAMES}
    return {**found, "memory": memory}


def _check(name: str, count: int, folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    return CHECKS[name](new_demo(folder), count)


# --- exactness -------------------------------------------------------------------------------------


def measure_frames(demo: Demo, count: int, *, stream_batch: bool) -> dict[str, Any]:
    """Frames in a random order against each look alone: how many differ, and whether weights are exact."""
    networks = demo.worker.parts.pipeline.components.values()
    before = [{n: p.detach().clone() for n, p in one.state_dict().items()} for one in networks]
    chance, done = random.Random(5), list[Drawn]()
    order = [(chance.choice(list(demo.looks)), chance.randrange(PICTURES)) for _ in range(count)]
    painter = demo.painter(2, done, stream_batch=stream_batch)
    for look in demo.looks.values():
        painter.warm(look)
    alone: dict[Any, bytes] = {}
    for key in demo.looks:
        done.clear()
        for picture in range(PICTURES):
            painter.draw(demo.ticket(key, picture, picture))
        painter.drain()
        alone |= {(key, one.ticket.waiting.seq): one.image.tobytes() for one in done}
    done.clear()
    for seq, (key, picture) in enumerate(order):
        painter.draw(demo.ticket(key, picture, seq))
    painter.drain()
    painter.close()
    differ = sum(one.image.tobytes() != alone[order[one.ticket.waiting.seq or 0]] for one in done)
    exact = all(
        torch.equal(tensor, kept[name])
        for one, kept in zip(networks, before, strict=True)
        for name, tensor in one.state_dict().items()
    )
    return {"frames": len(done), "asked": count, "differ": differ, "weights exact": exact}


# --- memory ----------------------------------------------------------------------------------------


def measure_mode(demo: Demo, count: int, *, mode: Mode) -> dict[str, float]:
    """Growth over switches with random strengths, a frame's whole stack at a time."""
    chance = random.Random(2)
    with demo.worker.parts.engine.applied([], mode) as block:
        return _growth(lambda: block.switch(_stack(demo, chance, list(_full(demo)))), count)


def measure_rows(demo: Demo, count: int) -> dict[str, float]:
    """The same in the four rows of a stream batch, which take what has factors."""
    chance, keys = random.Random(2), [key for key in _full(demo) if key[0] != "night"]
    files = list(
        {use.lora.identity: use.lora for key in keys for use in demo.looks[key].stack}.values()
    )
    rows = Rows(demo.worker.parts.engine, component="unet")
    with rows.opened():
        return _growth(
            lambda: rows.use([_stack(demo, chance, keys) for _ in range(4)], files), count
        )


def _full(demo: Demo) -> list[tuple[str, float, str]]:
    """One look for each preset that has LoRAs."""
    return [key for key in demo.looks if key[1:] == (1.0, PROMPTS[0]) and key[0] != "none"]


def _stack(demo: Demo, chance: random.Random, keys: list[tuple[str, float, str]]) -> Stack:
    uses = demo.looks[chance.choice(keys)].drawing(0.0)
    return [replace(use, scale=0.01 + 1.5 * chance.random()) for use in uses]


def _growth(switch: Callable[[], None], count: int) -> dict[str, float]:
    """Megabytes of this process above its level after `LEVEL` switches."""
    for _ in range(LEVEL):
        switch()
    begun = _level()
    for _ in range(count - LEVEL):
        switch()
    return {"switches": count, "growth MB": round(_level() - begun, 1)}


def _level() -> float:
    """Megabytes of this process, without what the C library has free and would use next."""
    gc.collect()
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return memory_mb() or 0.0


FRAMES = ("one by one", "stream batch")

CHECKS: dict[str, Callable[[Demo, int], dict[str, Any]]] = {
    "merged": partial(measure_mode, mode=Mode.MERGED),
    "dynamic": partial(measure_mode, mode=Mode.DYNAMIC),
    "stream batch": partial(measure_frames, stream_batch=True),
    "one by one": partial(measure_frames, stream_batch=False),
    "rows": measure_rows,
}
"""Name -> what is measured with how many frames, or switches."""
