"""`python -m live` against the worker's own server over a real socket."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from socket import SHUT_RDWR

import pytest
from PIL import Image
from websockets.sync.client import connect

from handler import Worker
from live.__main__ import main
from live.client import Client, frames_of
from live.wire import pack, unpack
from lora.errors import ToolError
from tests.live.streams import frame, picture, start
from tests.test_handler import pipeline_unchanged
from tests.waiting import PATIENCE, until
from tests.worker.http.serving import served
from worker.http.images import Images


@pytest.fixture(scope="module")
def url(demo_worker: Worker) -> Iterator[str]:
    with served(Images(demo_worker), demo_worker.settings) as site:
        yield site.address.replace("http", "ws") + "/live"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(5):
        picture(number).save(source / f"{number}.png")
    return source


def test_a_folder_is_sent_and_the_frames_are_kept(
    url: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], demo_worker: Worker
) -> None:
    out = tmp_path / "out"
    options = [
        "--prompt",
        "a red circle",
        "--lora",
        "demo-stripes:0.5",
        "--size",
        "64",
        "--steps",
        "1",
    ]
    with pipeline_unchanged(demo_worker):
        assert (
            main([url, str(folder), *options, "--out", str(out), "--at", '2={"prompt": "x"}']) == 0
        )
        until(lambda: demo_worker.parts.live.taken == 0)
    assert sorted(file.name for file in out.iterdir()) == [f"{n:05}.jpg" for n in range(5)]
    said = capsys.readouterr().out
    assert "5 frames sent, 5 drawn, 0 skipped, 0 dropped, 0 errors" in said
    assert "round trip: median" in said and "switch: median" in said


def test_an_animation_is_sent_frame_by_frame(url: str, tmp_path: Path, demo_worker: Worker) -> None:
    source = tmp_path / "moving.gif"
    first, *others = [picture(number * 3) for number in range(4)]
    first.save(source, save_all=True, append_images=others)
    with Client(url, start(steps=1)) as client:
        answers = list(client.stream(frames_of(source, 64)))
    assert [one.about["seq"] for one in answers] == [0, 1, 2, 3]
    assert client.figures.drawn == 4 and client.figures.errors == []
    until(lambda: demo_worker.parts.live.taken == 0)


def test_what_cannot_be_sent_is_told_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    video = tmp_path / "film.mp4"
    video.write_bytes(b"no picture")
    monkeypatch.setattr("shutil.which", lambda name: None)
    for source, words in (
        (tmp_path / "empty", "has no pictures"),
        (tmp_path / "gone", "is not there"),
        (video, "needs the program ffmpeg"),
    ):
        with pytest.raises(ToolError, match=words):
            frames_of(source, 64)


def test_a_video_is_read_by_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "ffmpeg"
    program.write_text("#!/bin/sh\nhead -c 1700 /dev/zero\n")  # two frames of 16 x 16, and a rest
    program.chmod(0o755)
    monkeypatch.setattr("shutil.which", lambda name: str(program))
    video = tmp_path / "film.mp4"
    video.write_bytes(b"no picture")
    frames = list(frames_of(video, 16))
    assert len(frames) == 2 and all(data[:2] == b"\xff\xd8" for data in frames)


def test_a_worker_that_refuses_or_is_not_there_is_told(
    url: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([url, str(folder), "--lora", "no such lora", "--size", "64"]) == 2
    assert "LORA_NOT_FOUND" in capsys.readouterr().err
    assert main(["ws://127.0.0.1:9/live", str(folder)]) == 2
    assert "cannot be reached" in capsys.readouterr().err
    assert main([url, str(folder), "--at", "x={}"]) == 2
    assert "is no frame's number" in capsys.readouterr().err


def test_a_killed_client_leaves_every_weight_and_the_next_one_draws(
    url: str, demo_worker: Worker
) -> None:
    with pipeline_unchanged(demo_worker):
        for _ in range(2):
            with connect(url, max_size=None) as socket:
                socket.send(pack(start(loras=["demo-stripes"])))
                assert unpack(socket.recv(PATIENCE)).about["type"] == "ready"
                socket.send(pack({}, frame(0)))
                socket.socket.shutdown(SHUT_RDWR)  # as if the process had died: no goodbye
            until(lambda: demo_worker.parts.live.taken == 0)
        with Client(url, start(steps=1)) as client:
            (answer,) = client.stream([frame(0)])
            assert answer.picture
        until(lambda: demo_worker.parts.live.taken == 0)
    assert json.dumps(client.ready)


def test_the_picture_is_the_one_that_was_asked_for(url: str, demo_worker: Worker) -> None:
    with Client(url, start(steps=1, output_format="webp", size=[96, 64])) as client:
        (answer,) = client.stream([frame(0, "JPEG")])
    assert answer.picture[:4] == b"RIFF"
    with Image.open(io.BytesIO(answer.picture)) as drawn:
        assert drawn.size == (96, 64)
    until(lambda: demo_worker.parts.live.taken == 0)
