"""The queue alone: states, limits, who owns a job."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from emulator import jobs
from emulator.job import MB, RUN_LIMIT, RUNSYNC_LIMIT, Job, Status, TooLarge
from emulator.jobs import KEEP, KEEP_SYNC, STREAM_LIMIT, JobQueue
from tests.waiting import PATIENCE, Clock


def new(queue: JobQueue, *, sync: bool = False, size: int = 0, **more: Any) -> Job:
    return queue.add({"input": {}, **more}, sync=sync, size=size)


def take(queue: JobQueue, worker: str = "w0", most: int = 1, wait: float = 0) -> list[Job]:
    return asyncio.run(queue.take(worker, most, wait))


def taken(queue: JobQueue, worker: str = "w0", **more: Any) -> Job:
    job = new(queue, **more)
    assert take(queue, worker) == [job]
    return job


def stops(queue: JobQueue, worker: str = "w0") -> list[str]:
    return asyncio.run(queue.to_stop(worker, 0))


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs can be stopped as soon as they are taken."""
    monkeypatch.setattr(jobs, "SETTLED", 0.0)


# --- from the queue to the answer --------------------------------------------------------------------


def test_a_job_goes_from_the_queue_over_a_worker_to_its_answer() -> None:
    queue = JobQueue()
    job = new(queue)
    assert job.shown() == {"id": job.id, "status": "IN_QUEUE"}
    assert take(queue) == [job]
    shown = job.shown()
    assert shown == {
        "id": job.id,
        "status": "IN_PROGRESS",
        "delayTime": shown["delayTime"],
        "workerId": "w0",
    }
    queue.finish(job, "w0", {"output": {"a": 1}})
    shown = job.shown()
    assert shown["status"] == "COMPLETED"
    assert shown["output"] == {"a": 1}
    assert isinstance(shown["delayTime"], int)
    assert isinstance(shown["executionTime"], int)
    assert job.done.is_set()


def test_times_are_milliseconds() -> None:
    queue = JobQueue()
    job = taken(queue)
    assert job.started is not None
    job.created = job.started - 3
    queue.finish(job, "w0", {"output": 1})
    job.ended = job.started + 2
    assert (job.shown()["delayTime"], job.shown()["executionTime"]) == (3000, 2000)


@pytest.mark.parametrize(
    ("result", "status", "rest"),
    [
        ({"output": {"a": 1}}, "COMPLETED", {"output": {"a": 1}}),
        ({"output": []}, "COMPLETED", {"output": []}),
        ({"output": 0}, "COMPLETED", {"output": 0}),
        ({}, "COMPLETED", {}),
        ({"error": ""}, "COMPLETED", {}),
        ({"error": "text"}, "FAILED", {"error": "text"}),
        (
            {"output": {"partial": 1}, "error": "text"},
            "FAILED",
            {"output": {"partial": 1}, "error": "text"},
        ),
        ({"output": {"a": 1}, "stopPod": True}, "COMPLETED", {"output": {"a": 1}}),
    ],
)
def test_what_a_worker_posts_is_shown(
    result: dict[str, Any], status: str, rest: dict[str, Any]
) -> None:
    queue = JobQueue()
    job = taken(queue)
    queue.finish(job, "w0", result)
    shown = job.shown()
    timing = {name: shown[name] for name in ("delayTime", "executionTime", "workerId")}
    assert shown == {"id": job.id, "status": status, **timing, **rest}


def test_an_error_that_is_no_string_becomes_one() -> None:
    queue = JobQueue()
    job = taken(queue)
    queue.finish(job, "w0", {"error": {"code": 1}})
    assert job.shown()["error"] == "{'code': 1}"


def test_a_worker_gets_what_the_client_posted_and_the_jobs_own_id() -> None:
    queue = JobQueue()
    job = new(queue, policy={"ttl": 10_000}, s3Config={"bucketName": "b"}, id="another")
    assert job.taken() == {
        "id": job.id,
        "input": {},
        "policy": {"ttl": 10_000},
        "s3Config": {"bucketName": "b"},
    }


