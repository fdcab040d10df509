"""A job's clock: it runs while the job is worked on, and stands while the job waits for its turn."""

from __future__ import annotations

import pytest

from tests.waiting import Clock
from worker.stop import Cancelled, DeadlineExceeded, Stop


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("worker.stop.time", clock)
    return clock


def test_the_time_of_waiting_does_not_count(clock: Clock) -> None:
    stop = Stop(10.0)
    clock.now += 4
    stop.wait()
    clock.now += 3600
    stop.check()
    assert stop.left is None
    stop.go_on()
    assert stop.left == 6.0
    clock.now += 5.9
    stop.check()
    clock.now += 0.2
    with pytest.raises(DeadlineExceeded, match="the job was not done after 10 s"):
        stop.check()


def test_to_wait_twice_or_to_go_on_twice_changes_nothing(clock: Clock) -> None:
    stop = Stop(10.0)
    stop.go_on()
    assert stop.left == 10.0
    stop.wait()
    stop.wait()
    clock.now += 60
    stop.go_on()
    clock.now += 1
    stop.go_on()  # as where a job is drawn once more because the memory was short
    assert stop.left == 9.0


def test_time_that_was_over_before_the_waiting_stays_over(clock: Clock) -> None:
    stop = Stop(10.0)
    clock.now += 11
    stop.wait()
    stop.go_on()
    with pytest.raises(DeadlineExceeded):
        stop.check()


def test_a_job_without_a_limit_has_none_after_waiting(clock: Clock) -> None:
    stop = Stop()
    stop.wait()
    clock.now += 1e6
    stop.go_on()
    assert stop.left is None
    stop.check()


def test_a_job_that_waits_can_be_cancelled(clock: Clock) -> None:
    stop = Stop(10.0)
    stop.wait()
    stop.cancel()
    with pytest.raises(Cancelled):
        stop.check()
