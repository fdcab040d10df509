"""Load balancing: requests go to healthy workers, stay with the one they name, and are cut off in time."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from emulator.balancer import Balancer, Rules
from emulator.jobs import JobQueue
from emulator.workers import Scale, WorkerPool
from tests.emulator.running import Emulator, emulator
from tests.waiting import PATIENCE, until

pytestmark = pytest.mark.slow

KEY = "k"
AFFINITY = "X-Runpod-Worker-Id"


class Endpoint:
    """An endpoint with two workers, whose health and patience are in the folder's hand."""

    early: requests.Response
    """What was asked for before a worker was healthy."""

    def __init__(self, running: Emulator, folder: Path) -> None:
        self.running, self.folder = running, folder

    def ask(self, method: str, path: str, **options: Any) -> requests.Response:
        return self.running.ask(method, path, **options)

    def is_now(self, **statuses: int) -> None:
        """Sets what /ping of these workers answers."""
        for name, status in statuses.items():
            (self.folder / f"{name}.new").write_text(str(status))
            (self.folder / f"{name}.new").rename(self.folder / f"{name}.ping")

    def serves(self, name: str) -> bool:
        headers = {**self.running.headers, AFFINITY: name}
        return bool(self.ask("GET", "/echo", headers=headers).json()["worker"] == name)


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    folder = tmp_path_factory.mktemp("balanced")
    options = ("--load-balancing", "--workers", "2", "--api-key", KEY)
    program = ("tests/emulator/pong.py",)
    with emulator(folder, *options, program=program, key=KEY, PONG=str(folder)) as running:
        found = Endpoint(running, folder)
        with ThreadPoolExecutor(1) as pool:
            early = pool.submit(found.ask, "GET", "/echo")
            until(lambda: "w1 started" in running.log())
            found.is_now(w0=200, w1=200)
            found.early = early.result(PATIENCE)
        until(lambda: found.serves("w0") and found.serves("w1"), running.log)
        yield found


@pytest.fixture
def background() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def test_a_request_waits_for_a_worker_that_still_loads(endpoint: Endpoint) -> None:
    assert endpoint.early.json()["worker"] in ("w0", "w1")


def test_a_request_passes_with_all_that_it_has(endpoint: Endpoint) -> None:
    answer = endpoint.ask("POST", "/echo?a=1&b=%20", data=b"x" * 1000)
    about = answer.json()
    assert (about["size"], about["query"], about["method"]) == (1000, "a=1&b=%20", "POST")
    assert answer.headers["X-Own"] == "yes"
    assert answer.headers[AFFINITY] == about["worker"]
    assert endpoint.ask("GET", "/no/such").status_code == 404


def test_the_key_is_asked_for_on_every_path(endpoint: Endpoint) -> None:
    for headers in ({}, {"Authorization": "Bearer other"}):
        assert endpoint.ask("GET", "/ping", headers=headers).status_code == 401
        with pytest.raises(InvalidStatus) as refused:
            connect(url(endpoint, "/socket"), additional_headers=headers)
        assert refused.value.response.status_code == 401


def test_a_request_stays_with_the_worker_that_it_names(endpoint: Endpoint) -> None:
    for name in ("w0", "w1", "w0", "w0", "w1"):
        assert endpoint.serves(name)


def test_another_takes_what_names_a_worker_that_is_not_healthy(endpoint: Endpoint) -> None:
    endpoint.is_now(w1=500)
    until(lambda: not endpoint.serves("w1"))
    assert {endpoint.ask("GET", "/echo").json()["worker"] for _ in range(4)} == {"w0"}
    endpoint.is_now(w1=200)
    until(lambda: endpoint.serves("w1"))


def test_the_worker_with_fewer_requests_gets_the_next(
    endpoint: Endpoint, background: ThreadPoolExecutor
) -> None:
    first = background.submit(endpoint.ask, "POST", "/wait")
    until(lambda: list(endpoint.folder.glob("*.waits")))
    (busy,) = (path.stem for path in endpoint.folder.glob("*.waits"))
    assert {endpoint.ask("GET", "/echo").json()["worker"] for _ in range(4)} == {"w0", "w1"} - {
        busy
    }
    (endpoint.folder / "go").touch()
    assert first.result(PATIENCE).json()["worker"] == busy
    (endpoint.folder / "go").unlink()
    (endpoint.folder / f"{busy}.waits").unlink()


def test_who_hangs_up_hangs_up_at_the_worker(endpoint: Endpoint) -> None:
    host, port = endpoint.running.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as one:
        head = f"Host: {host}\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 0"
        one.sendall(f"POST /wait HTTP/1.1\r\n{head}\r\n\r\n".encode())
        until(lambda: list(endpoint.folder.glob("*.waits")))
        assert not list(endpoint.folder.glob("*.gone"))
    until(lambda: list(endpoint.folder.glob("*.gone")))
    (endpoint.folder / "go").touch()


