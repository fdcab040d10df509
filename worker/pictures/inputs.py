"""Loads a request's pictures from http(s) URLs, data URIs and base64."""

from __future__ import annotations

import base64
import importlib
import io
import re
import time
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from urllib.parse import unquote

import requests
from PIL import Image, features

from lora.errors import SourceInvalid
from lora.fetch.redaction import redact_url
from lora.fetch.web import Web
from pipelines.pixels import BROKEN, as_mask, as_rgb, shows_through
from validation import InvalidInput
from worker.pictures.jpeg import MAX_SCANS, has_too_many_scans

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""The formats that Pillow may always read. Of the others some start programs, and few are well tested."""

MAX_BYTES = 30_000_000
MAX_PIXELS = 40_000_000
MIN_SIDE = 16
TIMEOUT = 60.0
"""Seconds that fetching a picture may take."""

Say = Callable[[str], None]
"""Takes a sentence that the answer must tell."""

OTHERS = (
    (rb"....ftyp(?:hei[cxms]|hev[cx]|mif1|msf1)", "a HEIC picture"),
    (rb"....ftypavi[fs]", "an AVIF picture"),
    (rb"....ftyp", "a video"),
    (rb"\xff\x0a|....JXL ", "a JPEG XL picture"),
    (rb"....jP  ", "a JPEG 2000 picture"),
    (rb"8BPS", "a Photoshop file"),
    (rb"%PDF", "a PDF"),
    (rb"(?i)\s*(?:<\?xml.{0,500})?(?:<!--.{0,500})?<(?:!doctype )?svg", "an SVG drawing"),
    (rb"(?i)\s*<(?:!doctype )?html", "a web page, not the picture on it"),
    (rb"\s*[{\[]", "JSON"),
)
"""How what is no picture, or one that cannot be read here, begins; and what it is."""


def load_picture(url: str, web: Web, say: Say = lambda sentence: None) -> Image.Image:
    """The picture of `image_url` as RGB, upright, on white. See `as_rgb`.

    Raises: InvalidInput if it cannot be fetched, is no picture, is over 30 MB or 40 megapixels, or is
    smaller than 16 pixels on a side.
    """
    picture = _opened("image_url", url, web, say, as_rgb, "white")
    if min(picture.size) < MIN_SIDE:
        raise InvalidInput(f"image_url: the picture is smaller than {MIN_SIDE} pixels on a side")
    return picture


def load_mask(url: str, web: Web, say: Say = lambda sentence: None) -> Image.Image:
    """The mask of `mask_url`: 8 bits of grey, upright, on black. Raises: InvalidInput, as `load_picture`."""
    return _opened("mask_url", url, web, say, as_mask, "black")


def _opened(
    name: str,
    url: str,
    web: Web,
    say: Say,
    convert: Callable[[Image.Image], Image.Image],
    behind: str,
) -> Image.Image:
    return _read(name, _bytes_of(name, url, web), say, convert, behind)


def picture_in(name: str, data: bytes) -> Image.Image:
    """The picture in a file's bytes, as `load_picture` reads it. Raises: InvalidInput."""
    if len(data) > MAX_BYTES:
        raise _too_large(name)
    return _read(name, data, lambda sentence: None, as_rgb, "white")


def _read(
    name: str,
    data: bytes,
    say: Say,
    convert: Callable[[Image.Image], Image.Image],
    behind: str,
) -> Image.Image:
    try:
        picture: Image.Image = Image.open(io.BytesIO(data), formats=_formats())
        if picture.width * picture.height > MAX_PIXELS:  # before anything is unpacked
            raise InvalidInput(
                f"{name}: the picture is over {MAX_PIXELS / 1e6:g} megapixels",
                "Send a smaller one.",
            )
        if picture.format in ("JPEG", "MPO") and has_too_many_scans(data):
            raise InvalidInput(f"{name}: the JPEG has over {MAX_SCANS} scans", "Save it anew.")
        if getattr(picture, "is_animated", False) and picture.format not in ("JPEG", "MPO"):
            say(f"{name}: of an animation only the first frame is used")
        if shows_through(picture):
            say(f"{name}: transparent parts were taken as {behind}")
        return convert(picture)
    except BROKEN as error:
        raise InvalidInput(f"{name}: {_what_it_is(data)}", f"Send {_sendable()}.") from error


@cache
def _formats() -> tuple[str, ...]:
    """What can be read here: AVIF where Pillow was built with it, HEIC where its plugin is installed."""
    formats = [*FORMATS, "AVIF"] if features.check("avif") else [*FORMATS]
    if find_spec("pillow_heif"):
        importlib.import_module("pillow_heif").register_heif_opener()
        formats.append("HEIF")
    return tuple(formats)


def _sendable() -> str:
    *most, last = _formats()
    return f"{', '.join(most)} or {last}"


def _what_it_is(data: bytes) -> str:
    for begin, kind in OTHERS:
        if re.match(begin, data, re.DOTALL):
            return f"what is there is {kind}, which cannot be read here"
    return "what is there is not a whole picture"


def _bytes_of(name: str, url: str, web: Web) -> bytes:
    url = url.strip()
    if re.match("https?:", url, re.IGNORECASE):
        return _download(name, url, web)
    head, comma, body = url.partition(",")
    if comma and not re.search(r";\s*base64\s*$", head, re.IGNORECASE):
        raise InvalidInput(f"{name}: a data URI must be base64", "data:image/png;base64,…")
    return _decoded(name, body if comma else url)


def _decoded(name: str, text: str) -> bytes:
    """Base64 in either alphabet, with or without its padding, wrapped, or quoted as in a URL."""
    if len(text) * 3 // 4 > MAX_BYTES * 1.1:  # a tenth for line ends
        raise _too_large(name)
    body = "".join((unquote(text) if "%" in text else text).split())
    body = body.rstrip("=").replace("-", "+").replace("_", "/")
    try:
        data = base64.b64decode(body + "=" * (-len(body) % 4), validate=True)
    except ValueError as error:
        raise InvalidInput(
            f"{name}: what it holds is not valid base64", "data:image/png;base64,…"
        ) from error
    if len(data) > MAX_BYTES:
        raise _too_large(name)
    return data


def _too_large(name: str) -> InvalidInput:
    return InvalidInput(f"{name}: the picture is over {MAX_BYTES // 10**6} MB")


def _download(name: str, url: str, web: Web) -> bytes:
    shown, deadline = redact_url(url), time.monotonic() + TIMEOUT
    try:
        with web.open(url, stall=30.0, deadline=deadline) as body:
            if body.status != 200:
                raise InvalidInput(f"{name}: {shown} answered HTTP {body.status}")
            return body.read(MAX_BYTES)
    except SourceInvalid as error:
        raise InvalidInput(f"{name}: {error.sentence}", error.hint) from error
    except requests.RequestException as error:
        raise InvalidInput(f"{name}: {shown} could not be fetched") from error
    except ValueError as error:
        raise _too_large(name) from error
