"""Pictures that take hours to decode are refused before; what comes behind a picture does not count."""

from __future__ import annotations

import base64
import io
import time

import pytest
from PIL import Image

from lora.fetch.web import Web
from validation import InvalidInput
from worker.pictures.inputs import load_picture
from worker.pictures.jpeg import MAX_SCANS, has_too_many_scans


def jpeg(side: int = 64, *, progressive: bool = True, color: str = "RGB") -> bytes:
    """Small, as long as the picture is grey all over."""
    stream = io.BytesIO()
    Image.new("L", (side, side), 99).convert(color).save(stream, "JPEG", progressive=progressive)
    return stream.getvalue()


def with_scans(count: int, side: int = 64) -> bytes:
    """A picture whose last scan is there so many times more."""
    whole = jpeg(side, color="L")
    last = whole[whole.rfind(b"\xff\xda") : -2]
    return whole[:-2] + last * count + b"\xff\xd9"


def load(data: bytes) -> Image.Image:
    return load_picture(f"data:image/jpeg;base64,{base64.b64encode(data).decode()}", Web())


@pytest.mark.parametrize("fill", [b"", b"\xff", b"\x00\x01garbage"])
def test_a_picture_of_many_scans_is_refused_before_it_is_decoded(fill: bytes) -> None:
    data = with_scans(3000, 2000).replace(b"\xff\xda", fill + b"\xff\xda")
    begun = time.process_time()
    with pytest.raises(InvalidInput, match=f"over {MAX_SCANS} scans"):
        load(data)
    assert time.process_time() - begun < 5  # a decoder would need a minute


@pytest.mark.parametrize("color", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_pictures_that_encoders_write_are_decoded(color: str, *, progressive: bool) -> None:
    data = jpeg(200, progressive=progressive, color=color)
    assert not has_too_many_scans(data)
    assert load(data).size == (200, 200)


@pytest.mark.parametrize(
    "behind", [b"\xff\xda" * 1000, with_scans(500), bytes(range(256)) * 2000], ids=len
)
def test_what_comes_behind_the_picture_does_not_count(behind: bytes) -> None:
    assert load(jpeg() + behind).size == (64, 64)


@pytest.mark.parametrize(
    "data", [b"", b"\xff", b"\xff\xda", b"\xff\xe1\xff", b"\xff\xd8\xff\xda\x00"]
)
def test_what_is_cut_off_has_an_end(data: bytes) -> None:
    assert not has_too_many_scans(data)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning:PIL")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize(
    "exif",
    [
        b"II+\0\x08\0\0\0",
        b"II*\0",
        b"MM\0*\0\0\0\x08\0\x01",
        b"",
        b"II*\0\x08\0\0\0\xff\xff\x12\x01",
    ],
)
def test_a_broken_exif_is_as_good_as_none(kind: str, exif: bytes) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (64, 48)).save(stream, kind, exif=b"Exif\0\0" + exif)
    assert load(stream.getvalue()).size == (64, 48)
