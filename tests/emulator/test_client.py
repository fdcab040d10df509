"""The runpod Python client on the emulator: every method, as against the platform."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import runpod
from runpod.http_client import ClientSession

from tests.emulator.running import Emulator, emulator, hook
from tests.waiting import PATIENCE, until

SUCCESS = {"id", "status", "delayTime", "executionTime", "workerId", "output"}
KEY = "secret"
LONG = int(PATIENCE)
S3 = {"accessId": "a", "accessSecret": "b", "bucketName": "c", "endpointUrl": "http://127.0.0.1:1"}


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulator]:
    folder = tmp_path_factory.mktemp("platform")
    options = ("--api-key", KEY, "--webhook-pause", "0.2")
    with emulator(folder, *options, key=KEY) as running:
        yield running


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulator]:
    """A platform whose handler is a generator."""
    with emulator(tmp_path_factory.mktemp("streams"), STREAM="1") as running:
        yield running


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Makes clients of a platform."""
    made = []

    def new(running: Emulator, key: str = KEY) -> Any:
        monkeypatch.setattr(runpod, "endpoint_url_base", running.base)
        made.append(runpod.Endpoint("local", api_key=key))
        return made[-1]

    yield new
    for endpoint in made:
        endpoint.rp_client.rp_session.close()


@pytest.fixture
def endpoint(platform: Emulator, client: Callable[..., Any]) -> Any:
    return client(platform)


# --- the client -------------------------------------------------------------------------------------


def test_run_status_and_output_of_a_job(platform: Emulator, endpoint: Any, tmp_path: Path) -> None:
    go_on = tmp_path / "go on"
    job = endpoint.run({"answer": 1, "seconds": 0.2, "until": str(go_on)})
    assert job.status() in ("IN_QUEUE", "IN_PROGRESS")
    go_on.touch()
    assert job.output(timeout=LONG) == {"answer": 1, "worker": "w0"}
    assert job.status() == "COMPLETED"
    assert job.output() == {"answer": 1, "worker": "w0"}
    state = platform.status(job.job_id)
    assert set(state) == SUCCESS
    assert state["id"] == job.job_id
    assert state["workerId"] == "w0"
    assert state["executionTime"] >= 200
    assert isinstance(state["delayTime"], int)


def test_run_sync_returns_the_output(endpoint: Any) -> None:
    assert endpoint.run_sync({"answer": 2}, timeout=LONG) == {"answer": 2, "worker": "w0"}
    assert endpoint.run_sync({"input": {"answer": 3}}, timeout=LONG)["answer"] == 3


def test_run_passes_what_stands_beside_the_input(endpoint: Any) -> None:
    policy = {"executionTimeout": 7_000, "ttl": 20_000}
    request = {"input": {"answer": 4}, "policy": policy, "s3Config": S3}
    output = endpoint.run_sync(request, timeout=LONG)
    assert output == {"answer": 4, "worker": "w0", "policy": policy, "s3Config": S3}


def test_output_of_a_failed_job_is_nothing(platform: Emulator, endpoint: Any) -> None:
    job = endpoint.run({"raise": "no luck"})
    assert job.output(timeout=LONG) is None
    assert job.status() == "FAILED"
    state = platform.status(job.job_id)
    assert set(state) == SUCCESS - {"output"} | {"error"}
    assert json.loads(state["error"])["error_message"] == "no luck"


def test_output_waits_no_longer_than_asked(endpoint: Any) -> None:
    job = endpoint.run({"seconds": 600})
    with pytest.raises(TimeoutError):
        job.output(timeout=1)
    assert job.cancel()["status"] == "CANCELLED"


def test_cancel_in_progress_and_in_the_queue(platform: Emulator, endpoint: Any) -> None:
    running, waiting = endpoint.run({"seconds": 600}), endpoint.run({"answer": 1})
    platform.under_way(running.job_id)
    for job in (waiting, running):
        assert job.cancel() == {"id": job.job_id, "status": "CANCELLED"}
        assert job.status() == "CANCELLED"
    shown = {"id": waiting.job_id, "status": "CANCELLED"}
    assert platform.status(waiting.job_id) == shown
    assert set(platform.status(running.job_id)) == SUCCESS - {"output"}
    # The worker was told: it is free before the ten minutes are over.
    assert endpoint.run_sync({"answer": 5}, timeout=LONG)["answer"] == 5


def test_purge_queue_and_health(platform: Emulator, endpoint: Any) -> None:
    before = endpoint.health()["jobs"]
    running = endpoint.run({"seconds": 600})
    platform.under_way(running.job_id)
    waiting = [endpoint.run({"answer": number}) for number in range(3)]
    health = endpoint.health()
    assert health["jobs"]["inQueue"] - before["inQueue"] == 3
    assert health["jobs"]["inProgress"] - before["inProgress"] == 1
    assert health["workers"] == {
        "idle": 0,
        "initializing": 0,
        "ready": 1,
        "running": 1,
        "throttled": 0,
        "unhealthy": 0,
    }
    assert endpoint.purge_queue() == {"removed": 3, "status": "completed"}
    assert {job.status() for job in waiting} == {"CANCELLED"}
    assert running.status() == "IN_PROGRESS"
    running.cancel()