def test_an_answer_streams(endpoint: Endpoint) -> None:
    (endpoint.folder / "go").unlink(missing_ok=True)
    with endpoint.ask("GET", "/stream", stream=True) as answer:
        lines = answer.iter_lines()
        assert next(lines) == b"first"
        (endpoint.folder / "go").touch()
        assert next(lines) == b"second"


def test_payloads_over_30_mb_do_not_pass(endpoint: Endpoint) -> None:
    assert endpoint.ask("POST", "/echo", data=b"x" * (30 << 20)).json()["size"] == 30 << 20
    assert endpoint.ask("POST", "/echo", data=b"x" * (30 << 20) + b"x").status_code == 413
    assert endpoint.ask("GET", "/large").status_code == 502


def url(endpoint: Endpoint, path: str) -> str:
    return endpoint.running.address.replace("http", "ws") + path


def test_a_socket_passes_both_ways_and_closes_with_the_workers_code(endpoint: Endpoint) -> None:
    headers = {**endpoint.running.headers, AFFINITY: "w1"}
    with connect(url(endpoint, "/socket"), additional_headers=headers) as one:
        assert one.response and one.response.headers[AFFINITY] == "w1"
        one.send("text")
        assert one.recv() == "w1 text"
        one.send(b"\x00\xff")
        assert one.recv() == b"\xff\x00"
        one.send("end")
        with pytest.raises(ConnectionClosed) as closed:
            one.recv()
        assert closed.value.rcvd and closed.value.rcvd.code == 4001
    with pytest.raises(InvalidStatus) as refused:
        connect(url(endpoint, "/refused"), additional_headers=headers)
    assert refused.value.response.status_code == 503


def test_a_worker_that_dies_is_replaced_and_gets_requests_again(endpoint: Endpoint) -> None:
    os.kill(endpoint.running.pids()["w1"], signal.SIGKILL)
    endpoint.is_now(w2=200)
    until(lambda: endpoint.serves("w2"), endpoint.running.log)
    assert endpoint.serves("w0")


def test_a_request_is_cut_off_in_time(tmp_path: Path) -> None:
    options = ("--load-balancing", "--request-limit", "1")
    program = ("tests/emulator/pong.py",)
    with emulator(tmp_path, *options, program=program, PONG=str(tmp_path)) as running:
        endpoint = Endpoint(running, tmp_path)
        endpoint.is_now(w0=200)
        cut = endpoint.ask("POST", "/wait")
        assert cut.status_code == 524
        assert cut.json()["error"] == "the request was cut off after 1 s"

        def cut_in_its_midst() -> bool:
            try:
                _ = endpoint.ask("GET", "/stream").content
            except requests.exceptions.ChunkedEncodingError:
                return True
            return False

        until(cut_in_its_midst)
        until(lambda: endpoint.ask("GET", "/echo").status_code == 200)


def test_without_a_healthy_worker_a_request_is_400(tmp_path: Path) -> None:
    pool = WorkerPool(["false"], {}, JobQueue(), Scale(), tmp_path, serving=True)
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    scope = {"type": "http", "method": "GET", "path": "/x", "query_string": b"", "headers": []}
    asyncio.run(Balancer(pool, Rules(no_worker=0.1))(scope, receive, send))
    assert sent[0]["status"] == 400 and b"no workers available" in sent[1]["body"]


def test_the_real_worker_serves_behind_it(tmp_path: Path) -> None:
    environment = {"WORKER_SERVE": "http", "WORKER_MODEL": "demo", "WORKER_DEVICE": "cpu"}
    options = ("--load-balancing", "--api-key", KEY, "--volume", str(tmp_path / "volume"))
    with emulator(
        tmp_path, *options, program=("handler.py",), key=KEY, HF_HUB_OFFLINE="1", **environment
    ) as running:
        base = f"{running.address}/v1"
        client = openai.OpenAI(base_url=base, api_key=KEY, timeout=PATIENCE, max_retries=0)
        more = {"seed": 7, "num_inference_steps": 2}
        raw = client.images.with_raw_response.generate(
            prompt="a red circle", extra_body=more, extra_headers={AFFINITY: "w0"}
        )
        assert raw.headers[AFFINITY] == "w0"
        data = raw.parse().data
        assert data and data[0].b64_json
        given = {"prompt": "a red circle", **more}
        answer = running.ask("POST", "/generate", json=given).json()
        assert answer["images"][0].endswith(data[0].b64_json)
