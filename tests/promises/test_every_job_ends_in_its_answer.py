"""Real workers on the emulator: every job ends in its own answer, whatever happens to the others."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from benchmarks.jobs import KINDS, measure
from lora.durable import sha256_of
from tests.adapters import as_bytes, kohya
from tests.conftest import ROOT
from tests.emulator.running import FINAL, Emulator
from tests.production import BAD, ENVIRONMENT, kinds, loras_of, mix, platform
from tests.server import LoopbackServer
from tests.waiting import until
from tests.worst import HUGE, PROMPTS, TOKEN

pytestmark = pytest.mark.slow

JOBS, SEED = 200, 20261121

KILLS = 10


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


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulator]:
    """Two workers, for all tests that leave them as they were."""
    with platform(tmp_path_factory.mktemp("platform")) as running:
        yield running


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
    running: Emulator, jobs: list[tuple[str, float | None]], good: dict[str, dict[str, Any]]
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


def ends_of(running: Emulator, ids: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The final state of each job."""
    return {job_id: running.end(job_id) for job_id in ids}


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
    shared: Emulator, good: dict[str, dict[str, Any]], expected: dict[str, Any]
) -> None:
    jobs = mix(JOBS, list(good), SEED)
    ids = submit(shared, jobs, good)
    states = ends_of(shared, ids)
    check_answers(ids, jobs, states, expected)
    ends = Counter(state["status"] for state in states.values())
    assert ends["COMPLETED"] > JOBS / 2
    assert ends["CANCELLED"] > 0
    for job_id in ids:
        story = shared.story(job_id)
        assert story["late"] == 0, story
        _assert_in_order(story["updates"])
    assert len({states[job_id].get("workerId") for job_id in ids} - {None}) == 2
    assert len(shared.pids()) == 2  # none had to be replaced
    assert list((loras_of(shared.folder) / ".incoming").iterdir()) == []
    print(f"{JOBS} jobs: {dict(ends)}")


def _assert_in_order(updates: list[dict[str, Any]]) -> None:
    phases = ["downloading", "generating"]
    places = [(phases.index(one["phase"]), one["fraction"]) for one in updates]
    assert places == sorted(places)


