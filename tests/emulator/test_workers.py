"""Worker processes with the real SDK: the worst answers, deaths, scaling, and nothing left behind."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from emulator import workers
from emulator.__main__ import main as emulator_main
from emulator.job import Status
from emulator.jobs import JobQueue
from emulator.workers import NoWorkerStarts, Scale, WorkerPool
from tests.conftest import ROOT
from tests.emulator.running import Emulator, emulator, marked
from tests.waiting import PATIENCE, until

ENDED = {"id", "status", "delayTime", "executionTime", "workerId"}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulator]:
    """A platform with one worker that does two jobs at once."""
    with emulator(tmp_path_factory.mktemp("one"), CONCURRENCY="2") as running:
        yield running


# --- what the platform gets for what a handler returns -----------------------------------------------


def test_each_answer_ends_as_on_the_platform(one: Emulator) -> None:
    partial = {"error": "text", "partial": 1, "answer": 2}
    ids = {
        "fails": one.run({"raise": "no luck"}),
        "empty": one.run({"worst": "empty"}),
        "partial": one.run({"extra": partial}),
        "big": one.run({"worst": "big"}),
    }
    states = {name: one.end(job_id) for name, job_id in ids.items()}

    assert states["fails"]["status"] == "FAILED"
    assert set(states["fails"]) == {*ENDED, "error"}
    told = json.loads(states["fails"]["error"])
    assert told["error_type"] == "<class 'ValueError'>"
    assert told["error_message"] == "no luck"
    assert told["worker_id"] == "w0"
    assert {"error_traceback", "hostname", "runpod_version"} <= set(told)

    assert states["empty"]["status"] == "COMPLETED"
    assert set(states["empty"]) == ENDED

    assert states["partial"]["status"] == "FAILED"
    assert states["partial"]["error"] == "text"
    assert states["partial"]["output"] == {"partial": 1, "answer": 2, "worker": "w0"}

    assert states["big"]["status"] == "COMPLETED"
    assert set(states["big"]) == ENDED
    one.said(f"a post for {ids['big']} is refused: the result has 11.0 MB; 10 are allowed")
    one.said("Failed to return job results. | 400")


def test_a_sync_jobs_answer_may_have_11_mb(one: Emulator) -> None:
    state = one.post("runsync", json={"input": {"worst": "big"}})
    assert len(state["output"]["picture"]) == 11 << 20


def test_an_answer_that_is_no_json_hangs_until_the_execution_timeout(one: Emulator) -> None:
    stops = one.log().count("echo was stopped")
    policy = {"executionTimeout": 5_000}
    # Nothing is posted for bytes and half a surrogate pair, invalid JSON for NaN.
    ids = [one.run({"worst": name}, policy=policy) for name in ("bytes", "nan", "surrogate")]
    long = one.run({"seconds": 600}, policy=policy)
    endless = one.run({"worst": "bytes"})
    one.said(f"a post for {ids[1]} is refused: the body is no JSON: NaN is not in it")
    # The worker goes on to other jobs.
    assert one.end(one.run({"answer": 1}))["output"]["answer"] == 1
    assert one.status(endless)["status"] == "IN_PROGRESS"
    one.post(f"cancel/{endless}")
    for job_id in (*ids, long):
        state = one.end(job_id)
        assert state["status"] == "TIMED_OUT"
        assert set(state) == {*ENDED, "error"}
        assert state["error"] == "the job ran for more than 5 s"
        assert state["executionTime"] >= 5_000
    one.said("echo was stopped", stops + 1)  # the one that ran was told


# --- progress, stopping, batches --------------------------------------------------------------------


def test_progress_is_the_output_while_a_job_is_in_progress(one: Emulator, tmp_path: Path) -> None:
    go_on = tmp_path / "go on"
    job_id = one.run({"updates": 3, "until": str(go_on), "answer": "done"})
    until(lambda: len(one.story(job_id)["updates"]) == 3)
    state = one.status(job_id)
    assert (state["status"], state["output"]) == ("IN_PROGRESS", one.story(job_id)["updates"][-1])
    go_on.touch()
    assert one.end(job_id)["output"]["answer"] == "done"
    story = one.story(job_id)
    assert sorted(story["updates"]) == [0, 1, 2]
    assert (story["late"], story["answers"]) == (0, 1)


@pytest.mark.parametrize("pause", [0.0, 0.5])
def test_cancelling_stops_an_async_handler(one: Emulator, tmp_path: Path, pause: float) -> None:
    stops = one.log().count("echo was stopped")
    go_on = tmp_path / "go on"
    job_id, other = one.run({"seconds": 600}), one.run({"until": str(go_on), "answer": "kept"})
    one.under_way(job_id)
    time.sleep(pause)  # 0: before the SDK has even started it
    assert one.post(f"cancel/{job_id}") == {"id": job_id, "status": "CANCELLED"}
    one.said("echo was stopped", stops + 1)
    go_on.touch()
    assert one.end(other)["output"]["answer"] == "kept"
    assert one.status(job_id)["status"] == "CANCELLED"


def test_a_worker_with_concurrency_two_takes_two_jobs_at_once(
    one: Emulator, tmp_path: Path
) -> None:
    go_on = tmp_path / "go on"
    ids = [one.run({"until": str(go_on)}) for _ in range(2)]
    until(lambda: one.get("health")["jobs"]["inProgress"] == 2)
    go_on.touch()
    states = [one.end(job_id) for job_id in ids]
    assert {state["workerId"] for state in states} == {"w0"}
    assert one.workers()["ready"] == 1


# --- workers that end -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mortal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulator]:
    """A platform with one worker that does two jobs at once, and may end."""
    with emulator(tmp_path_factory.mktemp("mortal"), CONCURRENCY="2") as running:
        yield running


def test_a_worker_that_asks_for_it_is_replaced_after_its_answers(
    mortal: Emulator, tmp_path: Path
) -> None:
    # A job that hangs does not keep it; one that it works on does.
    hanging = mortal.run({"worst": "bytes"})
    mortal.under_way(hanging)
    mortal.said("Error while returning job result")
    go_on = tmp_path / "go on"
    other = mortal.run({"until": str(go_on), "answer": 1})
    mortal.under_way(other)
    asking = mortal.run({"answer": 2, "extra": {"refresh_worker": True}})
    state = mortal.end(asking)
    first = state["workerId"]
    assert state["status"] == "COMPLETED"
    assert state["output"] == {"answer": 2, "worker": first}
    go_on.touch()
    assert mortal.end(other)["output"] == {"answer": 1, "worker": first}
    following = mortal.end(mortal.run({"answer": 3}))
    assert following["workerId"] == [*mortal.pids()][-1] != first
    mortal.said(f"{first} ended")
    assert "died" not in mortal.log().replace("died 0", "")
    assert mortal.status(hanging)["workerId"] == following["workerId"]  # given to the next one
    mortal.post(f"cancel/{hanging}")


def test_a_worker_that_dies_is_replaced_and_its_job_done_once_more(
    mortal: Emulator, tmp_path: Path
) -> None:
    # What the worker started, and the SDK's heartbeat, hold its output open: that must not hide its end.
    job_id = mortal.run({"die_once": str(tmp_path / "died"), "answer": 3, "child": True})
    state = mortal.end(job_id)
    assert state["status"] == "COMPLETED"
    assert state["output"]["answer"] == 3
    dead, new = [*mortal.pids()][-2:]
    assert state["workerId"] == new
    mortal.said(f"{dead} died (exit 3)")
    assert mortal.story(job_id)["answers"] == 1


def test_a_job_that_kills_two_workers_fails(mortal: Emulator) -> None:
    deaths = mortal.get("/state")["counts"]["died"]
    state = mortal.end(mortal.run({"die": True}))
    assert state["status"] == "FAILED"
    assert set(state) == {*ENDED, "error"}
    assert state["error"] == "the worker died while it worked on this job"
    assert mortal.get("/state")["counts"]["died"] == deaths + 2
    assert mortal.end(mortal.run({"answer": 4}))["output"]["answer"] == 4


# --- scaling ----------------------------------------------------------------------------------------


def test_workers_follow_the_queue_between_their_least_and_most_number(tmp_path: Path) -> None:
    options = (
        "--workers",
        "2",
        "--min-workers",
        "1",
        "--scale-delay",
        "0.5",
        "--idle-timeout",
        "0.5",
    )
    with emulator(tmp_path, *options) as running:
        until(lambda: running.workers()["ready"] == 1)
        assert [*running.pids()] == ["w0"]
        ids = [running.run({"seconds": 600}) for _ in range(3)]
        until(lambda: running.workers()["running"] == 2)
        assert [running.status(job_id).get("workerId") for job_id in ids] == ["w0", "w1", None]
        for job_id in reversed(ids):
            running.post(f"cancel/{job_id}")
        until(lambda: running.get("/state")["counts"]["workers"] == 1)
        time.sleep(0.7)  # the last one is idle, and kept
        assert running.workers()["ready"] == 1
        assert [*running.pids()] == ["w0", "w1"]
        assert "died" not in running.log().replace("died 0", "")
        assert running.end(running.run({"answer": 1}))["output"]["answer"] == 1


# --- the end ----------------------------------------------------------------------------------------


ENDINGS = [
    # signals, the job that runs, the seconds that it has, and the state that its client gets
    ((signal.SIGINT,), {"seconds": 1}, PATIENCE, "COMPLETED"),
    ((signal.SIGINT, signal.SIGINT), {"seconds": 600, "child": True}, 5.0, "CANCELLED"),
    ((signal.SIGTERM,), {"block": 600, "child": True}, 5.0, "CANCELLED"),
    ((signal.SIGHUP,), {"block": 1}, PATIENCE, "COMPLETED"),
    ((signal.SIGTERM,), {}, 5.0, "CANCELLED"),  # the worker has not even started
]


def test_a_signal_ends_everything_while_a_job_runs(tmp_path: Path) -> None:
    """All endings at the same time: most of it is waiting."""
    with ThreadPoolExecutor(len(ENDINGS)) as threads:
        ends = [threads.submit(end, tmp_path / str(n), *e) for n, e in enumerate(ENDINGS)]
        for ending in ends:
            ending.result()


def end(
    folder: Path,
    signals: tuple[signal.Signals, ...],
    work: dict[str, Any],
    grace: float,
    expected: str,
) -> None:
    folder.mkdir()
    with emulator(folder, grace=grace) as running, ThreadPoolExecutor() as threads:
        asked = threads.submit(running.post, "runsync", json={"input": work})
        running.said('"Started."' if work else "started (pid")
        for number in signals[:-1]:
            running.process.send_signal(number)
            time.sleep(0.3)
        assert running.stop(signals[-1]) == 0  # and nothing that it started is left
        assert asked.result()["status"] == expected
        assert "\nTraceback" not in running.log()


def test_homes_are_the_workers_own_and_the_volume_is_shared(tmp_path: Path) -> None:
    show = (
        "import os, time; print('seen', *[os.environ[name] for name in"
        " ('RUNPOD_POD_ID', 'HOME', 'LORA_CACHE_DIR')]); time.sleep(600)"
    )
    volume = tmp_path / "volume"
    command = [sys.executable, "-m", "emulator", "--port", "0", "--workers", "2"]
    command += ["--volume", str(volume), "--", sys.executable, "-c", show]
    log = tmp_path / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)
    try:
        found = until(
            lambda: len(f := re.findall(r"seen (\w+) (\S+) (\S+)", log.read_text())) == 2 and f
        )
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 0
    assert {name for name, _, _ in found} == {"w0", "w1"}
    assert len({home for _, home, _ in found}) == 2
    assert {cache for _, _, cache in found} == {str(volume / "loras")}
    assert volume.is_dir()
    assert not any(Path(home).exists() for _, home, _ in found)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("--workers 0", "--workers must be"),
        ("--workers 1 --min-workers 2", "--min-workers"),
        ("--port 70000", "--port must be"),
        ("--port 0 --host 203.0.113.1", "203.0.113.1 port 0 cannot be used"),
        ("--port 0 -- no-such-command", "the workers cannot be started"),
    ],
)
def test_a_wrong_option_is_told(
    arguments: str,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert main(arguments, monkeypatch) == 2
    assert text in caplog.text + capsys.readouterr().err


def test_a_port_in_use_is_told(
    one: Emulator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    port = one.address.rsplit(":", 1)[1]
    assert main(f"--port {port}", monkeypatch) == 2
    assert f"127.0.0.1 port {port} cannot be used" in caplog.text


def test_every_option_is_in_the_documents(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main("--help", monkeypatch) == 0
    options = set(re.findall(r"--[a-z-]+", capsys.readouterr().out)) - {"--help"}
    table = (ROOT / "docs" / "development.md").read_text().split("| option |")[1].split("\n\n")[0]
    assert set(re.findall(r"`(--[a-z-]+)", table)) == options


def main(arguments: str, monkeypatch: pytest.MonkeyPatch) -> object:
    """The exit code of `python -m emulator` with these, run in this process."""
    monkeypatch.setattr(sys, "argv", ["emulator", *arguments.split()])
    try:
        return emulator_main()
    except SystemExit as ended:
        return ended.code


# --- the pool alone, over plain commands -------------------------------------------------------------


DEAF = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    "print('deaf', flush=True); time.sleep(600)"
)


def pool_of(script: str, folder: Path, mark: str = "", **scale: Any) -> WorkerPool:
    environment = {"PATH": os.environ["PATH"], "MARK": mark}
    return WorkerPool(
        [sys.executable, "-c", script], environment, JobQueue(), Scale(**scale), folder
    )


def run(pool: WorkerPool, enough: Callable[[], Any]) -> None:
    """Runs a pool until something is true."""

    async def main() -> bool:
        over = asyncio.Event()
        running = asyncio.create_task(pool.run(over))
        deadline = time.monotonic() + PATIENCE
        while not (found := enough()) and time.monotonic() < deadline and not running.done():
            await asyncio.sleep(0.02)
        over.set()
        await running
        return bool(found)

    assert asyncio.run(main())


def test_a_worker_that_cannot_start_is_tried_again_after_a_pause(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pool = pool_of("raise SystemExit(7)", tmp_path)
    caplog.set_level("INFO")
    begun = time.monotonic()
    run(pool, lambda: pool.deaths == 2)
    assert time.monotonic() - begun > 0.8
    assert "w1 died (exit 7)" in caplog.text


def test_the_third_worker_that_cannot_start_ends_it_and_shows_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(workers, "RESTART_PAUSE", 0.05)
    (tmp_path / "worker.py").write_text(
        "print(*range(30), sep='\\n'); raise SystemExit('no model')"
    )
    assert main(f"--port 0 -- {sys.executable} {tmp_path}/worker.py", monkeypatch) == 1
    text = caplog.records[-1].getMessage()
    said = "3 workers died, and none ever was ready; the last one printed:"
    assert text.splitlines() == [said, *map(str, range(11, 30)), "no model"]


LAST_LOADS = "import os, time; os.environ['RUNPOD_POD_ID'] == 'w3' and time.sleep(600)"
"""A command of which three workers die at once, and the fourth is still loading."""


def test_a_worker_that_still_starts_is_waited_for_and_proves_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "RESTART_PAUSE", 0.05)
    pool = pool_of(LAST_LOADS, tmp_path, least=4, most=4)
    asked: list[list[str]] = []

    def enough() -> bool:
        if pool.deaths == 3 and not asked:
            asked.append(list(pool.workers))
            pool.heard_of("w3")
        return pool.deaths >= 8  # those that take the places of the dead die, too

    run(pool, enough)
    assert asked == [["w3"]]


def test_it_ends_when_the_last_that_still_starts_dies_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "RESTART_PAUSE", 0.05)
    pool = pool_of(LAST_LOADS, tmp_path, least=4, most=4)

    def never() -> None:
        if pool.deaths == 3 and (worker := pool.workers.get("w3")):
            worker.kill()

    with pytest.raises(NoWorkerStarts, match="4 workers died, and none ever was ready"):
        run(pool, never)


def test_a_command_that_once_worked_is_started_again_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "RESTART_PAUSE", 0.05)
    pool = pool_of(LAST_LOADS.replace("w3", "w1"), tmp_path)

    def enough() -> bool:
        if worker := pool.workers.get("w1"):  # it asks for a job, and dies later
            pool.heard_of("w1")
            worker.kill()
        return pool.deaths == 6

    run(pool, enough)


def test_a_killed_worker_is_replaced_and_nothing_of_it_is_left(tmp_path: Path) -> None:
    mark = f"killed-{tmp_path}"
    script = "import subprocess, time; subprocess.Popen(['sleep', '600']); time.sleep(600)"
    pool = pool_of(script, tmp_path, mark)
    left: list[int] = []

    def enough() -> bool:
        if not left and len(found := marked(mark)) == 2:
            left.extend(found)
            os.kill(pool.workers["w0"].process.pid, signal.SIGKILL)
        return list(pool.workers) == ["w1"] and not set(left) & set(marked(mark))

    run(pool, enough)
    assert len(left) == 2
    assert pool.deaths == 1
    assert marked(mark) == []


def test_without_a_least_number_the_first_job_starts_a_worker_at_once(tmp_path: Path) -> None:
    pool = pool_of("import time; time.sleep(600)", tmp_path, least=0, most=2, delay=10 * PATIENCE)
    begun = time.monotonic()

    def enough() -> bool:
        if time.monotonic() - begun > 0.3 and not pool._queue.waited:
            assert not pool.workers
            pool._queue.add({"input": {}})
        return len(pool.workers) == 1

    run(pool, enough)


def test_a_worker_deaf_to_sigterm_is_killed_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(workers, "LAST_GRACE", 0.3)
    mark = f"deaf-{tmp_path}"
    pool = pool_of(f"import subprocess; subprocess.Popen(['sleep', '600']); {DEAF}", tmp_path, mark)
    run(pool, lambda: "[w0] deaf" in caplog.text)
    until(lambda: not marked(mark))


def test_a_worker_that_does_not_stop_in_time_is_killed_and_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "GRACE", 0.3)
    pool = pool_of(DEAF, tmp_path)

    def enough() -> bool:
        if "w0" in pool.workers:
            pool.stop("w0")
        return list(pool.workers) == ["w1"]

    run(pool, enough)
    assert pool.deaths == 0


def test_a_stopping_worker_is_not_killed_while_it_has_a_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(workers, "GRACE", 0.1)
    caplog.set_level("INFO")
    pool = pool_of(DEAF, tmp_path)
    queue = pool._queue
    job = queue.add({"input": {}})

    async def main() -> None:
        over = asyncio.Event()
        running = asyncio.create_task(pool.run(over))
        while "[w0] deaf" not in caplog.text:
            await asyncio.sleep(0.01)
        assert await queue.take("w0", 1, 1) == [job]
        pool.stop("w0")
        assert not pool.takes("w0")
        await asyncio.sleep(0.5)
        assert job.status is Status.IN_PROGRESS
        assert pool.workers["w0"].alive
        queue.finish(job, "w0", {"output": 1})
        while "w0" in pool.workers:
            await asyncio.sleep(0.02)
        over.set()
        await running

    asyncio.run(asyncio.wait_for(main(), PATIENCE))
    assert job.output == 1


def test_a_line_of_any_length_does_not_stop_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    script = "print('x' * (3 << 20)); print('after', flush=True); import time; time.sleep(600)"
    pool = pool_of(script, tmp_path)
    run(pool, lambda: "[w0] after" in caplog.text)


def test_a_workers_last_words_are_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    script = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit('farewell'));"
        "print('ready', flush=True); time.sleep(600)"
    )
    pool = pool_of(script, tmp_path)
    run(pool, lambda: "[w0] ready" in caplog.text)
    assert "[w0] farewell" in caplog.text


def test_the_pool_runs_outside_of_the_main_thread(tmp_path: Path) -> None:
    pool = pool_of("import time; time.sleep(600)", tmp_path)
    thread = threading.Thread(target=run, args=(pool, lambda: pool.workers))
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive()
