"""Real workers on the emulator: a job waits in the platform's queue, not in a worker that draws another."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.emulator.running import Emulator, emulator
from tests.production import ENVIRONMENT
from tests.waiting import until

pytestmark = pytest.mark.slow

PLAIN: dict[str, Any] = {
    "prompt": "a big red circle on a blue background",
    "num_inference_steps": 2,
    "width": 64,
    "height": 64,
}

CLOSED = "JobScaler.get_jobs | No jobs acquired."
"""What the SDK logs of a question that brought nothing."""


class Held:
    """A job whose drawing stands still where the test wants."""

    def __init__(self, running: Emulator, folder: Path, word: str = "hold", **more: Any) -> None:
        folder.mkdir()
        self._running, self._folder = running, folder
        self.id = running.run({**PLAIN, "prompt": f"{word} {folder}"}, **more)

    def is_drawn(self) -> str:
        """Waits until a worker draws it; the worker's name."""
        until(lambda: self._running.story(self.id)["updates"])
        return str(self._running.status(self.id)["workerId"])

    def comes_near_its_end(self) -> None:
        (self._folder / "on").touch()

    def ends(self) -> dict[str, Any]:
        """Its final state."""
        self.comes_near_its_end()
        (self._folder / "end").touch()
        return self._running.end(self.id)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulator]:
    """A platform with one worker; another takes its place when it ends."""
    with platform(tmp_path_factory.mktemp("one"), workers=1) as running:
        yield running


def platform(folder: Path, *, workers: int) -> Any:
    return emulator(
        folder,
        *("--workers", str(workers), "--volume", str(folder / "volume")),
        program=("-m", "tests.held"),
        RUNPOD_DEBUG_LEVEL="DEBUG",
        **ENVIRONMENT,
    )


def stays_in_the_queue(running: Emulator, job_id: str, workers: set[str]) -> None:
    """Each of these busy workers has the chance to take the job, more than once, and does not."""
    before = {name: asked(running, name) for name in workers}
    until(lambda: all(asked(running, name) >= before[name] + 2 for name in workers), running.log)
    assert running.status(job_id)["status"] == "IN_QUEUE"


def asked(running: Emulator, worker: str) -> int:
    return sum(f"[{worker}]" in line and CLOSED in line for line in running.log().splitlines())


def test_with_two_workers_the_idle_one_takes_the_job_and_a_third_waits_in_the_queue(
    tmp_path: Path,
) -> None:
    with platform(tmp_path, workers=2) as running:
        running.wait_for_workers(2)
        for turn in range(2):
            first = Held(running, tmp_path / f"first {turn}")
            busy = first.is_drawn()
            second = Held(running, tmp_path / f"second {turn}")
            other = second.is_drawn()
            assert {busy, other} == {"w0", "w1"}

            third = running.run(PLAIN)
            stays_in_the_queue(running, third, {busy, other})
            second.comes_near_its_end()  # and only that one's worker takes the next job
            assert running.under_way(third)["workerId"] == other
            assert running.status(second.id)["status"] == "IN_PROGRESS"
            fourth = running.run(PLAIN)
            stays_in_the_queue(running, fourth, {busy})
            assert second.ends()["workerId"] == other
            for job_id in (third, fourth):
                state = running.end(job_id)
                assert state["status"] == "COMPLETED", state
                assert state["workerId"] == other
            assert first.ends()["status"] == "COMPLETED"


def test_a_job_that_is_cancelled_while_it_waits_is_let_go_at_once(
    one: Emulator, tmp_path: Path
) -> None:
    first = Held(one, tmp_path / "first")
    first.is_drawn()
    first.comes_near_its_end()
    waits = one.run(PLAIN)
    one.under_way(waits)
    one.cancel(waits)
    until(lambda: one.story(waits)["let_go"])
    assert one.story(waits)["updates"] == []
    assert one.status(first.id)["status"] == "IN_PROGRESS"
    following = one.run(PLAIN)
    one.under_way(following)  # its place is free again
    assert first.ends()["status"] == "COMPLETED"
    assert one.end(following)["status"] == "COMPLETED"
    assert one.status(waits)["status"] == "CANCELLED"


def test_a_worker_that_is_replaced_draws_the_job_that_it_took_ahead(
    one: Emulator, tmp_path: Path
) -> None:
    first = Held(one, tmp_path / "first", "refresh")
    worker = first.is_drawn()
    first.comes_near_its_end()
    ahead = one.run(PLAIN)
    one.under_way(ahead)
    assert first.ends()["error"].startswith("OUT_OF_MEMORY")
    state = one.end(ahead)
    assert (state["status"], state["workerId"]) == ("COMPLETED", worker)
    assert one.story(ahead)["answers"] == 1
    assert one.end(one.run(PLAIN))["workerId"] != worker


def test_a_worker_that_is_told_to_end_draws_the_job_that_it_took_ahead(
    one: Emulator, tmp_path: Path
) -> None:
    first = Held(one, tmp_path / "first")
    worker = first.is_drawn()
    first.comes_near_its_end()
    ahead = one.run(PLAIN)
    one.under_way(ahead)
    os.kill(one.pids()[worker], signal.SIGTERM)
    later = one.run(PLAIN)
    assert first.ends()["workerId"] == worker
    state = one.end(ahead)
    assert (state["status"], state["workerId"]) == ("COMPLETED", worker)
    assert one.end(later)["workerId"] != worker
    assert one.story(later)["answers"] == 1
