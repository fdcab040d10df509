"""When the worker asks for another job."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from types import ModuleType
from typing import Any

import pytest

from tests.waiting import PATIENCE, Clock
from worker.queue.intake import FETCHING, LEAD, Intake, Turn


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("worker.queue.intake.time", clock)
    return clock


@pytest.fixture
def intake() -> Intake:
    return Intake()


def one(name: str = "a") -> dict[str, Any]:
    return {"id": name, "input": {}}


def draw_one(clock: Clock, intake: Intake, *, prepared_in: float) -> None:
    """A job from its taking to its end."""
    with intake.turn(one("earlier")) as turn:
        clock.now += prepared_in
        turn.waits()
        turn.draws()
        turn.ends()


# --- one job ----------------------------------------------------------------------------------------


def test_an_idle_worker_asks_and_one_whose_job_is_drawn_does(clock: Clock, intake: Intake) -> None:
    assert intake.open
    with intake.turn(one()) as turn:
        assert not intake.open
        turn.waits()
        assert not intake.open
        turn.draws()
        clock.now += 3600
        assert not intake.open  # nothing is known yet
        turn.ends()
        assert intake.open  # while the answer is made and posted
    assert intake.open


def test_a_job_that_is_long_in_preparing_is_fetching(clock: Clock, intake: Intake) -> None:
    with intake.turn(one()) as turn:
        clock.now += FETCHING - 0.1
        assert not intake.open
        clock.now += 0.2
        assert intake.open
        turn.waits()
        assert not intake.open


def test_a_job_that_draws_nothing_holds_up_none(clock: Clock, intake: Intake) -> None:
    with intake.turn(one()) as turn:
        turn.ends()
        assert intake.open


@pytest.mark.parametrize("prepared_in", [0.0, 0.5, 1.5])
def test_the_next_job_is_taken_as_early_as_the_last_was_long_in_preparing(
    clock: Clock, intake: Intake, prepared_in: float
) -> None:
    draw_one(clock, intake, prepared_in=prepared_in)
    with intake.turn(one()) as turn:
        turn.waits()
        turn.draws()
        for done in range(1, 8):  # 10 steps of a second each
            clock.now += 1
            turn.step(done, 10)
        clock.now += 3 - prepared_in - 0.1
        assert not intake.open
        clock.now += 0.1 + 1e-6
        assert intake.open


def test_the_next_job_is_taken_later_by_the_time_that_decoding_takes(
    clock: Clock, intake: Intake
) -> None:
    for prepared_in, decoded_in in ((0.5, 0.3), (0.5, 1.5), (9.0, 9.0)):
        with intake.turn(one()) as turn:
            clock.now += prepared_in
            turn.waits()
            turn.draws()
            turn.step(1, 1)
            clock.now += decoded_in
            turn.ends()
        lead = min(prepared_in, LEAD) - min(decoded_in, LEAD)
        with intake.turn(one()) as turn:
            turn.draws()
            clock.now += 4
            turn.step(1, 2)  # the last step ends in 4 s
            clock.now += 4 - lead - 0.1
            assert not intake.open
            clock.now += 0.2
            assert intake.open


def test_a_long_fetch_moves_that_by_no_more_than_the_lead(clock: Clock, intake: Intake) -> None:
    draw_one(clock, intake, prepared_in=300.0)
    with intake.turn(one()) as turn:
        turn.draws()
        clock.now += 1
        turn.step(1, 10)
        clock.now += 9 - LEAD - 0.1
        assert not intake.open
        clock.now += 0.2
        assert intake.open


def test_what_was_estimated_is_corrected_by_each_step(clock: Clock, intake: Intake) -> None:
    with intake.turn(one()) as turn:
        turn.draws()
        clock.now += 1
        turn.step(1, 3)
        clock.now += 2  # the end that was expected
        assert intake.open
        clock.now += 8
        turn.step(2, 3)  # 11 s for two of three
        assert not intake.open
        clock.now += 5.6
        assert intake.open


def test_of_two_pipelines_only_the_last_ones_steps_count(clock: Clock, intake: Intake) -> None:
    with intake.turn(one()) as turn:
        turn.draws(2)
        for done in (1, 2):
            clock.now += 1
            turn.step(done, 2)
        clock.now += 60
        assert not intake.open  # the refiner comes
        turn.draws(2)  # the memory was short: from the start
        turn.step(1, 1)
        assert not intake.open
        clock.now += 5
        turn.step(1, 2)
        clock.now += 4.9
        assert not intake.open
        clock.now += 0.2
        assert intake.open


# --- several jobs -----------------------------------------------------------------------------------


def test_every_job_has_its_say(clock: Clock, intake: Intake) -> None:
    with ExitStack() as stack:
        drawn, fetching, third = (stack.enter_context(intake.turn(one(name))) for name in "abc")
        drawn.ends()
        third.ends()
        assert not intake.open
        clock.now += FETCHING
        assert intake.open
        third.waits()
        assert not intake.open
        third.ends()
        fetching.draws()
        assert not intake.open
    assert intake.open


def test_a_job_that_fails_leaves_nothing(clock: Clock, intake: Intake) -> None:
    def fail() -> None:
        with intake.turn(one()) as turn:
            turn.draws()
            raise ValueError("no luck")

    with pytest.raises(ValueError, match="no luck"):
        fail()
    assert intake.open


# --- the SDK's question -----------------------------------------------------------------------------


class Platform:
    """Stands in for the SDK's module: gives these jobs, one answer per question."""

    def __init__(self, *answers: list[dict[str, Any]] | None) -> None:
        self.module, self.asked = ModuleType("rp_scale"), list[int]()
        left = list(answers)

        async def get_job(session: str, count: int = 1) -> list[dict[str, Any]] | None:
            self.asked.append(count)
            return left.pop(0)

        self.module.get_job = get_job  # type: ignore[attr-defined]

    async def ask(self, count: int) -> Any:
        return await asyncio.wait_for(self.module.get_job("session", count), PATIENCE)


