"""Live frames over the worker's own server, by a real WebSocket."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import SHUT_RDWR
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from handler import Worker
from live.wire import Message, pack, unpack
from pipelines.prompts import encode
from tests.live.streams import frame, pixels, start
from tests.test_handler import pipeline_unchanged
from tests.waiting import PATIENCE, until
from tests.worker.http.serving import Site, program, served
from worker.http.images import Images


def opened(site: Site) -> Any:
    return connect(site.address.replace("http", "ws") + "/live", open_timeout=PATIENCE)


def hear(socket: ClientConnection) -> Message:
    """The next message that is no monitor's."""
    while (message := unpack(bytes(socket.recv(PATIENCE)))).about["type"] == "monitor":
        pass
    return message


@contextmanager
def begun(site: Site) -> Iterator[ClientConnection]:
    """A session that is ready."""
    with opened(site) as socket:
        socket.send(pack(start(steps=1)))
        assert hear(socket).about["type"] == "ready"
        yield socket


def ask(socket: ClientConnection, about: dict[str, Any], number: int = 0) -> Message:
    socket.send(pack(about, frame(number)))
    return hear(socket)


@pytest.fixture(scope="module", autouse=True)
def has_drawn(demo_worker: Worker) -> None:
    """transformers puts its hooks on the text encoders at their first call."""
    encode(demo_worker.parts.pipeline.base, "a", None)


STRIPES = {"loras": ["demo-stripes"], "wait": True}


def test_frames_change_their_loras_and_the_weights_do_not(demo_worker: Worker) -> None:
    settings = demo_worker.settings
    with pipeline_unchanged(demo_worker), served(Images(demo_worker), settings) as site:
        with begun(site) as socket:
            plain = ask(socket, {"seq": 0})
            striped = ask(socket, {"seq": 1, **STRIPES})
            again = ask(socket, {"seq": 2, "loras": []})
        until(lambda: demo_worker.parts.live.taken == 0)
    assert [one["name"] for one in striped.about["loras"]] == ["demo-stripes"]
    assert pixels(plain) == pixels(again) != pixels(striped)


def test_a_client_that_is_killed_leaves_the_next_one_its_place(demo_worker: Worker) -> None:
    settings = demo_worker.settings
    with pipeline_unchanged(demo_worker), served(Images(demo_worker), settings) as site:
        with begun(site) as killed:
            assert ask(killed, STRIPES).picture
            killed.send(pack({"seq": 1}, frame(1)))
            killed.socket.shutdown(SHUT_RDWR)  # without a word, and with a frame under way
        until(lambda: demo_worker.parts.live.taken == 0)
        with begun(site) as socket:
            assert ask(socket, {"seq": 0}).about["loras"] == []


def test_one_session_more_than_there_are_places_is_told_so(demo_worker: Worker) -> None:
    with (
        served(Images(demo_worker), demo_worker.settings) as site,
        begun(site),
        opened(site) as late,
    ):
        end = hear(late).about
    assert end["type"] == "end" and "LIVE_BUSY" in end["error"]


def test_a_server_that_ends_in_a_session_leaves_the_next_ones_worker_as_it_was(
    demo_worker: Worker,
) -> None:
    settings = demo_worker.settings
    with pipeline_unchanged(demo_worker):
        with served(Images(demo_worker), settings) as site, begun(site) as socket:
            calm = ask(socket, {})
            assert ask(socket, STRIPES).picture
            socket.send(pack({}, frame(1)))  # under way when the server ends
            site.server.should_exit = True
            with pytest.raises(ConnectionClosed):
                while True:
                    hear(socket)
        until(lambda: demo_worker.parts.live.taken == 0)
        with served(Images(demo_worker), settings) as site, begun(site) as socket:
            assert pixels(ask(socket, {})) == pixels(calm)
        until(lambda: demo_worker.parts.live.taken == 0)


@pytest.mark.slow
def test_sigterm_ends_a_session_and_the_program_and_the_next_one_draws(tmp_path: Path) -> None:
    with program(tmp_path) as running, begun(running.ready()) as socket:
        calm = ask(socket, {})
        assert ask(socket, STRIPES).picture
        running.signal(signal.SIGTERM)
        with pytest.raises(ConnectionClosed):
            while True:
                hear(socket)
        assert running.ended() == 0, running.log()
        assert "Traceback" not in running.log()
    with program(tmp_path) as anew, begun(anew.ready()) as socket:
        assert pixels(ask(socket, {})) == pixels(calm)
