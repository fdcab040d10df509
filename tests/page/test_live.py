"""The page's live frames: a real browser, and real workers on the demo model."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, WebSocket, expect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from handler import Worker
from live.wire import Message, pack, unpack
from page.backend import Endpoint
from page.local import Local
from page.own_server import OwnServer
from pipelines.live import LiveStream
from pipelines.prompts import encode
from tests.conftest import ROOT
from tests.live.streams import frame, pixels, start
from tests.page.browser import needs_browser, opened
from tests.page.serving import Served, served
from tests.test_handler import pipeline_unchanged
from tests.waiting import PATIENCE, until
from tests.worker.http.serving import Program, program
from tests.worker.http.serving import served as http_site
from worker.http.images import Images

KEY = "the-key-of-a-worker"

PRESETS = {
    "first": {"demo-stripes": 1.0},
    "second": {"demo-night": 0.9},
    "third": {"demo-outline": 0.7},
}
"""In the order of the page, which sorts them. A LoHa is among them."""

FRAMES, SWITCHES = 300, 20


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """A worker's own server on the demo model, with a key, presets, and place for two sessions."""
    folder = tmp_path_factory.mktemp("worker")
    shutil.copytree(ROOT / "demo" / "loras", folder / "loras")
    options = {"WORKER_TINY_VAE": "demo", "WORKER_LIVE_SESSIONS": "2", "WORKER_LIVE_SECONDS": "0"}
    with program(folder, WORKER_API_KEY=KEY, **options) as running:
        running.headers = {"Authorization": f"Bearer {KEY}"}
        running.ready()
        for name, scales in PRESETS.items():
            loras = [{"path": path, "scale": scale} for path, scale in scales.items()]
            given = {"action": "presets.set", "name": name, "loras": loras}
            assert running.post("/generate", {"input": given}).status_code == 200
        yield running


def hear(socket: ClientConnection) -> Message:
    """The next message that is no monitor's."""
    while (message := unpack(bytes(socket.recv(PATIENCE)))).about["type"] == "monitor":
        pass
    return message


@dataclass
class Watched:
    """What a browser's WebSocket carried, both ways."""

    sent: list[Message] = field(default_factory=list)
    """The first message, then frames."""
    came: list[Message] = field(default_factory=list)

    def watch(self, socket: WebSocket) -> None:
        socket.on("framesent", lambda data: self.sent.append(unpack(data)))
        socket.on("framereceived", lambda data: self.came.append(unpack(data)))

    def errors(self) -> list[str]:
        return [one.about["error"] for one in self.came if "error" in one.about]

    def answers(self) -> dict[int, Message]:
        """Those with a picture, by number."""
        frames = [one for one in self.came if one.about["type"] == "frame"]
        assert not [one.about for one in frames if "error" in one.about or "loading" in one.about]
        return {one.about["seq"]: one for one in frames if one.picture}

    def chosen(self) -> list[str]:
        """The preset that each frame was sent for, as far as it was known then."""
        names, now = [], ""
        for one in self.sent[1:]:
            now = one.about.get("lora_selection", now)
            names.append(now)
        return names


def done(tab: Page) -> int:
    return int(tab.locator("#live").get_attribute("data-done") or 0)