def test_one_job_is_asked_for_at_a_time_and_counts_before_its_handler_runs(
    clock: Clock, intake: Intake
) -> None:
    platform = Platform(None, [one()], [one("b")])
    intake.guard(platform.module)

    async def story() -> None:
        assert await platform.ask(2) is None
        assert await platform.ask(2) == [one()]
        assert not intake.open
        assert await platform.ask(1) is None  # the platform was not asked: it has a job
        assert platform.asked == [1, 1]
        clock.now += 0.25
        with intake.turn(one()) as turn:
            turn.waits()
            assert turn.prepared == 0.25  # since it was taken
            turn.ends()
            assert await platform.ask(1) == [one("b")]

    asyncio.run(story())


def test_a_question_that_waits_is_asked_as_soon_as_another_job_may_come(
    clock: Clock, intake: Intake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.queue.intake.LOOK", PATIENCE)
    platform = Platform([one("b")])
    intake.guard(platform.module)

    async def story() -> None:
        with intake.turn(one()) as turn:
            turn.draws()
            question = asyncio.create_task(platform.ask(1))
            await asyncio.sleep(0)
            assert platform.asked == []
            turn.ends()
            assert await question == [one("b")]

    asyncio.run(story())


def test_a_job_that_its_handler_never_saw_does_not_close_the_worker(
    clock: Clock, intake: Intake
) -> None:
    # The SDK drops a job that is stopped between its taking and its beginning.
    platform = Platform([one()], [one("b")])
    intake.guard(platform.module)

    async def story() -> None:
        await platform.ask(1)
        clock.now += FETCHING
        assert await platform.ask(1) == [one("b")]

    asyncio.run(story())


def test_a_plain_calls_turn_stands_alone(clock: Clock) -> None:
    turn = Turn()
    turn.waits()
    turn.draws()
    turn.step(1, 1)
    assert turn.free == clock.now
    turn.ends()
    assert turn.free < 0
