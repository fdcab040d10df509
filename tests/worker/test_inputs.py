import base64
import io

import pytest
from PIL import Image

from tests.server import LOOPBACK, LoopbackServer
from validation import InvalidInput
from worker import inputs
from worker.inputs import load_picture


def png(mode: str = "RGB", size: tuple[int, int] = (80, 64), **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, "red" if mode != "P" else 1).save(buffer, "PNG", **options)
    return buffer.getvalue()


def uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_every_mode_comes_back_as_rgb(mode: str) -> None:
    picture = load_picture(uri(png(mode)), LOOPBACK)
    assert (picture.mode, picture.size) == ("RGB", (80, 64))


def test_a_picture_is_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert load_picture(uri(png(exif=exif)), LOOPBACK).size == (64, 80)


def test_a_url_is_fetched(server: LoopbackServer) -> None:
    assert load_picture(server.serve("/a.png", png()), LOOPBACK).size == (80, 64)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("data:image/png,raw", "must be base64"),
        ("data:image/png;base64,%%%", "not valid base64"),
        ("data:image/png;base64,é", "not valid base64"),
        (uri(png(size=(100, 8))), "smaller than 64 pixels"),
        (uri(b"no picture"), "not a whole picture"),
        (uri(png()[:40]), "not a whole picture"),
    ],
)
def test_bad_data_uris_are_refused(url: str, said: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        load_picture(url, LOOPBACK)
    assert said in str(caught.value)


def test_bad_urls_are_refused_without_their_secrets(
    server: LoopbackServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "MAX_BYTES", 1000)
    cases = {
        server.url("/gone.png?token=canary"): "answered HTTP 404",
        server.serve("/big.png", bytes(2000)): "is over",
        server.serve("/cut.png", png() * 9, cut_after=10): "could not be fetched",
        "http://127.0.0.1:9/x?token=canary": "could not be fetched",
    }
    for url, said in cases.items():
        with pytest.raises(InvalidInput) as caught:
            load_picture(url, LOOPBACK)
        assert said in str(caught.value)
        assert "canary" not in str(caught.value)


def test_too_many_pixels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "MAX_PIXELS", 40)
    with pytest.raises(InvalidInput) as caught:
        load_picture(uri(png()), LOOPBACK)
    assert "megapixels" in str(caught.value)
