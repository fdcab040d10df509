"""The worker on the emulator: nothing bleeds, nothing is lost, progress is in order, downloads overlap."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from lora.shelf import sha256_of
from tests.adapters import as_bytes, kohya
from tests.conftest import ROOT
from tests.production import BAD, ENVIRONMENT, Platform, kinds, mix, platform
from tests.server import LoopbackServer

JOBS, SEED = 200, 20261121


@pytest.fixture(scope="module")
def own_server() -> Iterator[LoopbackServer]:
    with LoopbackServer() as running:
        yield running


@pytest.fixture(scope="module")
def good(own_server: LoopbackServer) -> dict[str, dict[str, Any]]:
    """The jobs of the mix that have pictures."""
    return kinds(own_server.serve("/mine.safetensors", as_bytes(kohya(seed=3))))


@pytest.fixture(scope="module")
def expected(
    good: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What each of them draws on a worker of its own."""
    found = alone(tmp_path_factory.mktemp("alone") / "loras", good)
    assert len({str(images) for images in found.values()}) == len(good)
    return found


def alone(folder: Path, jobs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Each job by a fresh worker, in a process of its own with as many threads as the platform's."""
    shutil.copytree(ROOT / "demo" / "loras", folder)
    done = subprocess.run(
        [sys.executable, "-m", "tests.reference", str(folder)],
        input=json.dumps(jobs),
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def submit(
    running: Platform, jobs: list[tuple[str, float | None]], good: dict[str, dict[str, Any]]
) -> list[str]:
    """Queues the mix; cancels what is to be cancelled, each at its time after the queue moved on to it."""
    ids, timers = [], []
    for number, (name, cancelled) in enumerate(jobs):
        job_id = running.run({**good, **BAD}[name])
        ids.append(job_id)
        if cancelled is not None:
            timer = threading.Timer(cancelled + 0.12 * number, running.cancel, [job_id])
            timer.start()
            timers.append(timer)
    return ids


def check_answers(
    ids: list[str],
    jobs: list[tuple[str, float | None]],
    states: dict[str, dict[str, Any]],
    expected: dict[str, Any],
) -> None:
    """Every picture is the one that the job draws alone; every failure is the one that was asked for."""
    for job_id, (name, cancelled) in zip(ids, jobs, strict=True):
        state = states[job_id]
        if state["status"] == "CANCELLED":
            assert cancelled is not None
        elif name in BAD:
            assert state["status"] == "FAILED", (name, state)
            assert isinstance(state["error"], str)
        else:
            assert state["status"] == "COMPLETED", (name, state)
            assert state["output"]["images"] == expected[name], name


def test_no_job_leaves_a_trace_in_anothers_picture_and_progress_is_in_order(
    tmp_path: Path, good: dict[str, dict[str, Any]], expected: dict[str, Any]
) -> None:
    jobs = mix(JOBS, list(good), SEED)
    with platform(tmp_path) as running:
        ids = submit(running, jobs, good)
        states = running.wait(ids, 400)
        check_answers(ids, jobs, states, expected)
        ends = Counter(state["status"] for state in states.values())
        assert ends["COMPLETED"] > JOBS / 2
        assert ends["CANCELLED"] > 0
        for job_id in ids:
            story = running.story(job_id)
            assert story["late"] == 0, story
            _assert_in_order(story["updates"])
        assert len({states[job_id].get("workerId") for job_id in ids} - {None}) == 2
        assert len(running.pids()) == 2  # none had to be replaced
    parts = list((running.volume / "loras" / ".incoming").iterdir())
    assert parts == []
    print(f"{JOBS} jobs: {dict(ends)}")


def _assert_in_order(updates: list[dict[str, Any]]) -> None:
    phases = ["downloading", "generating"]
    places = [(phases.index(one["phase"]), one["fraction"]) for one in updates]
    assert places == sorted(places)


def test_nothing_is_lost_while_workers_are_killed(
    tmp_path: Path, good: dict[str, dict[str, Any]], expected: dict[str, Any]
) -> None:
    kills, seed = 10, SEED + 1
    jobs = [(name, None) for name, _ in mix(80, list(good), seed)]
    chance = random.Random(seed)
    with platform(tmp_path) as running:
        ids = [running.run({**good, **BAD}[name]) for name, _ in jobs]
        killed: set[str] = set()
        while len(killed) < kills:
            time.sleep(chance.uniform(0.2, 1.0))
            running.wait_for_workers(1)
            name, pid = chance.choice(list(running.pids().items()))
            if name not in killed:
                with suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
                    killed.add(name)
            if all(running.status(job_id)["status"] in ("COMPLETED", "FAILED") for job_id in ids):
                more = [running.run(good["stacked"]) for _ in range(10)]
                jobs += [("stacked", None)] * len(more)
                ids += more
        states = running.wait(ids, 400)
        for job_id, (name, _) in zip(ids, jobs, strict=True):
            state = states[job_id]
            if state["status"] == "FAILED" and name not in BAD:
                assert "the worker died" in state["error"], state  # two workers died under it
            elif name in BAD:
                assert state["status"] == "FAILED"
            else:
                assert state["output"]["images"] == expected[name], name
            assert running.story(job_id)["answers"] <= 1
    for file in (running.volume / "loras").glob("*.safetensors"):
        record = file.with_name(file.name + ".json")
        if record.exists():
            assert json.loads(record.read_text())["sha256"] == sha256_of(file)
    print(f"{len(killed)} kills, {len(ids)} jobs: {Counter(s['status'] for s in states.values())}")


def test_cancelling_is_quick_and_the_next_job_is_right(
    tmp_path: Path,
    server: LoopbackServer,
    good: dict[str, dict[str, Any]],
    expected: dict[str, Any],
) -> None:
    slow = server.serve("/slow.safetensors", as_bytes(kohya(seed=4)), pause=3.0)
    long = {**good["stripes"], "num_inference_steps": 400}
    with platform(tmp_path, workers=1) as running:
        for where in ("while queued", "in the download", "in the denoising"):
            first = running.run({**good["plain"], "loras": [slow]} if "download" in where else long)
            deadline = time.monotonic() + 60
            while running.status(first)["status"] != "IN_PROGRESS":
                assert time.monotonic() < deadline
                time.sleep(0.02)
            time.sleep(0.7)
            last = running.run(good["plain"]) if where == "while queued" else first
            running.cancel(last)
            assert running.status(last)["status"] == "CANCELLED"
            if where == "while queued":
                running.cancel(first)
            begun = time.monotonic()
            following = running.run(good["plain"])
            state = running.wait([following], 60)[following]
            assert state["output"]["images"] == expected["plain"], where
            # The stop signal's poll, one step, the queue's poll: far from 400 steps or the download.
            assert time.monotonic() - begun < 2.5, where


def test_downloads_overlap_the_drawing(
    tmp_path: Path, server: LoopbackServer, good: dict[str, dict[str, Any]]
) -> None:
    seconds = {}
    for concurrency in (1, 2):
        folder = tmp_path / str(concurrency)
        inputs = []
        for number in range(8):
            body = as_bytes(kohya(seed=100 + number))
            url = server.serve(f"/{concurrency}/{number}.safetensors", body, pause=0.8)
            inputs.append({**good["by URL"], "loras": [url], "num_inference_steps": 12})
        environment = {"WORKER_CONCURRENCY": str(concurrency)}
        with platform(folder, workers=1, environment=environment) as running:
            running.wait([running.run(good["plain"])], 60)
            begun = time.monotonic()
            states = running.wait([running.run(values) for values in inputs], 120)
            seconds[concurrency] = time.monotonic() - begun
            assert {state["status"] for state in states.values()} == {"COMPLETED"}
    print(f"8 jobs: {seconds[1]:.1f} s one by one, {seconds[2]:.1f} s two at once")
    assert seconds[2] <= 0.75 * seconds[1]
