"""Loads a request's picture from an http(s) URL or a data URI."""

from __future__ import annotations

import base64
import io
import time

import requests
from PIL import Image, ImageOps

from lora.errors import SourceInvalid
from lora.fetch.redaction import redact_url
from lora.fetch.web import Web
from validation import InvalidInput

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""The formats that Pillow may read. Of the others some start programs, and few are well tested."""

MAX_BYTES = 30_000_000
MAX_PIXELS = 40_000_000
MIN_SIDE = 64
TIMEOUT = 60.0
"""Seconds that fetching a picture may take."""


def load_picture(url: str, web: Web) -> Image.Image:
    """The picture as RGB, turned upright by its EXIF orientation.

    Raises: InvalidInput if it cannot be fetched, is no picture, is over 30 MB or 40 megapixels, or is
    smaller than 64 pixels on a side.
    """
    data = _from_data_uri(url) if url.startswith("data:") else _download(url, web)
    try:
        picture: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        if picture.width * picture.height > MAX_PIXELS:
            raise InvalidInput(f"image_url: the picture is over {MAX_PIXELS / 1e6:g} megapixels")
        upright = ImageOps.exif_transpose(picture).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        # Pillow raises SyntaxError for broken PNG chunks and EXIF.
        raise InvalidInput("image_url: the file is not a whole picture") from error
    if min(upright.size) < MIN_SIDE:
        raise InvalidInput(f"image_url: the picture is smaller than {MIN_SIDE} pixels on a side")
    return upright


def _from_data_uri(url: str) -> bytes:
    head, _, body = url.partition(",")
    if not head.endswith(";base64"):
        raise InvalidInput("image_url: a data URI must be base64", "data:image/png;base64,…")
    if len(body) * 3 // 4 > MAX_BYTES:
        raise InvalidInput(f"image_url: the picture is over {MAX_BYTES // 10**6} MB")
    try:
        return base64.b64decode(body, validate=True)
    except ValueError as error:
        raise InvalidInput("image_url: the data URI is not valid base64") from error


def _download(url: str, web: Web) -> bytes:
    shown, deadline = redact_url(url), time.monotonic() + TIMEOUT
    try:
        with web.open(url, stall=30.0, deadline=deadline) as body:
            if body.status != 200:
                raise InvalidInput(f"image_url: {shown} answered HTTP {body.status}")
            return body.read(MAX_BYTES)
    except SourceInvalid as error:
        raise InvalidInput(f"image_url: {error.sentence}", error.hint) from error
    except requests.RequestException as error:
        raise InvalidInput(f"image_url: {shown} could not be fetched") from error
    except ValueError as error:
        raise InvalidInput(f"image_url: the picture is over {MAX_BYTES / 1e6:g} MB") from error