def test_ids_say_how_a_job_came_in() -> None:
    queue = JobQueue()
    assert new(queue, sync=True).id.startswith("sync-")
    assert not new(queue).id.startswith("sync-")
    assert new(queue).id.endswith("-e1")


# --- the order of the queue -------------------------------------------------------------------------


def test_jobs_are_taken_in_the_order_in_which_they_came() -> None:
    queue = JobQueue()
    added = [new(queue) for _ in range(5)]
    assert take(queue) == added[:1]
    assert take(queue, "w1", 3) == added[1:4]
    assert take(queue, "w1", 3) == added[4:]
    assert take(queue) == []


def test_a_question_waits_for_a_job() -> None:
    async def scene() -> None:
        queue = JobQueue()
        questions = [asyncio.create_task(queue.take(name, 1, PATIENCE)) for name in ("w0", "w1")]
        await asyncio.sleep(0.02)
        added = [new(queue)]
        done, _ = await asyncio.wait(questions, return_when=asyncio.FIRST_COMPLETED)
        assert len(done) == 1
        added.append(new(queue))
        answers = await asyncio.gather(*questions)
        assert all(answers)
        assert sorted(job.id for answer in answers for job in answer) == sorted(
            job.id for job in added
        )

    asyncio.run(scene())


def test_a_question_ends_without_a_job_when_its_time_is_over() -> None:
    begun = time.monotonic()
    assert take(JobQueue(), wait=0.1) == []
    assert time.monotonic() - begun >= 0.1


def test_a_worker_that_may_not_take_a_job_leaves_it_to_the_others() -> None:
    async def scene() -> None:
        queue, may = JobQueue(), True
        closing = asyncio.create_task(queue.take("w0", 1, 0.2, lambda: may))
        await asyncio.sleep(0.02)
        may = False  # it was asked to end while its question was open
        job = new(queue)
        assert await closing == []
        assert await queue.take("w1", 1, 0) == [job]
        assert job.lives == 1

    asyncio.run(scene())


def test_the_queue_tells_how_long_its_first_job_has_waited() -> None:
    queue = JobQueue()
    assert queue.waited == 0
    first, _ = new(queue), new(queue)
    first.created -= 1000
    assert queue.waited >= 1000
    take(queue)
    assert queue.waited < 1000


# --- cancelling, purging, retrying ------------------------------------------------------------------


def test_cancelling_in_the_queue_takes_the_job_out_of_it() -> None:
    queue = JobQueue()
    job, other = new(queue), new(queue)
    queue.cancel(job)
    assert job.shown() == {"id": job.id, "status": "CANCELLED"}
    assert job.done.is_set()
    assert take(queue, most=5) == [other]
    assert stops(queue) == []


def test_cancelling_in_progress_tells_the_worker_and_drops_its_result() -> None:
    queue = JobQueue()
    job = taken(queue)
    queue.update(job, "w0", "half")
    queue.cancel(job)
    assert job.status is Status.CANCELLED
    assert "output" not in job.shown()
    assert stops(queue, "w1") == []
    assert stops(queue) == [job.id]
    assert stops(queue) == []  # told once
    queue.finish(job, "w0", {"output": 1})
    assert job.status is Status.CANCELLED
    assert "output" not in job.shown()
    assert queue.holds("w0") == []


@pytest.mark.parametrize("result", [{"output": 1}, {"error": "text"}])
def test_cancelling_after_the_end_changes_nothing(result: dict[str, Any]) -> None:
    queue = JobQueue()
    job = taken(queue)
    queue.finish(job, "w0", result)
    before = job.shown()
    queue.cancel(job)
    assert job.shown() == before
    assert stops(queue) == []


def test_a_stop_signal_reaches_a_question_that_is_open() -> None:
    async def scene() -> None:
        queue = JobQueue()
        job = new(queue)
        await queue.take("w0", 1, 0)
        question = asyncio.create_task(queue.to_stop("w0", PATIENCE))
        await asyncio.sleep(0.03)
        queue.cancel(job)
        assert await question == [job.id]

    asyncio.run(scene())


