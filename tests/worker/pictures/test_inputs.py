import base64
import io
import re
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from tests.server import LOOPBACK, LoopbackServer
from validation import PICTURE, InvalidInput
from worker.pictures import inputs
from worker.pictures.inputs import load_mask, load_picture


def saved(picture: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, file_format, **options)
    return buffer.getvalue()


def png(mode: str = "RGB", size: tuple[int, int] = (80, 64), **options: object) -> bytes:
    return saved(Image.new(mode, size, "red" if mode != "P" else 1), "PNG", **options)


def uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_every_mode_comes_back_as_rgb(mode: str) -> None:
    picture = load_picture(uri(png(mode)), LOOPBACK)
    assert (picture.mode, picture.size) == ("RGB", (80, 64))


RANDOM = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 80, 3), dtype=np.uint8))
"""A picture whose base64 has every character of its alphabet."""

TEXT = base64.b64encode(saved(RANDOM, "PNG")).decode()


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        f"data:image/png;base64,{TEXT}",
        f" \n data:image/png;base64,{TEXT}\n",
        f"DATA:IMAGE/PNG;BASE64,{TEXT}",
        f"data:application/octet-stream;base64,{TEXT}",
        f"data:;base64,{TEXT}",
        f"data:image/png;charset=utf-8;base64,{TEXT}",
        f"data:image/png;base64,{TEXT.rstrip('=')}",
        f"data:image/png;base64,{quote(TEXT, safe='')}",
        f"data:image/png;base64,{TEXT.replace('+', '-').replace('/', '_')}",
        TEXT.rstrip("=").replace("+", "-").replace("/", "_"),
        "\r\n".join(TEXT[at : at + 76] for at in range(0, len(TEXT), 76)),
    ],
    ids=lambda text: repr(text[:30]),
)
def test_base64_is_read_in_every_shape(text: str) -> None:
    assert re.search(PICTURE, text)
    np.testing.assert_array_equal(load_picture(text, LOOPBACK), RANDOM)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_every_format_is_read(file_format: str) -> None:
    said: list[str] = []
    picture = load_picture(
        uri(saved(Image.new("RGB", (80, 64), "red"), file_format)), LOOPBACK, said.append
    )
    assert np.abs(np.asarray(picture).astype(int) - (255, 0, 0)).max() <= 4
    assert said == []


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200)


def test_heic_without_its_plugin_is_named_and_what_to_send_instead() -> None:
    with pytest.raises(InvalidInput) as caught:
        load_picture(uri(HEIC), LOOPBACK)
    assert "image_url: what is there is a HEIC picture, which cannot be read here" in str(
        caught.value
    )
    assert "Send PNG, JPEG, WEBP" in str(caught.value)


def test_heic_with_its_plugin_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def register() -> None:
        Image.register_open("HEIF", lambda *_: Image.new("RGB", (32, 48), "red"), is_heic)

    def is_heic(prefix: bytes) -> bool:
        return prefix[4:12] == b"ftypheic"

    module = ModuleType("pillow_heif")
    module.__spec__ = ModuleSpec("pillow_heif", None)
    module.register_heif_opener = register  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pillow_heif", module)
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    inputs._formats.cache_clear()
    try:
        assert load_picture(uri(HEIC), LOOPBACK).size == (32, 48)
    finally:
        inputs._formats.cache_clear()


def test_what_a_picture_loses_is_said() -> None:
    said: list[str] = []
    frames = {"save_all": True, "append_images": [Image.new("RGB", (80, 64), "blue")]}
    load_picture(uri(png(**frames)), LOOPBACK, said.append)
    clear = Image.new("RGBA", (80, 64), (1, 2, 3, 40))
    load_picture(uri(saved(clear, "PNG")), LOOPBACK, said.append)
    load_mask(uri(saved(clear, "WEBP")), LOOPBACK, said.append)
    assert said == [
        "image_url: of an animation only the first frame is used",
        "image_url: transparent parts were taken as white",
        "mask_url: transparent parts were taken as black",
    ]


def test_a_mask_is_grey_and_may_be_small() -> None:
    mask = load_mask(uri(png("RGB", (8, 4))), LOOPBACK)
    assert (mask.mode, mask.size, mask.getextrema()) == ("L", (8, 4), (76, 76))
    with pytest.raises(InvalidInput) as caught:
        load_mask("data:image/png;base64,%%%", LOOPBACK)
    assert "mask_url: " in str(caught.value)


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
        (uri(png(size=(100, 8))), "smaller than 16 pixels"),
        (base64.b64encode(png()).decode()[:101], "not valid base64"),
        (uri(b"<html><body>no picture</body></html>"), "a web page, not the picture on it"),
        (uri(b'<?xml version="1.0"?>\n<svg/>'), "an SVG drawing"),
        (uri(b"%PDF-1.7"), "a PDF"),
        (uri(b"\0\0\0\x18ftypmp42"), "a video"),
        (uri(b'{"error": "canary"}'), "JSON"),
        (uri(b"\xff\x0a" + bytes(40)), "JPEG XL"),
        (uri(b"no picture"), "not a whole picture"),
        (uri(png()[:40]), "not a whole picture"),
    ],
)
def test_bad_data_uris_are_refused(url: str, said: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        load_picture(url, LOOPBACK)
    assert said in str(caught.value)
    assert "canary" not in str(caught.value)


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
