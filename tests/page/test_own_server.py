"""The page over a worker that has a server of its own: jobs, streams and live frames."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, expect
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from page.__main__ import backend_of
from page.backend import Endpoint
from page.own_server import OwnServer
from tests.page.browser import needs_browser, opened
from tests.page.own_worker import NAMES, OwnWorker, own_worker, packed, unpacked
from tests.page.serving import Served, served
from tests.waiting import PATIENCE, until

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


def test_live_messages_go_both_ways_with_the_key(page: Served, worker: OwnWorker) -> None:
    address = f"ws://127.0.0.1:{page.port}/api/live"
    with connect(address, origin=page.url) as socket:  # type: ignore[arg-type]
        socket.send('{"size": 64}')
        assert unpacked(bytes(socket.recv()))[0]["type"] == "ready"  # type: ignore[arg-type]
        socket.send(packed({"seq": 3, "lora_selection": "two"}, b"picture"))
        about, picture = unpacked(bytes(socket.recv()))  # type: ignore[arg-type]
        assert (about["seq"], about["presets"], picture) == (3, ["two"], b"picture")


@pytest.mark.parametrize("origin", [None, "http://evil.example"])
def test_no_other_site_opens_a_live_session(
    page: Served, worker: OwnWorker, origin: str | None
) -> None:
    address = f"ws://127.0.0.1:{page.port}/api/live"
    with pytest.raises(InvalidStatus) as caught:
        connect(address, origin=origin)  # type: ignore[arg-type]
    assert caught.value.response.status_code == 403
    assert worker.frames == []


def test_an_address_with_an_id_is_an_endpoint_and_another_one_a_worker() -> None:
    for url in ("https://api.runpod.ai/v2/abc123", "http://127.0.0.1:8000/v2/local/"):
        assert isinstance(backend_of(url, ""), Endpoint)
    for url in ("http://127.0.0.1:8000", "https://abc123.api.runpod.ai/"):
        assert isinstance(backend_of(url, ""), OwnServer)


@needs_browser
@pytest.mark.slow
def test_300_frames_with_20_switches_have_what_was_chosen(
    page: Served, worker: OwnWorker, browser: Browser
) -> None:
    expect.set_options(timeout=PATIENCE * 1000)
    faults: list[str] = []
    context = browser.new_context()
    tab = opened(context, page.url + "/", faults)
    tab.click("#tab-live")
    expect(tab.locator("#panel-live .chip")).to_have_count(3)
    tab.get_by_label("at most fps").fill("60")
    tab.click("#live-start")
    for number in range(20):
        until(lambda least=15 * number: frames(tab) > least)  # type: ignore[misc]
        tab.locator("#panel-live h2").first.click()
        tab.keyboard.press(str(1 + number % 3))
        expect(tab.locator("#live")).to_have_attribute("data-presets", NAMES[number % 3])
    until(lambda: frames(tab) >= 300)
    tab.click("#live-stop")
    expect(tab.locator("#live-start")).to_be_enabled()
    seqs = [frame["seq"] for frame in worker.frames]
    assert seqs == list(range(len(seqs)))
    assert all(frame["bytes"] for frame in worker.frames)
    switches = [one["lora_selection"] for one in worker.frames if "lora_selection" in one]
    assert switches == [NAMES[number % 3] for number in range(20)]
    expect(tab.locator("#live-figures")).to_contain_text("p95")
    context.close()
    assert faults == []


def frames(tab: Any) -> int:
    return int(tab.locator("#live").get_attribute("data-done") or 0)
