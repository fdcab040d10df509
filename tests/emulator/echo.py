"""A worker for the emulator's tests: does what its input says."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# The SDK asks for the processor's name while it is imported, for its debugger: 1.4 s of each start.
sys.modules["cpuinfo"] = SimpleNamespace(get_cpu_info=dict)  # type: ignore[assignment]

import runpod  # noqa: E402

WORST = {
    "nan": lambda: {"number": float("nan")},
    "bytes": lambda: {"picture": b"x"},
    "big": lambda: {"picture": "x" * (11 << 20)},
    "surrogate": lambda: {"text": "\ud800"},
    "empty": dict,
}


async def echo(job: dict[str, Any]) -> Any:
    """Answers with `answer`, after `seconds` and once the file `until` is there.

    It may die, fail, post progress, or answer with the worst.
    """
    given = job["input"]
    if given.get("child"):  # outlives its parent, as a heartbeat does
        subprocess.Popen(["sleep", "600"])
    for number in range(given.get("updates", 0)):
        runpod.serverless.progress_update(job, number)
        await asyncio.sleep(0.4)
    try:
        await asyncio.sleep(given.get("seconds", 0))
        while "until" in given and not Path(given["until"]).exists():
            await asyncio.sleep(0.02)
    except asyncio.CancelledError:
        print("echo was stopped")
        raise
    time.sleep(given.get("block", 0))
    if given.get("die") or first_time(given.get("die_once")):
        os._exit(3)
    if given.get("raise") or first_time(given.get("fail_once")):
        raise ValueError(given.get("raise"))
    if "worst" in given:
        return WORST[given["worst"]]()
    passed = {name: job[name] for name in ("s3Config", "policy") if name in job}
    own = {"answer": given.get("answer"), "worker": os.environ["RUNPOD_POD_ID"]}
    return {**own, **passed, **given.get("extra", {})}


def first_time(file: str | None) -> bool:
    """Whether a file is named that is not there; it is then."""
    if not file or Path(file).exists():
        return False
    Path(file).touch()
    return True


def stream(job: dict[str, Any]) -> Iterator[Any]:
    """Yields the numbers below `count`, then fails if `raise` is there."""
    for number in range(job["input"]["count"]):
        yield {"number": number}
    if "raise" in job["input"]:
        raise ValueError(job["input"]["raise"])


if __name__ == "__main__":
    concurrency = int(os.environ.get("CONCURRENCY", "1"))
    runpod.serverless.start(
        {
            "handler": stream if os.environ.get("STREAM") else echo,
            "concurrency_modifier": lambda _: concurrency,
        }
    )