def test_nothing_is_lost_while_workers_are_killed(
    tmp_path: Path, good: dict[str, dict[str, Any]], expected: dict[str, Any]
) -> None:
    seed = SEED + 1
    jobs = mix(JOBS // 2, list(good), seed)  # more come if they end too soon
    chance = random.Random(seed)
    with platform(tmp_path) as running:
        ids = submit(running, jobs, good)
        killed: set[str] = set()
        while len(killed) < KILLS:
            time.sleep(chance.uniform(0.2, 1.0))
            running.wait_for_workers(1)
            name, pid = chance.choice(list(running.pids().items()))
            if name not in killed:
                with suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
                    killed.add(name)
            if all(running.status(job_id)["status"] in FINAL for job_id in ids):
                more = [("stacked", None)] * 10
                jobs += more
                ids += submit(running, more, good)
        states = ends_of(running, ids)
        for job_id, (name, cancelled) in zip(ids, jobs, strict=True):
            state = states[job_id]
            if state["status"] == "CANCELLED":
                assert cancelled is not None
            elif state["status"] == "FAILED" and name not in BAD:
                assert "the worker died" in state["error"], state  # two workers died under it
            elif name in BAD:
                assert state["status"] == "FAILED"
            else:
                assert state["output"]["images"] == expected[name], name
            assert running.story(job_id)["answers"] <= 1
    for file in loras_of(tmp_path).glob("*.safetensors"):
        record = file.with_name(file.name + ".json")
        if record.exists():
            assert json.loads(record.read_text())["sha256"] == sha256_of(file)
    print(f"{len(killed)} kills, {len(ids)} jobs: {Counter(s['status'] for s in states.values())}")


def test_a_cancelled_job_is_let_go_and_the_next_ones_are_right(
    shared: Emulator,
    server: LoopbackServer,
    good: dict[str, dict[str, Any]],
    expected: dict[str, Any],
) -> None:
    for number in range(5):
        path, gate = f"/{number}.safetensors", threading.Event()
        url = server.serve(path, as_bytes(kohya(seed=40 + number)), gate=gate)
        let_go(shared, {**good["plain"], "loras": [url]}, lambda _: server.hits[path])  # noqa: B023
        gate.set()  # not before: the download was not waited for
    check_right(shared, good, expected)
    long = {**good["stripes"], "num_inference_steps": 499, "scheduler": "DDIM"}
    for _ in range(5):
        story = let_go(shared, long, lambda story: story["updates"])
        assert story["updates"][-1]["fraction"] < 0.9
    check_right(shared, good, expected)


def test_a_job_that_is_cancelled_in_the_queue_is_never_begun(
    shared: Emulator, good: dict[str, dict[str, Any]], expected: dict[str, Any]
) -> None:
    long = {**good["stripes"], "num_inference_steps": 499}
    running = [shared.run(long) for _ in range(6)]  # more than two workers take
    last = shared.run(good["plain"])
    shared.cancel(last)
    assert shared.status(last)["status"] == "CANCELLED"
    for job_id in running:
        shared.cancel(job_id)
    check_right(shared, good, expected)
    story = shared.story(last)
    assert (story["started"], story["updates"], story["answers"]) == (None, [], 0)


def let_go(
    running: Emulator, values: dict[str, Any], reached: Callable[[dict[str, Any]], object]
) -> dict[str, Any]:
    """Cancels a job as soon as its story has `reached` a point; the story when it was let go."""
    job_id = running.run(values)
    until(lambda: reached(running.story(job_id)))
    running.cancel(job_id)
    until(lambda: running.story(job_id)["let_go"], lambda: running.story(job_id))
    assert running.status(job_id)["status"] == "CANCELLED"
    return running.story(job_id)


def check_right(
    running: Emulator, good: dict[str, dict[str, Any]], expected: dict[str, Any]
) -> None:
    """As many plain jobs as both workers can hold draw what they should."""
    ids = [running.run(good["plain"]) for _ in range(4)]
    for state in ends_of(running, ids).values():
        assert state["output"]["images"] == expected["plain"]


def test_downloads_overlap_the_drawing(
    shared: Emulator, server: LoopbackServer, good: dict[str, dict[str, Any]]
) -> None:
    """Two workers take two jobs each while they fetch: three that wait for files do not hold up a fourth."""
    gate = threading.Event()
    urls = [
        server.serve(f"/{n}.safetensors", as_bytes(kohya(seed=100 + n)), gate=gate)
        for n in range(3)
    ]
    ids = [shared.run({**good["plain"], "loras": [url]}) for url in urls]
    until(lambda: server.hits.total() == len(urls))
    assert shared.end(shared.run(good["plain"]))["status"] == "COMPLETED"
    gate.set()  # not before: no file was waited for
    assert {shared.end(job_id)["status"] for job_id in ids} == {"COMPLETED"}


def test_what_a_job_costs_beside_its_drawing_is_measured(shared: Emulator) -> None:
    """As `make bench-jobs` does, from a few jobs. How much it may be is not for a test to say."""
    for kind in KINDS:
        figures = measure(shared, kind, 3)
        medians = {part: round(statistics.median(values), 1) for part, values in figures.items()}
        print(f"{kind}: {medians} ms")
        assert {"in all", "drawing", "post"} <= medians.keys()


def test_the_worst_answers_end_their_jobs(tmp_path: Path) -> None:
    with platform(tmp_path, workers=1, program=["-m", "tests.worst"]) as running:
        ids = {}
        for prompt in PROMPTS:
            ids[prompt] = running.run({"prompt": prompt, "num_inference_steps": 1})
        states = ends_of(running, ids.values())
        log = running.log()
    for prompt, job_id in ids.items():
        state = states[job_id]
        if prompt == "half a surrogate pair":
            assert state["status"] == "COMPLETED"
            assert state["output"]["model"] == "half \ufffd pair"
            continue
        assert state["status"] == "FAILED", prompt
        code = "OUTPUT_TOO_LARGE" if prompt == HUGE else "INTERNAL"
        assert isinstance(state["error"], str)
        assert state["error"].startswith(f"{code}: "), state["error"]
    assert TOKEN not in json.dumps(states)
    assert TOKEN not in log
