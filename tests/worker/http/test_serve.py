"""The program with WORKER_SERVE=http: its start, its ports, and its end."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import requests
from starlette.routing import BaseRoute

from handler import Worker
from lora.errors import SourceInvalid
from settings import SettingsError
from tests.waiting import PATIENCE, until
from tests.worker.http.serving import program, start
from worker.http.app import Serving
from worker.http.images import Images
from worker.http.serve import serve

pytestmark = pytest.mark.slow

HELD = """
import time
from pathlib import Path
import handler

gate, step = Path({gate!r}), handler.Turn.step

def held(turn, done, total):
    Path({gate!r} + ".step").write_text(str(done))
    while not gate.exists() and not {check}:
        time.sleep(0.02)
    step(turn, done, total)

handler.Turn.step = held
setup = handler.Worker.setup

def slow(worker):
    while {loads_late} and not gate.exists():
        time.sleep(0.02)
    return setup(worker)

handler.Worker.setup = slow
handler.main()
"""


def holding(gate: Path, *, loads_late: bool = False, check: str = "False") -> str:
    """The program, in which each step, or the loading of the models, waits for a file."""
    return HELD.format(gate=str(gate), loads_late=loads_late, check=check)


JOB = {"prompt": "a red circle", "num_inference_steps": 2, "seed": 1}


@pytest.fixture
def background() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def test_ping_answers_before_the_models_are_there_and_on_its_own_port(tmp_path: Path) -> None:
    gate, health_port = tmp_path / "gate", free_port()
    code = holding(gate, loads_late=True)
    with program(tmp_path, code=code, PORT_HEALTH=str(health_port)) as site:
        health = f"http://127.0.0.1:{health_port}"
        for address in (site.address, health):
            response = requests.get(f"{address}/ping", timeout=PATIENCE)
            assert (response.status_code, response.content) == (204, b"")
        assert site.post("/generate", JOB).status_code == 503
        assert requests.get(f"{health}/health", timeout=PATIENCE).status_code == 404
        gate.touch()
        site.ready()
        assert requests.get(f"{health}/ping", timeout=PATIENCE).status_code == 200
        assert len(site.post("/generate", JOB).json()["images"]) == 1
        site.signal()
        assert site.ended() == 0
        assert "Traceback" not in site.log()


def test_sigterm_finishes_the_drawing_and_sends_away_who_waits(
    tmp_path: Path, background: ThreadPoolExecutor
) -> None:
    gate = tmp_path / "gate"
    with program(tmp_path, code=holding(gate), WORKER_CONCURRENCY="1") as site:
        site.ready()
        first = background.submit(site.post, "/generate", JOB)
        until(Path(f"{gate}.step").exists)
        second = background.submit(site.post, "/generate", JOB)
        until(lambda: site.get("/health").json()["waiting"] == 1)
        site.signal()
        waited = second.result(PATIENCE)
        assert waited.status_code == 503 and waited.json()["error"]["code"] == "NOT_READY"
        assert site.process.poll() is None
        until(lambda: refuses(site.address))
        gate.touch()
        assert len(first.result(PATIENCE).json()["images"]) == 1
        assert site.ended() == 0


def test_a_second_sigterm_cancels_the_drawing(
    tmp_path: Path, background: ThreadPoolExecutor
) -> None:
    gate = tmp_path / "gate"
    code = holding(
        gate, check="any('once more' in line for line in open({!r}))".format(str(tmp_path / "log"))
    )
    with program(tmp_path, code=code) as site:
        site.ready()
        first = background.submit(site.post, "/generate", {**JOB, "num_inference_steps": 900})
        until(Path(f"{gate}.step").exists)
        site.signal()
        until(lambda: "what is worked on is finished" in site.log())
        site.signal(signal.SIGINT)
        answer = first.result(PATIENCE)
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "CANCELLED"
        assert site.ended() == 0


def test_sigterm_while_the_models_load_ends_at_once(tmp_path: Path) -> None:
    with program(tmp_path, code=holding(tmp_path / "gate", loads_late=True)) as site:
        assert site.get("/ping").status_code == 204
        site.signal()
        assert site.ended() == 0


def test_a_worker_that_cannot_start_says_why(tmp_path: Path) -> None:
    process = start(tmp_path, WORKER_MODEL="no/such-model")
    assert process.wait(PATIENCE) == 1
    log = (tmp_path / "log").read_text()
    assert "the worker cannot start: no/such-model" in log and "Traceback" not in log


def test_whatever_keeps_the_models_from_loading_ends_the_server(demo_worker: Worker) -> None:
    def load() -> None:
        raise SourceInvalid("ftp://x is no source")

    settings = replace(demo_worker.settings, host="127.0.0.1", port=0)
    with pytest.raises(SourceInvalid):
        serve(settings, Images(demo_worker), load)


@pytest.mark.parametrize(
    ("host", "port"), [("127.0.0.1", 99999), ("no.such.host.invalid", 0), ("192.0.2.1", 0)]
)
def test_an_address_that_cannot_be_used_is_told(demo_worker: Worker, host: str, port: int) -> None:
    settings = replace(demo_worker.settings, host=host, port=port)
    with pytest.raises(SettingsError, match=f"^PORT: {host} port {port} cannot be used: "):
        serve(settings, Images(demo_worker), lambda: None)


@pytest.mark.parametrize("name", ["port", "port_health"])
def test_a_port_that_is_taken_is_told(demo_worker: Worker, name: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ports = {"port": 0, name: port}
        settings = replace(demo_worker.settings, host="127.0.0.1", **ports)
        with pytest.raises(SettingsError, match=f"^{name.upper()}: 127.0.0.1 port {port} cannot"):
            serve(settings, Images(demo_worker), lambda: None)


def test_a_process_that_must_not_go_on_ends_with_a_fault(demo_worker: Worker) -> None:
    settings = replace(demo_worker.settings, host="127.0.0.1", port=0)

    class Broken(Images):
        def routes(self, serving: Serving) -> list[BaseRoute]:
            self.serving = serving
            return super().routes(serving)

    kind = Broken(demo_worker)
    with pytest.raises(SystemExit, match="to be started anew"):
        serve(settings, kind, lambda: [kind.serving.give_up()])


def test_the_worker_for_text_serves_as_well(tmp_path: Path) -> None:
    with program(tmp_path, WORKER_KIND="text") as site:
        site.ready()
        body = {
            "messages": [{"role": "user", "content": "What colour is a fox?"}],
            "temperature": 0,
        }
        answer = site.post("/v1/chat/completions", body).json()
        assert answer["choices"][0]["message"]["content"] == "A fox is orange."
        site.signal()
        assert site.ended() == 0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def refuses(address: str) -> bool:
    """Whether the server takes no connection any more."""
    try:
        requests.get(f"{address}/ping", timeout=PATIENCE)
    except requests.ConnectionError:
        return True
    return False
