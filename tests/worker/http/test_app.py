"""The worker's own HTTP server, for pictures: a real uvicorn on the loopback, the demo model behind it."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import openai
import pytest
import requests
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from handler import Worker
from live.wire import Closed
from lora.engine.engine import RestoreFailed
from tests.conftest import ROOT
from tests.test_handle import LONG, held_at_step
from tests.test_handler import FAST, pipeline_unchanged, pixels
from tests.waiting import PATIENCE, until
from tests.worker.http.serving import Thread, served
from worker.failures import failure
from worker.http.app import State
from worker.http.images import Images
from worker.stop import Stop

EVENTS = {"Accept": "text/event-stream"}


@pytest.fixture(scope="module")
def site(demo_worker: Worker) -> Iterator[Thread]:
    with served(Images(demo_worker), demo_worker.settings) as running:
        yield running


@pytest.fixture(scope="module")
def client(site: Thread) -> openai.OpenAI:
    return client_of(site)


def client_of(site: Thread, key: str = "any") -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{site.address}/v1", api_key=key, timeout=PATIENCE, max_retries=0
    )


def events(response: requests.Response) -> list[tuple[str, Any]]:
    """Names and values of a stream's events; comments are left out."""
    assert response.headers["content-type"].startswith("text/event-stream")
    found = []
    for block in response.text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines())
        if "event" in lines:
            found.append((lines["event"], json.loads(lines["data"])))
    return found