@needs_browser
@pytest.mark.slow
def test_300_frames_with_20_switches_are_each_what_they_are_alone(
    worker: Program, browser: Browser
) -> None:
    expect.set_options(timeout=PATIENCE * 1000)
    faults, watched = list[str](), Watched()
    names = [list(PRESETS)[number % 3] for number in range(SWITCHES)]
    with served(lambda: OwnServer(worker.address, KEY)) as page:
        context = browser.new_context()
        tab = opened(context, page.url + "/", faults)
        tab.on("websocket", watched.watch)
        tab.click("#tab-live")
        expect(tab.locator("#panel-live .chip")).to_have_count(3)
        tab.locator("#panel-live").get_by_label("steps").fill("1")
        tab.get_by_label("at most fps").fill("60")
        tab.click("#live-start")
        for number, name in enumerate(names):
            until(lambda least=(FRAMES // SWITCHES) * number: done(tab) > least)  # type: ignore[misc]
            tab.locator("#panel-live h2").first.click()
            tab.keyboard.press(str(1 + list(PRESETS).index(name)))
            expect(tab.locator("#live")).to_have_attribute("data-presets", name)
        until(lambda: done(tab) >= FRAMES)
        tab.click("#live-stop")
        expect(tab.locator("#live-start")).to_be_enabled()
        expect(tab.locator("#live-figures")).to_contain_text("p95")
        expect(tab.locator("#live-applied")).to_contain_text("demo-night 0.9")
        context.close()
    assert faults == []
    answers, chosen = watched.answers(), watched.chosen()
    assert len(answers) >= FRAMES
    switched = [n for n, one in enumerate(watched.sent[1:]) if "lora_selection" in one.about]
    assert [chosen[number] for number in switched] == names
    assert switched == [number for number in switched if number in answers]
    for number, answer in answers.items():
        applied = {one["name"]: one["scale"] for one in answer.about["loras"]}
        wanted = [chosen[number]] if chosen[number] else []
        assert (answer.about["presets"], applied) == (wanted, PRESETS.get(chosen[number], {}))
    the_same_alone(worker, watched, [*switched, *list(answers)[::5]])


def the_same_alone(worker: Program, watched: Watched, numbers: list[int]) -> None:
    """A session of its own draws each of these frames under its preset, and under another one: only the
    first is what the browser got."""
    answers, chosen = watched.answers(), watched.chosen()
    url = worker.address.replace("http", "ws") + "/live"
    with connect(url, additional_headers=worker.headers, max_size=None) as socket:
        socket.send(pack(watched.sent[0].about))
        assert hear(socket).about["type"] == "ready"

        def drawn(number: int, preset: str) -> bytes:
            about = {"seq": number, "lora_selection": preset or "none", "wait": True}
            socket.send(pack(about, watched.sent[1 + number].picture))
            return hear(socket).picture

        for number in numbers:
            assert drawn(number, chosen[number]) == answers[number].picture, number
        for number in numbers[-3:]:
            others = {*PRESETS, ""} - {chosen[number]}
            assert answers[number].picture not in {drawn(number, one) for one in others}


NO_PICTURE = """() => {
  const canvas = HTMLCanvasElement.prototype, real = canvas.toBlob;
  canvas.toBlob = function (give) { canvas.toBlob = real; give(new Blob(["no picture"])); };
}"""
"""One frame of the page's is none."""


@needs_browser
@pytest.mark.slow
def test_errors_end_no_session_and_a_closed_tab_leaves_the_next_one_its_place(
    demo_worker: Worker, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, fails = LiveStream.step, threading.Event()

    def step(self: LiveStream, frames: Any) -> None:
        if fails.is_set():
            fails.clear()
            raise RuntimeError
        real(self, frames)

    monkeypatch.setattr(LiveStream, "step", step)
    encode(demo_worker.parts.pipeline.base, "a", None)  # transformers hooks in at the first call
    with pipeline_unchanged(demo_worker), served(lambda: Local(demo_worker)) as page:
        for _ in range(2):
            meets_faults(page, browser, fails)
            until(lambda: demo_worker.parts.live.taken == 0)


def meets_faults(page: Served, browser: Browser, fails: threading.Event) -> None:
    """Draws, goes on after a bad frame and after a step that fails, and is closed in the middle."""
    faults, watched = list[str](), Watched()
    context = browser.new_context()
    tab = opened(context, page.url + "/", faults)
    tab.on("websocket", watched.watch)
    tab.click("#tab-live")
    tab.locator("#panel-live").get_by_label("steps").fill("1")
    tab.click("#live-start")
    until(lambda: done(tab) > 2)
    for number, break_one in enumerate((lambda: tab.evaluate(NO_PICTURE), fails.set), 1):
        break_one()
        until(lambda least=number: done(tab) and len(watched.errors()) == least)  # type: ignore[misc]
        before = done(tab)
        until(lambda least=before: done(tab) > least)  # type: ignore[misc]
    bad, failed = watched.errors()
    assert bad.startswith("INVALID_INPUT: the frame is no whole")
    assert failed.startswith("INTERNAL: the frame failed unexpectedly (RuntimeError)")
    context.close()
    assert faults == []


@needs_browser
@pytest.mark.slow
def test_a_session_whose_time_is_over_says_so_and_another_can_begin(
    demo_worker: Worker, browser: Browser
) -> None:
    settings = demo_worker.parts.settings
    before, faults = settings.live_seconds, list[str]()
    object.__setattr__(settings, "live_seconds", 0.5)
    try:
        with served(lambda: Local(demo_worker)) as page:
            context = browser.new_context()
            tab = opened(context, page.url + "/", faults)
            tab.click("#tab-live")
            for _ in range(2):
                tab.click("#live-start")
                expect(tab.locator("#live-trouble")).to_contain_text("its 0.5 seconds are over")
                expect(tab.locator("#live-start")).to_be_enabled()
            context.close()
    finally:
        object.__setattr__(settings, "live_seconds", before)
    assert faults == []


@needs_browser
@pytest.mark.slow
def test_a_worker_that_ends_in_a_session_shows_and_the_page_goes_on(
    demo_worker: Worker, browser: Browser
) -> None:
    faults = list[str]()
    with (
        http_site(Images(demo_worker), demo_worker.settings) as site,
        served(lambda: OwnServer(site.address)) as page,
    ):
        context = browser.new_context()
        tab = opened(context, page.url + "/", faults)
        tab.click("#tab-live")
        tab.click("#live-start")
        until(lambda: done(tab) > 0)
        tab.click("#live-stop")
        expect(tab.locator("#live-trouble")).to_have_text("")
        until(lambda: demo_worker.parts.live.taken == 0)
        before = done(tab)
        tab.click("#live-start")
        until(lambda: done(tab) != before)
        site.server.should_exit = True
        expect(tab.locator("#live-trouble")).to_contain_text(
            "The connection to the worker was lost"
        )
        expect(tab.locator("#live-start")).to_be_enabled()
        until(lambda: demo_worker.parts.live.taken == 0)
        tab.click("#live-start")
        expect(tab.locator("#live-trouble")).to_contain_text("ENDPOINT_UNREACHABLE")
        context.close()
    assert faults == []


# --- over a socket ---------------------------------------------------------------------------------


def opened_socket(page: Served, origin: str | None = None) -> ClientConnection:
    return connect(
        f"ws://127.0.0.1:{page.port}/api/live",
        origin=origin or page.url,
        max_size=None,  # type: ignore[arg-type]
    )


def test_a_worker_in_the_pages_process_draws_and_goes_back(demo_worker: Worker) -> None:
    encode(demo_worker.parts.pipeline.base, "a", None)  # transformers hooks in at the first call
    with pipeline_unchanged(demo_worker), served(lambda: Local(demo_worker)) as page:
        assert page.get("/api/about").json()["live"] is True
        with opened_socket(page) as socket:
            socket.send(pack(start(steps=1)))
            assert hear(socket).about["type"] == "ready"
            drawn = []
            for number, given in enumerate(({}, {"loras": ["demo-stripes"]}, {"loras": []})):
                socket.send(pack({"seq": number, "wait": True, **given}, frame(0)))
                drawn.append(hear(socket))
        until(lambda: demo_worker.parts.live.taken == 0)
    assert [one.about["seq"] for one in drawn] == [0, 1, 2]
    assert drawn[1].about["loras"] == [{"name": "demo-stripes", "scale": 1.0, "mode": "dynamic"}]
    assert pixels(drawn[0]) == pixels(drawn[2]) != pixels(drawn[1])


def test_messages_pass_to_a_worker_with_its_key_as_they_are(worker: Program) -> None:
    with served(lambda: OwnServer(worker.address, KEY)) as page, opened_socket(page) as socket:
        socket.send('{"size": 64, "steps": 1, "output_format": "png"}')
        assert hear(socket).about["type"] == "ready"
        socket.send(pack({"seq": 3, "lora_selection": "second", "wait": True}, frame(0)))
        answer = hear(socket)
        assert (answer.about["seq"], answer.about["presets"]) == (3, ["second"])
        assert len(pixels(answer)) == 64 * 64 * 3


def test_why_there_is_no_session_is_the_reason_of_the_closing(worker: Program) -> None:
    for backend, words in (
        (lambda: OwnServer(worker.address, "another-key-than-its"), "no live frames .HTTP 401"),
        (lambda: OwnServer("http://127.0.0.1:9", KEY), "127.0.0.1:9 cannot be reached"),
        (lambda: Endpoint(f"{worker.address}/v2/any", KEY), "no live frames"),
    ):
        with (
            served(backend) as page,
            opened_socket(page) as socket,
            pytest.raises(ConnectionClosed, match=words),
        ):
            socket.recv(PATIENCE)


@pytest.mark.parametrize("origin", ["", "http://evil.example"])
def test_no_other_site_opens_a_session(demo_worker: Worker, origin: str) -> None:
    with served(lambda: Local(demo_worker)) as page, pytest.raises(InvalidStatus) as caught:
        connect(f"ws://127.0.0.1:{page.port}/api/live", origin=origin or None)  # type: ignore[arg-type]
    assert caught.value.response.status_code == 403
    assert demo_worker.parts.live.taken == 0