def test_stream_yields_every_piece_in_order(streams: Emulator, client: Callable[..., Any]) -> None:
    job = client(streams).run({"count": 5})
    assert list(job.stream()) == [{"number": number} for number in range(5)]
    state = streams.status(job.job_id)
    assert set(state) == SUCCESS
    assert (state["status"], state["output"]) == ("COMPLETED", [])
    assert streams.get(f"stream/{job.job_id}") == {"status": "COMPLETED", "stream": []}


def test_stream_of_a_generator_that_fails_yields_what_it_gave(
    streams: Emulator, client: Callable[..., Any]
) -> None:
    job = client(streams).run({"count": 2, "raise": "no luck"})
    assert list(job.stream()) == [{"number": 0}, {"number": 1}]
    state = streams.status(job.job_id)
    assert set(state) == SUCCESS - {"output"} | {"error"}
    assert state["status"] == "FAILED"
    assert "no luck" in state["error"]


def test_a_wrong_key_is_told_by_the_client(platform: Emulator, client: Callable[..., Any]) -> None:
    with pytest.raises(RuntimeError) as caught:
        client(platform, "wrong").health()
    assert "401" in str(caught.value)


def test_an_unknown_job_is_an_http_error(platform: Emulator, endpoint: Any) -> None:
    job = endpoint.run({"answer": 1})
    job.job_id = "nothing"
    with pytest.raises(requests.HTTPError) as caught:
        job.status()
    assert caught.value.response.status_code == 404


# --- the client for asyncio -------------------------------------------------------------------------


def asynchronously(
    running: Emulator, key: str, scene: Callable[[Any], Coroutine[Any, Any, None]]
) -> None:
    async def main() -> None:
        async with ClientSession() as session:
            endpoint = runpod.AsyncioEndpoint("local", session, api_key=key)
            assert endpoint.endpoint_url == f"{running.base}/local/run"
            await scene(endpoint)

    asyncio.run(main())


def test_the_asyncio_client_runs_cancels_purges_and_asks_for_health(
    platform: Emulator, endpoint: Any
) -> None:
    async def scene(endpoint: Any) -> None:
        job = await endpoint.run({"answer": 6})
        assert await job.output(timeout=LONG) == {"answer": 6, "worker": "w0"}
        assert await job.status() == "COMPLETED"
        jobs = [await endpoint.run({"seconds": 600}) for _ in range(2)]
        while await jobs[0].status() != "IN_PROGRESS":
            await asyncio.sleep(0.05)
        assert (await endpoint.health())["jobs"]["inQueue"] == 1
        assert await endpoint.purge_queue() == {"removed": 1, "status": "completed"}
        assert await jobs[1].status() == "CANCELLED"
        assert await jobs[0].cancel() == {"id": jobs[0].job_id, "status": "CANCELLED"}
        job = await endpoint.run({"seconds": 600})
        with pytest.raises(TimeoutError):
            await job.output(timeout=1)
        await job.cancel()

    asynchronously(platform, KEY, scene)


def test_the_asyncio_client_streams(streams: Emulator, client: Callable[..., Any]) -> None:
    async def scene(endpoint: Any) -> None:
        job = await endpoint.run({"count": 3})
        assert [piece async for piece in job.stream()] == [{"number": n} for n in range(3)]

    client(streams)
    asynchronously(streams, "any", scene)


# --- retrying ---------------------------------------------------------------------------------------


def test_a_failed_job_runs_again_under_its_id(
    platform: Emulator, endpoint: Any, tmp_path: Path
) -> None:
    job_id = platform.run({"fail_once": str(tmp_path / "failed"), "answer": 7})
    assert platform.end(job_id)["status"] == "FAILED"
    assert platform.post(f"retry/{job_id}") == {"id": job_id, "status": "IN_QUEUE"}
    state = platform.end(job_id)
    assert (state["status"], state["output"]["answer"]) == ("COMPLETED", 7)
    assert "error" not in state
    assert endpoint.health()["jobs"]["retried"] == 1
    assert platform.ask("POST", f"retry/{job_id}").status_code == 400


# --- waiting ----------------------------------------------------------------------------------------


def test_run_sync_waits_on_when_the_platform_stops_waiting(endpoint: Any) -> None:
    post = endpoint.rp_client.post

    def brief(path: str, data: dict[str, Any], timeout: int = 10) -> Any:
        return post(f"{path}?wait=1000" if path.endswith("runsync") else path, data, timeout)

    endpoint.rp_client.post = brief
    assert endpoint.run_sync({"seconds": 1.5, "answer": 9}, timeout=LONG)["answer"] == 9


# --- webhooks ---------------------------------------------------------------------------------------


def test_a_webhook_gets_what_status_shows_and_is_tried_again(platform: Emulator) -> None:
    with hook(500) as (url, posts):
        job_id = platform.run({"answer": 10}, webhook=url)
        until(lambda: len(posts) == 2)
        assert posts == [("application/json", platform.status(job_id))] * 2