def error_of(response: requests.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code", "hint"}
    return dict(error)


@pytest.fixture
def held(demo_worker: Worker, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Every drawing waits at its first step until this is set."""
    release = threading.Event()
    held_at_step(demo_worker, 1, release, monkeypatch)
    yield release
    release.set()


@pytest.fixture
def background() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


# --- /generate -----------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_answer_is_the_handlers_own(site: Thread, demo_worker: Worker, wrapped: bool) -> None:
    given = {**FAST, "loras": ["demo-stripes"]}
    right = demo_worker({"id": "x", "input": given})
    response = site.post("/generate", {"input": given} if wrapped else given)
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    answer = response.json()
    assert answer["images"] == right["images"]
    assert answer.keys() == right.keys()
    assert answer["loras"] == right["loras"]


def test_an_action_is_answered(site: Thread) -> None:
    assert site.post("/generate", {"action": "presets.list"}).json()["presets"] == {}


def test_progress_and_previews_come_as_events_before_the_answer(
    site: Thread, demo_worker: Worker
) -> None:
    given = {**FAST, "num_inference_steps": 4, "preview": True}
    (*updates, (last, answer)) = events(site.post("/generate", given, headers=EVENTS))
    assert last == "answer"
    assert answer["images"] == demo_worker({"id": "x", "input": given})["images"]
    assert {name for name, _ in updates} == {"progress"}
    phases = [(update["phase"], update["fraction"]) for _, update in updates]
    assert phases[-1] == ("generating", 1.0)
    assert [fraction for _, fraction in phases] == sorted(fraction for _, fraction in phases)
    assert updates[0][1]["preview"].startswith("data:image/webp;base64,")


@pytest.mark.parametrize("headers", [{}, EVENTS])
def test_bad_input_is_400_with_every_fault(
    site: Thread, demo_worker: Worker, headers: dict[str, str]
) -> None:
    given = {"prompt": 7, "num_images": 99, "loras": [{"path": 5}], "wat": 1}
    told = demo_worker({"id": "x", "input": given})["error"]
    error = error_of(site.post("/generate", given, headers=headers), 400)
    assert error["type"] == "invalid_request_error"
    assert f"{error['code']}: {error['message']}" == told
    assert "4 faults" in told
    assert error["hint"] and told.endswith(error["hint"])


@pytest.mark.parametrize(
    ("given", "status", "code"),
    [
        ({**FAST, "loras": ["nowhere.safetensors"]}, 404, "LORA_NOT_FOUND"),
        ({**FAST, "loras": ["ftp://host/x"]}, 400, "LORA_SOURCE_INVALID"),
        ({"input": FAST, "webhook": "https://host/x", "id": "1"}, 400, "INVALID_INPUT"),
        ({"input": 5}, 400, "INVALID_INPUT"),
        ({"action": "no.such"}, 400, "INVALID_INPUT"),
        ([FAST], 400, "INVALID_INPUT"),
    ],
)
def test_an_error_has_the_status_of_its_code(
    site: Thread, given: Any, status: int, code: str
) -> None:
    assert error_of(site.post("/generate", given), status)["code"] == code


def test_words_of_any_script_are_in_an_error_as_they_are(site: Thread) -> None:
    error = error_of(site.post("/generate", {**FAST, "Schnée 猫": 1, "\ud800": 1}), 400)
    assert "Schnée 猫 is not a field" in error["message"] and error["hint"]
    assert "\ufffd is not a field" in error["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[" * 100_000, b"\xff\xfe"])
def test_a_body_that_is_no_json_is_400(site: Thread, body: bytes) -> None:
    response = requests.post(f"{site.address}/generate", data=body, timeout=PATIENCE)
    assert error_of(response, 400)["message"].startswith("the body is no JSON")


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit_is_413(demo_worker: Worker, chunked: bool) -> None:
    body = json.dumps({**FAST, "negative_prompt": "x" * 50_000}).encode()
    pieces = (body[at : at + 1000] for at in range(0, len(body), 1000))
    with served(Images(demo_worker), demo_worker.settings, max_body_mb=0.04) as site:
        response = requests.post(
            f"{site.address}/generate", data=pieces if chunked else body, timeout=PATIENCE
        )
        assert error_of(response, 413)["code"] == "BODY_TOO_LARGE"
        assert site.post("/generate", {"action": "health"}).status_code == 200


def test_other_routes_and_methods_have_the_same_form(site: Thread) -> None:
    assert error_of(site.get("/no/such"), 404)["code"] == "NO_SUCH_ROUTE"
    response = site.get("/generate")
    assert error_of(response, 405)["code"] == "NO_SUCH_ROUTE"
    assert response.headers["allow"] == "POST"


# --- who may ask, when, and how many ------------------------------------------------------------------


def _authorization(value: str) -> dict[str, str]:
    return {"Authorization": value}


def test_the_key_opens_all_and_ping_needs_none(demo_worker: Worker) -> None:
    with served(Images(demo_worker), demo_worker.settings, api_key="sesame") as site:
        paths = [("GET", path) for path in ("/health", "/metrics", "/v1/models")]
        paths += [("POST", path) for path in ("/generate", "/v1/images/generations")]
        for headers in (
            {},
            *map(_authorization, ("Bearer sesam", "sesame", "Basic sesame", "Bearer")),
        ):
            for method, path in paths:
                response = requests.request(
                    method, site.address + path, headers=headers, json={}, timeout=PATIENCE
                )
                assert error_of(response, 401)["code"] == "UNAUTHORIZED"
                assert response.headers["www-authenticate"] == "Bearer"
            assert requests.get(f"{site.address}/ping", timeout=PATIENCE).status_code == 200
        assert site.get("/health").json()["status"] == "ready"
        assert site.get("/health", headers={"Authorization": "bearer  sesame"}).status_code == 200
        assert client_of(site, "sesame").models.list().data[0].id == "demo"
        with pytest.raises(openai.AuthenticationError):
            client_of(site, "other").models.list()


def test_a_strange_web_page_may_not_ask_a_server_without_a_key(demo_worker: Worker) -> None:
    strange = {"Origin": "https://evil.example"}
    with served(Images(demo_worker), demo_worker.settings) as site:
        response = site.post("/generate", {"action": "health"}, headers=strange)
        assert error_of(response, 401)["code"] == "UNAUTHORIZED"
        own = {"Origin": site.address}
        assert site.post("/generate", {"action": "health"}, headers=own).status_code == 200
    with served(Images(demo_worker), demo_worker.settings, api_key="k") as site:
        assert site.post("/generate", {"action": "health"}, headers=strange).status_code == 200


def test_while_the_models_load_only_ping_and_health_answer(demo_worker: Worker) -> None:
    with served(Images(demo_worker), demo_worker.settings) as site:
        site.serving.state = State.LOADING
        ping = site.get("/ping")
        assert (ping.status_code, ping.content) == (204, b"")
        response = site.post("/generate", FAST)
        assert error_of(response, 503)["code"] == "NOT_READY"
        assert int(response.headers["retry-after"]) >= 1
        health = site.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "loading")
        assert site.get("/metrics").status_code == 200
        site.serving.state = State.READY
        assert (site.get("/ping").status_code, site.get("/ping").json()) == (
            200,
            {"status": "ready"},
        )
        assert site.get("/health").json()["version"]


def test_who_does_not_fit_into_the_line_is_told_when_to_come_again(
    demo_worker: Worker, held: threading.Event, background: ThreadPoolExecutor
) -> None:
    with served(Images(demo_worker), demo_worker.settings, concurrency=1, waiting=1) as site:
        first = background.submit(site.post, "/generate", FAST)
        until(lambda: site.serving.jobs.working == 1)
        second = background.submit(site.post, "/generate", {**FAST, "seed": 8})
        until(lambda: site.serving.jobs.waiting == 1)
        third = site.post("/generate", FAST)
        assert error_of(third, 429)["code"] == "BUSY"
        assert int(third.headers["retry-after"]) >= 1
        with pytest.raises(openai.RateLimitError):
            client_of(site).images.generate(prompt="x")
        health = site.get("/health").json()
        assert (health["running"], health["waiting"]) == (1, 1)
        held.set()
        assert first.result(PATIENCE).status_code == second.result(PATIENCE).status_code == 200
        assert site.post("/generate", FAST).status_code == 200


def test_an_action_waits_for_no_drawing(
    demo_worker: Worker, held: threading.Event, background: ThreadPoolExecutor
) -> None:
    with served(Images(demo_worker), demo_worker.settings, concurrency=1) as site:
        first = background.submit(site.post, "/generate", FAST)
        until(lambda: site.serving.jobs.working == 1)
        assert site.post("/generate", {"action": "presets.list"}).status_code == 200
        assert not first.done()
        held.set()
        assert first.result(PATIENCE).status_code == 200


def test_who_waits_when_the_server_ends_is_sent_away_and_who_is_drawn_is_answered(
    demo_worker: Worker, held: threading.Event, background: ThreadPoolExecutor
) -> None:
    with served(Images(demo_worker), demo_worker.settings, concurrency=1) as site:
        first = background.submit(site.post, "/generate", FAST)
        until(lambda: site.serving.jobs.working == 1)
        second = background.submit(site.post, "/generate", FAST)
        until(lambda: site.serving.jobs.waiting == 1)
        site.server.servers[0].get_loop().call_soon_threadsafe(site.serving.end)
        response = second.result(PATIENCE)
        assert error_of(response, 503)["code"] == "NOT_READY"
        assert "retry-after" in response.headers
        assert site.get("/ping").status_code == 503
        held.set()
        assert first.result(PATIENCE).status_code == 200


# --- clients that hang up -------------------------------------------------------------------------


@pytest.mark.parametrize("headers", [{}, EVENTS])
def test_a_client_that_hangs_up_ends_its_job_and_leaves_no_trace(
    site: Thread,
    demo_worker: Worker,
    monkeypatch: pytest.MonkeyPatch,
    background: ThreadPoolExecutor,
    headers: dict[str, str],
) -> None:
    plain = pixels(site.post("/generate", FAST).json())
    stopped, cancel = threading.Event(), Stop.cancel
    monkeypatch.setattr(Stop, "cancel", lambda stop: (cancel(stop), stopped.set()))
    with pipeline_unchanged(demo_worker):
        with monkeypatch.context() as patch:
            steps = held_at_step(demo_worker, 3, stopped, patch)
            given = {**FAST, "num_inference_steps": LONG, "loras": ["demo-stripes"]}
            with connection(site, given, headers):
                until(lambda: 3 in steps)
            until(lambda: site.serving.jobs.working == 0)
        assert steps == [1, 2, 3]
    assert (pixels(site.post("/generate", FAST).json()) == plain).all()


def test_a_client_that_hangs_up_leaves_the_line(
    demo_worker: Worker, held: threading.Event, background: ThreadPoolExecutor
) -> None:
    with served(Images(demo_worker), demo_worker.settings, concurrency=1, waiting=1) as site:
        first = background.submit(site.post, "/generate", FAST)
        until(lambda: site.serving.jobs.working == 1)
        with connection(site, FAST):
            until(lambda: site.serving.jobs.waiting == 1)
        until(lambda: site.serving.jobs.waiting == 0)
        second = background.submit(site.post, "/generate", FAST)
        until(lambda: site.serving.jobs.waiting == 1)
        held.set()
        assert first.result(PATIENCE).status_code == second.result(PATIENCE).status_code == 200
        until(lambda: (site.serving.jobs.working, site.serving.jobs.waiting) == (0, 0))


def connection(site: Thread, given: Any, headers: dict[str, str] | None = None) -> Any:
    """A socket that has asked for this, and closes with the block."""
    import socket

    body, (host, port) = json.dumps(given).encode(), site.address.removeprefix("http://").split(":")
    head = {"Host": host, "Content-Length": str(len(body)), **(headers or {})}
    lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
    one = socket.create_connection((host, int(port)))
    one.sendall(f"POST /generate HTTP/1.1\r\n{lines}\r\n".encode() + body)
    return one


# --- what goes wrong inside ------------------------------------------------------------------------


def test_a_process_that_must_not_go_on_ends_the_server(
    site: Thread, demo_worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(job: Any, post: Any) -> Any:
        return failure(RestoreFailed("a weight could not be put back"), refresh=True)

    monkeypatch.setattr(demo_worker, "handle", broken)
    error = error_of(site.post("/generate", FAST), 500)
    assert error["message"].startswith("a weight could not be put back")
    assert site.given_up == [True]


def test_a_fault_of_the_server_is_told_without_its_text(
    site: Thread, demo_worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(job: Any, post: Any) -> Any:
        raise RuntimeError("canary")

    monkeypatch.setattr(demo_worker, "handle", broken)
    error = error_of(site.post("/generate", FAST), 500)
    assert error["code"] == "INTERNAL" and "canary" not in json.dumps(error)


def test_an_error_after_the_first_event_is_an_event(
    site: Thread, demo_worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(job: Any, post: Any) -> Any:
        await post({"phase": "generating"})
        return failure(RestoreFailed("a weight could not be put back"))

    monkeypatch.setattr(demo_worker, "handle", broken)
    (first, (name, value)) = events(site.post("/generate", FAST, headers=EVENTS))
    assert first == ("progress", {"phase": "generating"})
    assert (name, value["error"]["code"]) == ("error", RestoreFailed.code)


def test_a_stream_that_says_nothing_for_long_has_comments(
    site: Thread, monkeypatch: pytest.MonkeyPatch, held: threading.Event
) -> None:
    monkeypatch.setattr("worker.http.exchange.BEAT", 0.05)
    with requests.post(
        f"{site.address}/generate", json=FAST, headers=EVENTS, stream=True, timeout=PATIENCE
    ) as response:
        lines = response.iter_lines()
        assert next(lines) == b": waiting"
        held.set()
        assert b"event: answer" in list(lines)


# --- OpenAI's pictures -----------------------------------------------------------------------------


def drawn(data: str | None) -> np.ndarray[Any, Any]:
    assert data
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_openais_client_gets_the_handlers_pictures(
    client: openai.OpenAI, demo_worker: Worker
) -> None:
    more = {"seed": 7, "num_inference_steps": 2, "loras": ["demo-stripes"], "seed_mode": "each"}
    given = {"prompt": FAST["prompt"], "width": 72, "height": 64, "num_images": 2, **more}
    right = demo_worker({"id": "x", "input": given})
    answer = client.images.generate(
        prompt=FAST["prompt"], size="72x64", n=2, model="demo", quality="high", extra_body=more
    )
    assert answer.created > 1_700_000_000
    assert answer.data and len(answer.data) == 2
    for index, image in enumerate(answer.data):
        assert image.url is None
        assert (drawn(image.b64_json) == pixels(right, index)).all()
    assert answer.seeds == [7, 8]  # type: ignore[attr-defined]
    assert answer.loras[0]["status"] == "applied"  # type: ignore[attr-defined]
    assert answer.warnings == ["quality has no effect here"]  # type: ignore[attr-defined]


def test_openais_words_for_the_file_are_understood(client: openai.OpenAI) -> None:
    answer = client.images.generate(
        prompt="x",
        response_format="url",
        output_format="jpeg",
        output_compression=60,
        background="auto",
        size="auto",
        extra_body={"num_inference_steps": 1},
    )
    assert answer.data and answer.data[0].url
    assert answer.data[0].url.startswith("data:image/jpeg;base64,")


def test_a_preset_can_be_named_as_the_model(site: Thread, client: openai.OpenAI) -> None:
    preset = {"loras": ["demo-stripes"], "prompt_prefix": "striped"}
    assert site.post("/generate", {"action": "presets.set", "name": "stripes", **preset}).ok
    try:
        assert [model.id for model in client.models.list()] == ["demo", "stripes"]
        more = {"num_inference_steps": 1, "seed": 3}
        answer = client.images.generate(prompt="a circle", model="stripes", extra_body=more)
        assert answer.data and answer.data[0].revised_prompt == "striped a circle"
        plain = client.images.generate(prompt="a circle", extra_body=more)
        assert plain.data and plain.data[0].revised_prompt is None
        assert answer.data[0].b64_json != plain.data[0].b64_json
        with pytest.raises(openai.BadRequestError):
            client.images.generate(
                prompt="x", model="stripes", extra_body={"lora_selection": "stripes"}
            )
        with pytest.raises(openai.NotFoundError) as raised:
            client.images.generate(prompt="x", model="stripe")
        assert raised.value.code == "MODEL_NOT_FOUND" and "stripes" in str(raised.value)
    finally:
        assert site.post("/generate", {"action": "presets.delete", "name": "stripes"}).ok


@pytest.mark.parametrize(
    ("given", "faults"),
    [
        ({"n": 9, "size": "big", "wat": 1}, ["n: 9", "size: ", "wat is not"]),
        ({"n": 2, "num_images": 3}, ["num_images is given twice"]),
        ({"size": "64x64", "width": 64}, ["width is given twice"]),
        ({"stream": True}, ["stream: "]),
        ({"background": "transparent"}, ["background: "]),
        ({"response_format": "jpeg"}, ["response_format: "]),
        ({"size": "65x64"}, ["width: 65 is not a multiple of 8"]),
        ({"output_format": "svg"}, ["output_format: "]),
        ({"action": "loras.delete", "name": "x"}, ["action is not a field"]),
        ({"model": 5, "prompt": None}, ["model: 5", "prompt is required"]),
    ],
)
def test_faults_of_openais_fields_and_of_ours_are_told_at_once(
    site: Thread, given: dict[str, Any], faults: list[str]
) -> None:
    error = error_of(site.post("/v1/images/generations", {"prompt": "x", **given}), 400)
    assert [fault for fault in faults if fault not in error["message"]] == []


def test_a_worker_with_a_bucket_answers_urls_and_says_that_it_cannot_else(
    site: Thread, demo_worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(demo_worker.parts.__dict__, "bucket", object())
    given = {"prompt": "x", "response_format": "b64_json"}
    assert (
        "only url is answered"
        in error_of(site.post("/v1/images/generations", given), 400)["message"]
    )


# --- figures ----------------------------------------------------------------------------------------


def test_metrics_are_as_prometheus_reads_them(site: Thread) -> None:
    assert site.post("/generate", FAST).ok
    assert site.post("/generate", {"wat": 1}).status_code == 400
    response = site.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }
    assert samples["worker_http_requests_total", "/generate", "200"] >= 1
    assert samples["worker_http_requests_total", "/generate", "400"] >= 1
    assert samples["worker_phase_seconds_total", "denoise"] > 0
    assert samples["worker_jobs_running",] == samples["worker_jobs_waiting",] == 0
    counted = samples["worker_http_request_seconds_count", "/generate"]
    assert counted == sum(
        value
        for key, value in samples.items()
        if key[:2] == ("worker_http_requests_total", "/generate")
    )


# --- live frames -----------------------------------------------------------------------------------


def test_a_socket_is_a_session_of_live(site: Thread, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    async def run(receive: Any, send: Any, worker: object) -> None:
        seen.append(worker)
        try:
            while (message := await receive()) != "end":
                await send(message if isinstance(message, bytes) else message.encode())
        except Closed:
            seen.append("closed")

    monkeypatch.setattr("worker.http.live.run", run)
    url = site.address.replace("http", "ws") + "/live"
    with connect(url) as socket:
        socket.send("text")
        assert socket.recv() == b"text"
        socket.send(b"\x00\x02{}")
        assert socket.recv() == b"\x00\x02{}"
        socket.send("end")
        with pytest.raises(Exception, match="1000"):
            socket.recv()
    assert isinstance(seen.pop(), Worker) and not seen
    with connect(url) as socket:
        socket.send("x")
        assert socket.recv() == b"x"
    until(lambda: "closed" in seen)


def test_a_socket_needs_the_key_and_a_server_that_is_ready(demo_worker: Worker) -> None:
    with served(Images(demo_worker), demo_worker.settings, api_key="k") as site:
        url = site.address.replace("http", "ws") + "/live"
        with pytest.raises(InvalidStatus) as refused:
            connect(url)
        assert refused.value.response.status_code == 401
        site.serving.state = State.LOADING
        with pytest.raises(InvalidStatus) as refused:
            connect(url, additional_headers=site.headers)
        assert refused.value.response.status_code == 503
        assert json.loads(refused.value.response.body)["error"]["code"] == "NOT_READY"


# --- imports ---------------------------------------------------------------------------------------


def test_a_worker_of_the_queue_imports_no_server() -> None:
    code = (
        "import sys, handler, worker.text.serve\n"
        "assert not {'starlette', 'uvicorn', 'fastapi'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ, check=True)
