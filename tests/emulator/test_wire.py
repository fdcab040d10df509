"""The wire between worker and platform, and what clients see of it. The test is the worker."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from emulator import client_api, worker_api
from emulator.job import MB, Status
from emulator.worker_api import wire_environment
from tests.emulator.running import KEY, Web, hook, web
from tests.waiting import PATIENCE, until

WORKER_PATHS = {
    "job-take/w0": "GET",
    "job-take-batch/w0": "GET",
    "job-stop/w0": "GET",
    "ping/w0": "GET",
    "job-done/w0/j": "POST",
    "job-stream/w0/j": "POST",
}
TIMES = {"delayTime", "executionTime"}


@pytest.fixture(scope="module")
def _site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    with web(tmp_path_factory.mktemp("web")) as running, pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker_api, "TAKE_WAIT", 0.5)
        patch.setattr(worker_api, "STOP_WAIT", 2 * PATIENCE)
        yield running


@pytest.fixture
def site(_site: Web) -> Iterator[Web]:
    """Both APIs, with nothing in the queue."""
    yield _site
    _site.queue.lost("w0")
    _site.post("purge-queue")
    worker = _site.pool.workers["w0"]
    worker.stopping = worker.asked = False


# --- keys -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", list(WORKER_PATHS))
@pytest.mark.parametrize("key", ["", "wrong", f"Bearer {KEY}"])
def test_only_workers_get_at_the_workers_paths(site: Web, path: str, key: str) -> None:
    answer = site.ask(WORKER_PATHS[path], path, headers={"Authorization": key})
    assert answer.status_code == 401
    assert answer.json() == {"error": "unauthorized"}


def test_clients_need_the_key_where_there_is_one(tmp_path: Path) -> None:
    paths = {
        "run": "POST",
        "runsync": "POST",
        "status/x": "GET",
        "stream/x": "GET",
        "cancel/x": "POST",
        "retry/x": "POST",
        "purge-queue": "POST",
        "health": "GET",
        "/state/x": "GET",
    }
    with web(tmp_path, api_key="secret") as site:
        for path, method in paths.items():
            for headers in ({}, {"Authorization": "secret"}, {"Authorization": "Bearer wrong"}):
                answer = site.ask(method, path, headers=headers, json={"input": {}})
                assert answer.status_code == 401, path
                assert answer.headers["content-type"] == "application/json"
        assert site.ask("GET", "health").status_code == 200
        assert site.ask_as_worker("GET", "ping/w0").status_code == 200
        # A client's key opens no worker's path: who holds it cannot answer jobs.
        assert site.ask("GET", "job-take/w0").status_code == 401


def test_without_a_key_any_authorization_will_do(site: Web) -> None:
    for headers in ({}, {"Authorization": "Bearer anything"}):
        assert site.ask("GET", "health", headers=headers).status_code == 200


def test_a_browser_may_ask_from_anywhere(site: Web) -> None:
    asked = {
        "Origin": "http://page.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    answer = site.ask("OPTIONS", "run", headers=asked)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "*"
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert "authorization" in answer.headers["access-control-allow-headers"].lower()
    for path in ("health", "status/nothing"):  # a page must be able to read errors, too
        answer = site.ask("GET", path, headers={"Origin": "http://page.example"})
        assert answer.headers["access-control-allow-origin"] == "*"


def test_a_preflight_needs_no_key(tmp_path: Path) -> None:
    asked = {"Origin": "http://page.example", "Access-Control-Request-Method": "POST"}
    with web(tmp_path, api_key="secret") as site:
        assert site.ask("OPTIONS", "run", headers=asked).status_code == 200
        answer = site.ask("POST", "run", headers={"Origin": "http://page.example"})
        assert answer.status_code == 401
        assert answer.headers["access-control-allow-origin"] == "*"


# --- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"{}",
        b'{"input": null}',
        b'{"input": {"seed": NaN}}',
        b'{"input": {"seed": -Infinity}}',
        b'{"input": {"seed": 1e999}}',
        b'{"input": {"seed": 1' + b"0" * 5000 + b"}}",
        b'{"input": ' + b"[" * 100_000,
        b"\xff\xfe{",
        b'{"input": {}, "policy": []}',
        b'{"input": {}, "policy": {"executionTimeout": 4999}}',
        b'{"input": {}, "policy": {"executionTimeout": "6000"}}',
        b'{"input": {}, "policy": {"executionTimeout": true}}',
        b'{"input": {}, "policy": {"ttl": 9999}}',
        b'{"input": {}, "policy": {"ttl": 604800001}}',
        b'{"input": {}, "policy": {"ttl": 1' + b"0" * 400 + b"}}",
        b'{"input": {}, "webhook": {"url": "http://127.0.0.1"}}',
    ],
    ids=lambda body: body[:60].decode(errors="replace"),
)
@pytest.mark.parametrize("path", ["run", "runsync"])
def test_a_bad_body_is_refused(site: Web, path: str, body: bytes) -> None:
    answer = site.ask("POST", path, data=body)
    assert answer.status_code == 400
    assert list(answer.json()) == ["error"]
    assert site.queue.count(Status.IN_QUEUE) == 0


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "status"),
        ("POST", "status"),
        ("GET", "stream"),
        ("POST", "cancel"),
        ("POST", "retry"),
    ],
)
def test_an_unknown_id_is_not_found(site: Web, method: str, path: str) -> None:
    answer = site.ask(method, f"{path}/nothing")
    assert answer.status_code == 404
    assert answer.json() == {"error": "job not found"}


def test_another_endpoint_is_not_found_and_a_wrong_method_not_allowed(site: Web) -> None:
    assert site.ask("GET", "/v2/other/health").status_code == 404
    assert site.ask("GET", "run").status_code == 405
    assert site.ask("GET", "purge-queue").status_code == 405


@pytest.mark.parametrize("path", ["job-done", "job-stream"])
@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'{"output": NaN}', b'{"output": -1e999}', b"[" * 100_000]
)
def test_a_workers_bad_body_is_refused_and_the_job_goes_on(
    site: Web, path: str, body: bytes
) -> None:
    job_id = site.run()
    site.take()
    answer = site.ask_as_worker("POST", f"{path}/w0/{job_id}", data=body)
    assert answer.status_code == 400
    assert site.status(job_id)["status"] == "IN_PROGRESS"


def test_a_workers_post_for_an_unknown_job_is_not_found(site: Web) -> None:
    assert site.finish("nothing", {"output": 1}).status_code == 404


def test_who_hangs_up_in_the_middle_of_a_post_harms_nothing(
    site: Web, caplog: pytest.LogCaptureFixture
) -> None:
    job_id = site.run()
    site.take()
    host, port = site.address.removeprefix("http://").split(":")
    paths = {f"job-done/w0/{job_id}": KEY, "run": ""}
    for path, key in paths.items():
        with socket.create_connection((host, int(port))) as connection:
            head = f"POST /v2/local/{path} HTTP/1.1\r\nHost: x\r\nAuthorization: {key}\r\n"
            connection.sendall(f'{head}Content-Length: 1000\r\n\r\n{{"output":'.encode())
            time.sleep(0.1)
    time.sleep(0.2)
    assert caplog.text == ""
    assert site.status(job_id)["status"] == "IN_PROGRESS"
    assert site.queue.count(Status.IN_QUEUE) == 0


# --- limits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "limit"), [("run", 10 * MB), ("runsync", 20 * MB)])
def test_a_payload_may_have_just_the_limit(site: Web, path: str, limit: int) -> None:
    frame = len(b'{"input": {"text": ""}}')
    fits = b'{"input": {"text": "' + b"x" * (limit - frame) + b'"}}'
    assert site.ask("POST", f"{path}?wait=1000", data=fits).status_code == 200
    for much in (1, 5 * MB):
        body = fits[:-3] + b"x" * much + fits[-3:]
        answer = site.ask("POST", path, data=body)
        assert answer.status_code == 413
        assert "MB" in answer.json()["error"]
    assert site.queue.count(Status.IN_QUEUE) == 1


def test_a_payload_counts_in_bytes_and_not_in_escapes(site: Web) -> None:
    text = "\u4e2d" * (3 * MB)  # 9 MB as it is sent, 18 MB with escapes
    body = json.dumps({"input": {"text": text}}, ensure_ascii=False).encode()
    assert site.ask("POST", "run", data=body).status_code == 200
    assert site.take()["input"]["text"] == text


@pytest.mark.parametrize(("path", "limit"), [("run", 10 * MB), ("runsync", 20 * MB)])
def test_a_result_over_the_limit_is_refused_and_the_job_has_no_output(
    site: Web, path: str, limit: int
) -> None:
    body = json.dumps({"output": "x" * limit}).encode()
    with ThreadPoolExecutor() as threads:
        asked = threads.submit(site.post, path, json={"input": {}})
        job_id = until(lambda: site.queue.waited and site.take()["id"])
        for _ in range(2):
            answer = site.ask_as_worker("POST", f"job-done/w0/{job_id}", data=body)
            assert answer.status_code == 400
        asked.result()
    state = site.status(job_id)
    assert state["status"] == "COMPLETED"
    assert set(state) == {"id", "status", "workerId", *TIMES}


def test_a_sync_jobs_result_may_be_larger_than_an_async_ones(site: Web) -> None:
    with ThreadPoolExecutor() as threads:
        asked = threads.submit(site.post, "runsync", json={"input": {}})
        job_id = until(lambda: site.queue.waited and site.take()["id"])
        assert site.finish(job_id, {"output": "x" * (11 * MB)}).status_code == 200
        assert len(asked.result()["output"]) == 11 * MB


def test_a_piece_of_a_stream_over_a_megabyte_is_refused(site: Web) -> None:
    job_id = site.run()
    site.take()
    for size, status in ((MB - 100, 200), (MB, 400)):
        answer = site.ask_as_worker("POST", f"job-stream/w0/{job_id}", json={"output": "x" * size})
        assert answer.status_code == status
    assert len(site.get(f"stream/{job_id}")["stream"]) == 1
    assert site.status(job_id)["status"] == "IN_PROGRESS"


# --- taking jobs ------------------------------------------------------------------------------------


def test_a_question_for_jobs_is_held_and_ends_with_204(site: Web) -> None:
    begun = time.monotonic()
    answer = site.ask_as_worker("GET", "job-take/w0?gpu=x&job_in_progress=0")
    assert answer.status_code == 204
    assert answer.content == b""
    assert time.monotonic() - begun > 0.4


def test_a_question_that_is_held_gets_the_next_job(
    site: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_api, "TAKE_WAIT", 2 * PATIENCE)  # longer than the test asks
    with ThreadPoolExecutor() as threads:
        asked = threads.submit(site.take)
        time.sleep(0.2)
        job_id = site.run({"a": 1})
        assert asked.result() == {"id": job_id, "input": {"a": 1}}


def test_a_batch_is_a_list(site: Web) -> None:
    ids = [site.run() for _ in range(3)]
    answer = site.ask_as_worker("GET", "job-take-batch/w0?gpu=x&batch_size=2&job_in_progress=0")
    assert [job["id"] for job in answer.json()] == ids[:2]
    answer = site.ask_as_worker("GET", "job-take-batch/w0?gpu=x&batch_size=2&job_in_progress=1")
    assert [job["id"] for job in answer.json()] == ids[2:]
    assert site.ask_as_worker("GET", "job-take-batch/w0?batch_size=2").status_code == 204


def test_everything_beside_the_input_reaches_the_worker_and_no_other_id(site: Web) -> None:
    more = {
        "policy": {"executionTimeout": 6_000, "ttl": 20_000, "lowPriority": True},
        "s3Config": {"accessId": "a", "accessSecret": "b", "bucketName": "c", "endpointUrl": "d"},
        "webhook": "http://127.0.0.1:1/",
    }
    job_id = site.run({"a": 1}, **more, id="another")
    assert site.take() == {"id": job_id, "input": {"a": 1}, **more}
    assert set(site.status(job_id)) == {"id", "status", "delayTime", "workerId"}


def test_text_that_utf_8_cannot_hold_passes_both_ways(site: Web) -> None:
    body = b'{"input": {"text": "\\ud800 \\u4e2d \\u0000"}}'
    job_id = site.ask("POST", "run", data=body).json()["id"]
    assert site.take()["input"] == {"text": "\ud800 \u4e2d \0"}
    result = b'{"output": "\\udfff"}'
    assert site.ask_as_worker("POST", f"job-done/w0/{job_id}", data=result).status_code == 200
    assert site.status(job_id)["output"] == "\udfff"


@pytest.mark.parametrize("name", ["w0", "w77"])
def test_a_worker_that_is_to_end_or_unknown_gets_no_job_and_no_quick_answer(
    site: Web, name: str
) -> None:
    site.pool.workers["w0"].stopping = True
    job_id = site.run()
    begun = time.monotonic()
    assert site.ask_as_worker("GET", f"job-take/{name}").status_code == 204
    assert time.monotonic() - begun > 0.4  # the SDK asks again at once
    assert site.status(job_id)["status"] == "IN_QUEUE"


def test_a_worker_that_is_to_end_while_it_asks_keeps_its_jobs_and_gets_no_other(site: Web) -> None:
    running = site.run()
    site.take()
    with ThreadPoolExecutor() as threads:
        asked = threads.submit(site.ask_as_worker, "GET", "job-take/w0")
        time.sleep(0.2)
        site.pool.workers["w0"].stopping = True
        waiting = site.run()
        assert asked.result().status_code == 204
    assert site.status(running)["status"] == "IN_PROGRESS"
    assert site.status(waiting)["status"] == "IN_QUEUE"
    assert site.finish(running, {"output": "kept"}).status_code == 200
    assert site.status(running)["output"] == "kept"


# --- answers, progress, streams ---------------------------------------------------------------------


def test_a_result_labelled_as_a_form_is_read_as_json(site: Web) -> None:
    job_id = site.run()
    site.take()
    headers = {
        "Authorization": KEY,
        "X-Request-ID": job_id,
        "charset": "utf-8",
        "Content-Type": "application/x-www-form-urlencoded",
    }
    path = f"job-done/w0/{job_id}?gpu=x&isStream=false"
    answer = site.ask("POST", path, data=b'{"output": {"a": "\xc3\xa4"}}', headers=headers)
    assert answer.status_code == 200
    state = site.status(job_id)
    assert state == {
        "id": job_id,
        "status": "COMPLETED",
        "output": {"a": "\u00e4"},
        "workerId": "w0",
        **{name: state[name] for name in TIMES},
    }


def test_progress_is_shown_while_in_progress_and_not_after_the_answer(site: Web) -> None:
    job_id = site.run()
    site.take()
    for number in range(2):
        site.finish(job_id, {"status": "IN_PROGRESS", "output": {"step": number}})
        state = site.status(job_id)
        assert (state["status"], state["output"]) == ("IN_PROGRESS", {"step": number})
    site.finish(job_id, {"output": "answer"})
    site.finish(job_id, {"status": "IN_PROGRESS", "output": {"step": 3}})
    assert site.status(job_id)["output"] == "answer"
    story = site.story(job_id)
    assert story["updates"] == [{"step": 0}, {"step": 1}]
    assert (story["late"], story["answers"], story["let_go"]) == (1, 1, None)
    assert story["created"] <= story["started"] <= story["ended"]


def test_a_result_of_another_worker_is_dropped(site: Web) -> None:
    job_id = site.run()
    site.take()
    answer = site.ask_as_worker("POST", f"job-done/w1/{job_id}", json={"output": "foreign"})
    assert answer.status_code == 200
    assert site.status(job_id)["status"] == "IN_PROGRESS"


def test_a_stream_is_read_piece_by_piece_and_ends_empty(site: Web) -> None:
    job_id = site.run()
    assert site.get(f"stream/{job_id}") == {"status": "IN_QUEUE", "stream": []}
    site.take()
    path = f"job-stream/w0/{job_id}?gpu=x&isStream=false"
    for number in range(2):
        site.ask_as_worker("POST", path, json={"output": {"number": number}})
    pieces = [{"output": {"number": 0}}, {"output": {"number": 1}}]
    assert site.get(f"stream/{job_id}") == {"status": "IN_PROGRESS", "stream": pieces}
    assert site.get(f"stream/{job_id}") == {"status": "IN_PROGRESS", "stream": []}
    site.ask_as_worker("POST", path, json={"output": {"number": 2}})
    site.finish(job_id, {"output": []})
    last = {"status": "COMPLETED", "stream": [{"output": {"number": 2}}]}
    assert site.post(f"stream/{job_id}") == last
    assert site.get(f"stream/{job_id}") == {"status": "COMPLETED", "stream": []}
    assert site.status(job_id)["output"] == []


def test_a_stream_answers_as_soon_as_there_is_a_piece(
    site: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_api, "STREAM_WAIT", 2 * PATIENCE)  # longer than the test asks
    job_id = site.run()
    site.take()
    with ThreadPoolExecutor() as threads:
        asked = threads.submit(site.get, f"stream/{job_id}")
        site.ask_as_worker("POST", f"job-stream/w0/{job_id}", json={"output": 1})
        assert asked.result()["stream"] == [{"output": 1}]


def test_a_worker_that_asks_to_be_replaced_is_stopped(
    site: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped: list[str] = []
    monkeypatch.setattr(site.pool, "stop", stopped.append)
    job_id = site.run()
    site.take()
    site.finish(job_id, {"output": {"a": 1}, "stopPod": True})
    assert stopped == ["w0"]
    assert site.status(job_id)["output"] == {"a": 1}


# --- stopping ---------------------------------------------------------------------------------------


def test_cancelling_reaches_the_question_what_to_stop(site: Web) -> None:
    job_id = site.run()
    site.take()
    with ThreadPoolExecutor() as threads:
        asked = threads.submit(site.ask_as_worker, "GET", "job-stop/w0?gpu=x")
        time.sleep(0.1)
        assert site.post(f"cancel/{job_id}") == {"id": job_id, "status": "CANCELLED"}
        assert asked.result().json() == {"jobsToStop": [job_id]}
    state = site.status(job_id)
    assert set(state) == {"id", "status", "workerId", *TIMES}
    site.finish(job_id, {"output": "too late"})
    assert site.status(job_id) == state


def test_cancelling_in_the_queue_shows_no_times_and_no_worker(site: Web) -> None:
    job_id = site.run()
    assert site.post(f"cancel/{job_id}") == {"id": job_id, "status": "CANCELLED"}
    assert site.status(job_id) == {"id": job_id, "status": "CANCELLED"}
    assert site.post(f"cancel/{job_id}") == {"id": job_id, "status": "CANCELLED"}


def test_cancelling_after_the_end_tells_the_state_and_changes_nothing(site: Web) -> None:
    job_id = site.run()
    site.take()
    site.finish(job_id, {"output": 1})
    before = site.status(job_id)
    assert site.post(f"cancel/{job_id}") == {"id": job_id, "status": "COMPLETED"}
    assert site.status(job_id) == before


def test_a_question_what_to_stop_is_answered_when_its_worker_was_asked_to_end(site: Web) -> None:
    with ThreadPoolExecutor() as threads:
        asked = threads.submit(site.ask_as_worker, "GET", "job-stop/w0")
        time.sleep(0.2)
        assert not asked.done()
        site.pool.workers["w0"].asked = True
        assert asked.result().json() == {"jobsToStop": []}


def test_a_ping_is_answered(site: Web) -> None:
    answer = site.ask_as_worker("GET", "ping/w0?gpu=x&job_id=a,b&runpod_version=1.12.0")
    assert answer.json() == {"status": "ok"}


# --- time-outs, retries, purging, health, waiting ----------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_job_over_its_execution_timeout_is_timed_out_and_can_be_retried(
    site: Web, method: str
) -> None:
    job_id = site.run(policy={"executionTimeout": 500_000})
    site.take()
    site.finish(job_id, {"status": "IN_PROGRESS", "output": "half"})
    found = site.queue.find(job_id)
    assert found
    assert found.started is not None
    found.started -= 501
    until(lambda: site.status(job_id)["status"] == "TIMED_OUT")
    state = site.ask(method, f"status/{job_id}").json()
    assert set(state) == {"id", "status", "error", "workerId", *TIMES}
    assert state["error"] == "the job ran for more than 500 s"
    assert state["executionTime"] >= 501_000
    stop = site.ask_as_worker("GET", "job-stop/w0").json()
    assert stop == {"jobsToStop": [job_id]}
    retried = site.get("health")["jobs"]["retried"]
    assert site.post(f"retry/{job_id}") == {"id": job_id, "status": "IN_QUEUE"}
    assert site.get("health")["jobs"]["retried"] == retried + 1
    assert site.status(job_id) == {"id": job_id, "status": "IN_QUEUE"}
    assert site.take()["id"] == job_id
    site.finish(job_id, {"output": "second"})
    assert site.status(job_id)["output"] == "second"


def test_a_job_whose_ttl_is_over_in_the_queue_is_timed_out(site: Web) -> None:
    job_id = site.run(policy={"ttl": 10_000})
    found = site.queue.find(job_id)
    assert found
    found.created -= 11
    until(lambda: site.status(job_id)["status"] == "TIMED_OUT")
    assert set(site.status(job_id)) == {"id", "status", "error"}
    assert site.ask_as_worker("GET", "job-take/w0").status_code == 204


@pytest.mark.parametrize("end", ["IN_QUEUE", "IN_PROGRESS", "COMPLETED", "CANCELLED"])
def test_only_what_failed_is_retried(site: Web, end: str) -> None:
    job_id = site.run()
    if end != "IN_QUEUE":
        site.take()
    if end == "COMPLETED":
        site.finish(job_id, {"output": 1})
    elif end == "CANCELLED":
        site.post(f"cancel/{job_id}")
    answer = site.ask("POST", f"retry/{job_id}")
    assert answer.status_code == 400
    assert end in answer.json()["error"]
    assert site.status(job_id)["status"] == end


def test_a_failed_job_is_retried_without_its_old_answer(site: Web) -> None:
    job_id = site.run()
    site.take()
    site.finish(job_id, {"output": {"partial": 1}, "error": "text"})
    state = site.status(job_id)
    assert set(state) == {"id", "status", "output", "error", "workerId", *TIMES}
    assert (state["status"], state["output"], state["error"]) == ("FAILED", {"partial": 1}, "text")
    assert site.post(f"retry/{job_id}") == {"id": job_id, "status": "IN_QUEUE"}
    assert site.status(job_id) == {"id": job_id, "status": "IN_QUEUE"}


def test_purging_tells_how_many_were_removed(site: Web) -> None:
    running = site.run()
    site.take()
    ids = [site.run() for _ in range(2)]
    assert site.post("purge-queue") == {"removed": 2, "status": "completed"}
    assert [site.status(job_id)["status"] for job_id in ids] == ["CANCELLED"] * 2
    assert site.status(running)["status"] == "IN_PROGRESS"


def test_health_counts_jobs_and_workers(site: Web) -> None:
    before = site.get("health")["jobs"]
    ids = [site.run() for _ in range(4)]
    for job_id, result in zip(ids, ({"output": 1}, {"error": "text"}), strict=False):
        assert site.take()["id"] == job_id
        site.finish(job_id, result)
    site.take()
    health = site.get("health")
    changed = {name: health["jobs"][name] - count for name, count in before.items()}
    assert changed == {"completed": 1, "failed": 1, "inProgress": 1, "inQueue": 1, "retried": 0}
    assert health["workers"] == {
        "idle": 0,
        "initializing": 0,
        "ready": 1,
        "running": 1,
        "throttled": 0,
        "unhealthy": 0,
    }
    site.pool.workers["w0"].stopping = True
    workers = site.get("health")["workers"]
    assert (workers["ready"], workers["running"], workers["idle"]) == (0, 1, 0)


def test_runsync_waits_for_the_answer(site: Web) -> None:
    with ThreadPoolExecutor() as threads:
        asked = threads.submit(site.post, "runsync", json={"input": {}})
        job_id = until(lambda: site.queue.waited and site.take()["id"])
        site.finish(job_id, {"output": {"a": 1}})
        state = asked.result()
    assert set(state) == {"id", "status", "output", "workerId", *TIMES}
    assert (state["id"], state["status"], state["output"]) == (job_id, "COMPLETED", {"a": 1})


def test_runsync_tells_the_state_when_its_wait_is_over(site: Web) -> None:
    def ask(wait: int) -> tuple[dict[str, Any], float]:
        begun = time.monotonic()
        return site.post(f"runsync?wait={wait}", json={"input": {}}), time.monotonic() - begun

    with ThreadPoolExecutor() as threads:
        for state, seconds in threads.map(ask, [1000, 1, -5]):
            assert state == {"id": state["id"], "status": "IN_QUEUE"}
            assert seconds >= 1
    job_id = site.take()["id"]
    site.finish(job_id, {"output": 1})
    assert site.status(job_id)["status"] == "COMPLETED"


def test_a_wait_that_is_no_number_is_refused(site: Web) -> None:
    assert site.ask("POST", "runsync?wait=soon", json={"input": {}}).status_code == 400


def test_the_page_shows_the_counts_and_the_last_jobs(site: Web) -> None:
    job_id = site.run()
    assert "<table" in site.ask("GET", "/").text
    state = site.ask("GET", "/state").json()
    names = ["queue", "running", "done", "failed", "cancelled", "workers", "died"]
    assert list(state["counts"]) == names
    assert state["counts"]["queue"] == 1
    assert state["jobs"][0] == [job_id, "IN_QUEUE", None, None]
    assert len(state["jobs"]) <= 50


# --- webhooks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statuses", "posted"), [((), 1), ((404,), 2), ((500, 302), 3), ((500,) * 4, 3)]
)
def test_a_webhook_is_tried_three_times(site: Web, statuses: tuple[int, ...], posted: int) -> None:
    with hook(*statuses) as (url, posts):
        job_id = site.run(webhook=url)
        site.take()
        site.finish(job_id, {"error": "no luck"})
        until(lambda: len(posts) == posted)
        time.sleep(0.3)
        assert posts == [("application/json", site.status(job_id))] * posted
        assert posts[0][1]["status"] == "FAILED"


def test_a_webhook_is_told_of_cancelled_and_timed_out_jobs(site: Web) -> None:
    with hook() as (url, posts):
        cancelled, late = site.run(webhook=url), site.run(webhook=url, policy={"ttl": 10_000})
        site.post(f"cancel/{cancelled}")
        until(lambda: posts)
        found = site.queue.find(late)
        assert found
        found.created -= 11
        until(lambda: len(posts) == 2)
        assert [body["status"] for _, body in posts] == ["CANCELLED", "TIMED_OUT"]


def test_a_webhook_that_cannot_be_reached_harms_nothing(
    site: Web, caplog: pytest.LogCaptureFixture
) -> None:
    with hook() as (gone, _):
        pass
    for url in (gone, "no url", "http://", "ftp://127.0.0.1/", "http://[::1"):
        caplog.clear()
        job_id = site.run(webhook=url)
        site.take()
        assert site.finish(job_id, {"output": 1}).status_code == 200
        until(lambda: caplog.text.count("webhook of") == 3, lambda: caplog.text)
        assert "token" not in caplog.text  # a webhook's URL may carry one
        assert site.status(job_id)["status"] == "COMPLETED"


# --- the SDK's variables ----------------------------------------------------------------------------


def test_the_urls_for_workers_are_as_the_sdk_wants_them() -> None:
    found = wire_environment("http://127.0.0.1:1", "ep", "key")
    for name in ("GET_JOB", "POST_OUTPUT", "POST_STREAM", "PING"):
        url = found[f"RUNPOD_WEBHOOK_{name}"]
        assert url.startswith("http://127.0.0.1:1/v2/ep/")
        assert "?" in url
        assert "$" in url
    assert "/job-take/" in found["RUNPOD_WEBHOOK_GET_JOB"]  # job-take-batch and job-stop come of it
    assert found["RUNPOD_AI_API_KEY"] == "key"


# --- many at once -----------------------------------------------------------------------------------


def test_many_clients_and_questions_at_once_lose_and_double_no_job(site: Web) -> None:
    taken: list[str] = []
    over = threading.Event()

    def work() -> None:
        while not over.is_set():
            answer = site.ask_as_worker("GET", "job-take-batch/w0?batch_size=3")
            for job in answer.json() if answer.status_code == 200 else []:
                taken.append(job["id"])
                site.finish(job["id"], {"output": job["input"]})

    def client(number: int) -> dict[str, Any]:
        state: dict[str, Any] = site.post("runsync", json={"input": {"number": number}})
        return state

    with ThreadPoolExecutor(12) as threads:
        workers = [threads.submit(work) for _ in range(4)]
        states = list(threads.map(client, range(60)))
        over.set()
        for worker in workers:
            worker.result()
    assert [state["output"]["number"] for state in states] == list(range(60))
    assert sorted(taken) == sorted(state["id"] for state in states)
