"""The page over a worker that has a server of its own: jobs and streams."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from page.__main__ import backend_of
from page.backend import Endpoint
from page.own_server import OwnServer
from tests.page.own_worker import OwnWorker, own_worker
from tests.page.serving import Served, served
from tests.waiting import until

KEY = "the-key-of-a-worker"


@pytest.fixture
def worker() -> Iterator[OwnWorker]:
    with own_worker(KEY) as running:
        yield running


@pytest.fixture
def page(worker: OwnWorker) -> Iterator[Served]:
    with served(lambda: OwnServer(worker.url, KEY)) as running:
        yield running


def begin(page: Served, **given: Any) -> str:
    return str(page.post("/api/run", {"input": given}).json()["id"])


def end(page: Served, job: str) -> dict[str, Any]:
    def look() -> dict[str, Any] | None:
        state: dict[str, Any] = page.get(f"/api/status/{job}").json()
        return None if state["status"].startswith("IN_") else state

    found = until(look)
    assert found
    return found


def test_an_answer_comes_without_the_key(page: Served, worker: OwnWorker) -> None:
    done = end(page, begin(page, prompt="x"))
    assert (done["status"], done["output"]["said"]) == ("COMPLETED", "[key]")
    assert worker.jobs == [{"input": {"prompt": "x"}}]


def test_progress_is_seen_and_cancelling_hangs_up(page: Served, worker: OwnWorker) -> None:
    job = begin(page, prompt="wait")
    update = until(lambda: page.get(f"/api/status/{job}").json().get("output"))
    assert update["text"] == "step 1/2"
    page.post(f"/api/cancel/{job}", {})
    assert end(page, job)["status"] == "CANCELLED"
    assert until(lambda: worker.hung_up) == 1


@pytest.mark.parametrize(
    ("prompt", "said"), [("fail", "LORA_NOT_FOUND"), ("hang up", "ENDPOINT_UNREACHABLE")]
)
def test_a_job_that_fails_is_told(page: Served, prompt: str, said: str) -> None:
    failed = end(page, begin(page, prompt=prompt))
    assert failed["status"] == "FAILED"
    assert said in failed["error"]


def test_a_stream_comes_in_whole_events(page: Served) -> None:
    job = begin(page, openai_route="/v1/chat/completions", openai_input={"stream": True})
    pieces: list[str] = []

    def look() -> bool:
        found = page.post(f"/api/stream/{job}", {}).json()
        pieces.extend(one["output"] for one in found["stream"])
        return found["status"] == "COMPLETED" and not found["stream"]

    assert until(look)
    assert pieces == ['data: {"choices": [{"delta": {"content": "hi"}}]}\n\n', "data: [DONE]\n\n"]


def test_a_wrong_key_and_a_worker_that_is_gone_are_told(worker: OwnWorker) -> None:
    with served(lambda: OwnServer(worker.url, "another-key-than-its")) as page:
        assert "refuses the key" in end(page, begin(page, prompt="x"))["error"]
    with served(lambda: OwnServer("http://127.0.0.1:9", KEY)) as page:
        assert "127.0.0.1:9 cannot be reached" in end(page, begin(page, prompt="x"))["error"]


def test_an_address_with_an_id_is_an_endpoint_and_another_one_a_worker() -> None:
    for url in ("https://api.runpod.ai/v2/abc123", "http://127.0.0.1:8000/v2/local/"):
        assert isinstance(backend_of(url, ""), Endpoint)
    for url in ("http://127.0.0.1:8000", "https://abc123.api.runpod.ai/"):
        assert isinstance(backend_of(url, ""), OwnServer)