def test_a_job_that_was_just_taken_is_stopped_when_the_worker_can(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    monkeypatch.setattr(jobs, "time", clock)
    monkeypatch.setattr(jobs, "SETTLED", 0.2)
    queue = JobQueue()
    old = taken(queue)
    clock.now += 0.2
    job = taken(queue)
    queue.cancel(old)
    queue.cancel(job)
    assert stops(queue) == [old.id]
    assert stops(queue) == []
    clock.now += 0.2
    assert stops(queue) == [job.id]
    assert stops(queue) == []


def test_a_question_what_to_stop_ends_when_its_worker_does() -> None:
    question = JobQueue().to_stop("w0", 2 * PATIENCE, lambda: True)
    assert asyncio.run(asyncio.wait_for(question, PATIENCE)) == []


def test_purging_cancels_what_is_queued_and_nothing_else() -> None:
    queue = JobQueue()
    running = taken(queue)
    waiting = [new(queue) for _ in range(3)]
    assert queue.purge() == 3
    assert {job.status for job in waiting} == {Status.CANCELLED}
    assert running.status is Status.IN_PROGRESS
    assert take(queue) == []
    assert queue.purge() == 0


@pytest.mark.parametrize("status", list(Status))
def test_only_what_failed_or_timed_out_is_retried(status: Status) -> None:
    queue = JobQueue()
    job = new(queue)
    if status is not Status.IN_QUEUE:
        take(queue)
    if status is Status.COMPLETED:
        queue.finish(job, "w0", {"output": 1})
    elif status is Status.FAILED:
        queue.finish(job, "w0", {"output": 1, "error": "text"})
    elif status is Status.CANCELLED:
        queue.cancel(job)
    elif status is Status.TIMED_OUT:
        assert job.started is not None
        job.started -= 601
        queue.tick()
    assert job.status is status
    may = status in (Status.FAILED, Status.TIMED_OUT)
    assert queue.retry(job) is may
    assert queue.retried == may
    if may:
        assert job.shown() == {"id": job.id, "status": "IN_QUEUE"}
        assert not job.done.is_set()
        assert take(queue, "w1") == [job]
        queue.finish(job, "w1", {"output": 2})
        assert job.shown()["output"] == 2
        assert job.answers == 1


def test_a_late_result_of_the_first_try_is_not_the_seconds() -> None:
    queue = JobQueue()
    job = taken(queue, policy={"executionTimeout": 5_000})
    assert job.started is not None
    job.started -= 6
    queue.tick()
    queue.retry(job)
    queue.finish(job, "w0", {"output": "while queued"})
    take(queue, "w1")
    queue.finish(job, "w0", {"output": "of the first try"})
    assert job.status is Status.IN_PROGRESS
    queue.finish(job, "w1", {"output": "of the second"})
    assert job.shown()["output"] == "of the second"


def test_a_stop_signal_of_the_first_try_does_not_stop_the_second() -> None:
    queue = JobQueue()
    job, other = taken(queue), taken(queue)
    assert job.started is not None
    job.started -= 601
    queue.tick()
    queue.cancel(other)
    queue.retry(job)
    assert take(queue) == [job]
    assert stops(queue) == [other.id]


# --- time -------------------------------------------------------------------------------------------


def test_a_job_that_runs_too_long_is_timed_out_and_its_worker_told() -> None:
    queue = JobQueue()
    job = taken(queue, policy={"executionTimeout": 500_000})
    queue.update(job, "w0", "half")
    assert job.started is not None
    job.started -= 400
    queue.tick()
    assert job.status is Status.IN_PROGRESS
    job.started -= 101
    queue.tick()
    shown = job.shown()
    assert shown["status"] == "TIMED_OUT"
    assert shown["error"] == "the job ran for more than 500 s"
    assert shown["executionTime"] >= 501_000
    assert "output" not in shown
    assert stops(queue) == [job.id]


def test_a_job_runs_ten_minutes_at_most_without_a_policy() -> None:
    queue = JobQueue()
    job = taken(queue)
    assert job.started is not None
    job.started -= 500
    queue.tick()
    assert job.status is Status.IN_PROGRESS
    job.started -= 101
    queue.tick()
    assert job.status is Status.TIMED_OUT


@pytest.mark.parametrize("where", ["queued", "in progress"])
def test_a_job_whose_ttl_is_over_is_timed_out(where: str) -> None:
    queue = JobQueue()
    job = new(queue, policy={"ttl": 10_000})
    if where == "in progress":
        take(queue)
    job.created -= 11
    queue.tick()
    assert job.status is Status.TIMED_OUT
    assert job.shown()["error"] == "the job's ttl is over"
    assert take(queue) == []
    assert stops(queue) == ([job.id] if where == "in progress" else [])


def test_a_job_lives_a_day_at_most_without_a_policy() -> None:
    queue = JobQueue()
    job = new(queue)
    job.created -= 86_000
    queue.tick()
    assert job.status is Status.IN_QUEUE
    job.created -= 401
    queue.tick()
    assert job.status is Status.TIMED_OUT


@pytest.mark.parametrize(("sync", "kept"), [(False, KEEP), (True, KEEP_SYNC)])
def test_an_answer_is_kept_for_its_time(sync: bool, kept: float) -> None:
    queue = JobQueue()
    job = taken(queue, sync=sync)
    queue.finish(job, "w0", {"output": 1})
    assert job.ended is not None
    job.ended -= kept / 2
    queue.tick()
    assert queue.find(job.id) is job
    job.ended -= kept
    queue.tick()
    assert queue.find(job.id) is None


# --- workers that die -------------------------------------------------------------------------------


def test_a_job_is_queued_once_more_when_its_worker_dies_and_fails_when_the_next_one_does() -> None:
    queue = JobQueue()
    job = taken(queue)
    queue.update(job, "w0", "half")
    queue.lost("w0")
    assert job.shown() == {"id": job.id, "status": "IN_QUEUE"}
    assert take(queue, "w1") == [job]
    queue.lost("w1")
    shown = job.shown()
    assert shown["status"] == "FAILED"
    assert shown["error"] == "the worker died while it worked on this job"
    assert "output" not in shown
    assert take(queue) == []


def test_jobs_of_a_dead_worker_come_first_and_in_their_order() -> None:
    queue = JobQueue()
    added = [new(queue) for _ in range(4)]
    take(queue, "w0", 2)
    take(queue, "w1", 1)
    queue.lost("w0")
    assert take(queue, "w2", 9) == [added[0], added[1], added[3]]
    assert queue.holds("w1") == [added[2]]


def test_results_of_a_worker_that_lost_the_job_are_dropped() -> None:
    queue = JobQueue()
    job = taken(queue)
    queue.lost("w0")
    queue.finish(job, "w0", {"output": "while queued"})
    assert job.status is Status.IN_QUEUE
    take(queue, "w1")
    queue.finish(job, "w0", {"output": "of w0"})
    queue.update(job, "w0", "progress of w0")
    queue.add_stream(job, "w0", {"output": "piece of w0"})
    assert job.status is Status.IN_PROGRESS
    assert job.output is None
    assert queue.read_stream(job) == []
    queue.finish(job, "w1", {"output": "of w1"})
    assert job.shown()["output"] == "of w1"
    assert job.answers == 1


def test_a_second_result_of_the_same_worker_is_dropped() -> None:
    queue = JobQueue()
    job = taken(queue)
    queue.finish(job, "w0", {"output": 1})
    queue.finish(job, "w0", {"output": 2, "error": "text"})
    assert job.status is Status.COMPLETED
    assert job.output == 1
    assert job.answers == 1


def test_a_death_leaves_ended_jobs_alone() -> None:
    queue = JobQueue()
    done, cancelled = taken(queue), taken(queue)
    queue.finish(done, "w0", {"output": 1})
    queue.cancel(cancelled)
    queue.lost("w0")
    assert (done.status, cancelled.status) == (Status.COMPLETED, Status.CANCELLED)
    assert stops(queue) == []


# --- progress and streams ---------------------------------------------------------------------------


def test_progress_is_shown_until_the_answer_and_never_overwrites_it() -> None:
    queue = JobQueue()
    job = taken(queue)
    for number in range(3):
        queue.update(job, "w0", number)
        assert job.shown()["output"] == number
    queue.finish(job, "w0", {"output": "answer"})
    queue.update(job, "w0", "late")
    assert job.shown()["output"] == "answer"
    assert (job.updates, job.late) == ([0, 1, 2], 1)


def test_progress_is_no_answer_of_a_job_that_answers_nothing() -> None:
    queue = JobQueue()
    job = taken(queue)
    queue.update(job, "w0", "half")
    queue.finish(job, "w0", {})
    assert "output" not in job.shown()


def test_a_stream_is_read_once_and_in_order() -> None:
    queue = JobQueue()
    job = taken(queue)
    for number in range(3):
        queue.add_stream(job, "w0", {"output": number})
    assert queue.read_stream(job) == [{"output": number} for number in range(3)]
    queue.add_stream(job, "w0", {"output": 3})
    queue.finish(job, "w0", {"output": []})
    queue.add_stream(job, "w0", {"output": "late"})
    assert queue.read_stream(job) == [{"output": 3}]
    assert queue.read_stream(job) == []
    assert job.shown()["output"] == []


# --- limits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sync", "limit"), [(False, RUN_LIMIT), (True, RUNSYNC_LIMIT)])
def test_a_request_over_the_limit_is_refused(sync: bool, limit: int) -> None:
    queue = JobQueue()
    new(queue, sync=sync, size=limit)
    with pytest.raises(TooLarge) as caught:
        new(queue, sync=sync, size=limit + 1)
    assert str(caught.value) == f"the payload has {limit / MB:.1f} MB; {limit // MB} are allowed"
    assert queue.count(Status.IN_QUEUE) == 1


@pytest.mark.parametrize(("sync", "limit"), [(False, 10 * MB), (True, 20 * MB)])
def test_a_result_over_the_limit_completes_the_job_without_an_output(
    sync: bool, limit: int
) -> None:
    queue = JobQueue()
    fits, big = taken(queue, sync=sync), taken(queue, sync=sync)
    queue.finish(fits, "w0", {"output": 1}, limit)
    assert fits.shown()["output"] == 1
    queue.update(big, "w0", "half")
    for _ in range(2):  # the SDK may try again: it is refused again
        with pytest.raises(TooLarge):
            queue.finish(big, "w0", {"output": 1}, limit + 1)
    assert big.status is Status.COMPLETED
    assert "output" not in big.shown()


def test_progress_and_pieces_over_the_limit_are_refused_and_the_job_goes_on() -> None:
    queue = JobQueue()
    job = taken(queue)
    with pytest.raises(TooLarge):
        queue.update(job, "w0", "x", RUN_LIMIT + 1)
    with pytest.raises(TooLarge):
        queue.add_stream(job, "w0", "x", STREAM_LIMIT + 1)
    queue.add_stream(job, "w0", "y", STREAM_LIMIT)
    assert job.status is Status.IN_PROGRESS
    assert job.output is None
    assert queue.read_stream(job) == ["y"]


# --- who is told ------------------------------------------------------------------------------------


def test_who_listens_is_told_of_each_final_state_once() -> None:
    queue, told = JobQueue(), list[tuple[str, str]]()
    queue.on_final.append(lambda job: told.append((job.id, job.status)))
    done, cancelled = taken(queue), new(queue)
    queue.cancel(cancelled)
    queue.cancel(cancelled)
    queue.finish(done, "w0", {"output": 1})
    queue.finish(done, "w0", {"output": 1})
    died = taken(queue)
    queue.lost("w0")
    take(queue, "w1")
    queue.lost("w1")
    assert told == [(cancelled.id, "CANCELLED"), (done.id, "COMPLETED"), (died.id, "FAILED")]


def test_closing_ends_every_job_and_tells_no_one() -> None:
    queue, told = JobQueue(), list[Job]()
    queue.on_final.append(told.append)
    running, waiting, done = taken(queue), new(queue), new(queue)
    queue.cancel(done)
    told.clear()
    queue.close()
    assert (running.status, waiting.status) == (Status.CANCELLED, Status.CANCELLED)
    assert running.done.is_set()
    assert told == []
