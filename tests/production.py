"""A platform with real workers on the demo model, and a fixed random mix of jobs for it."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

from tests.conftest import ROOT

FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT")

ENVIRONMENT = {
    "WORKER_MODEL": "demo",
    "WORKER_DEVICE": "cpu",
    "LORA_ALLOW_PRIVATE_URLS": "1",
    "OMP_NUM_THREADS": "1",
}
"""One thread per worker: the sums' order, and so the last digits, depend on their number."""


@dataclass
class Platform:
    """A running emulator."""

    process: subprocess.Popen[str]
    volume: Path
    lines: list[str] = field(default_factory=list)
    address: str = ""

    def watch(self) -> None:
        """Reads the log until the process ends."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())

    def url(self, path: str) -> str:
        return f"{self.address}/v2/local/{path}"

    def run(self, values: dict[str, Any], **more: Any) -> str:
        """Queues a job; its id."""
        answer = requests.post(self.url("run"), json={"input": values, **more}, timeout=30)
        answer.raise_for_status()
        return str(answer.json()["id"])

    def status(self, job_id: str) -> dict[str, Any]:
        found: dict[str, Any] = requests.get(self.url(f"status/{job_id}"), timeout=30).json()
        return found

    def cancel(self, job_id: str) -> None:
        requests.post(self.url(f"cancel/{job_id}"), timeout=30).raise_for_status()

    def story(self, job_id: str) -> dict[str, Any]:
        """What the emulator saw of a job."""
        found: dict[str, Any] = requests.get(f"{self.address}/state/{job_id}", timeout=30).json()
        return found

    def wait(self, job_ids: list[str], seconds: float) -> dict[str, dict[str, Any]]:
        """The final states."""
        deadline = time.monotonic() + seconds
        found: dict[str, dict[str, Any]] = {}
        while len(found) < len(set(job_ids)):
            for job_id in job_ids:
                if job_id not in found and (state := self.status(job_id))["status"] in FINAL:
                    found[job_id] = state
            waiting = len(set(job_ids)) - len(found)
            assert time.monotonic() < deadline, f"{waiting} jobs have no final state\n" + "\n".join(
                self.lines[-40:]
            )
            time.sleep(0.05)
        return found

    def wait_for_workers(self, count: int, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while requests.get(self.url("health"), timeout=30).json()["workers"]["ready"] < count:
            assert time.monotonic() < deadline, "\n".join(self.lines[-40:])
            time.sleep(0.1)

    def pids(self) -> dict[str, int]:
        """The workers that were started, by name."""
        found = [re.search(r" (w\d+) started \(pid (\d+)\)", line) for line in self.lines]
        return {match[1]: int(match[2]) for match in found if match}


@contextmanager
def platform(
    folder: Path,
    *,
    workers: int = 2,
    environment: dict[str, str] | None = None,
    program: Sequence[str] = ("handler.py",),
) -> Iterator[Platform]:
    """An emulator whose workers serve the demo model, its adapters on the volume."""
    loras = folder / "volume" / "loras"
    loras.mkdir(parents=True)
    for file in (ROOT / "demo" / "loras").glob("*.safetensors"):
        shutil.copy(file, loras)
    command = [sys.executable, "-m", "emulator", "--port", "0", "--workers", str(workers)]
    command += ["--volume", str(folder / "volume"), "--", sys.executable, *program]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    running = Platform(process, folder / "volume")
    watching = threading.Thread(target=running.watch, daemon=True)
    watching.start()
    try:
        deadline = time.monotonic() + 60
        while not running.address:
            assert time.monotonic() < deadline, "\n".join(running.lines)
            found = [re.search(r"(http://[\d.]+:\d+)/v2/local is open", x) for x in running.lines]
            running.address = next((match[1] for match in found if match), "")
            time.sleep(0.05)
        running.wait_for_workers(workers)
        yield running
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()
        watching.join(10)
        if process.stdout:
            process.stdout.close()


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
    found = {name: {**base, "loras": found} for name, found in loras.items()}
    found["plain, another seed"]["seed"] = 8
    found["stacked"]["lora_mode"] = "merged"
    found["stripes, half"]["lora_mode"] = "dynamic"
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
