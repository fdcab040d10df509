"""The picture that a request brings along, from an http(s) URL or a data URI."""

from __future__ import annotations

import base64
import binascii
import io
import time

import requests
from PIL import Image, ImageOps, UnidentifiedImageError

from lora.sources import redact_url
from schemas import InvalidInput

MAX_BYTES = 30_000_000
MAX_PIXELS = 40_000_000
TIMEOUT = 60.0
"""Seconds that fetching a picture may take."""


def load_picture(url: str) -> Image.Image:
    """The picture as RGB, turned upright by its EXIF orientation.

    Raises: InvalidInput if it cannot be fetched, is no picture, or is over 30 MB or 40 megapixels.
    """
    data = _from_data_uri(url) if url.startswith("data:") else _download(url)
    try:
        picture: Image.Image = Image.open(io.BytesIO(data))
        if picture.width * picture.height > MAX_PIXELS:
            raise InvalidInput(f"image_url: the picture is over {MAX_PIXELS // 10**6} megapixels")
        picture.load()
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise InvalidInput("image_url: what is there is not a picture") from error
    return ImageOps.exif_transpose(picture).convert("RGB")


def _from_data_uri(url: str) -> bytes:
    head, _, body = url.partition(",")
    if not head.endswith(";base64"):
        raise InvalidInput("image_url: a data URI must be base64", "data:image/png;base64,…")
    if len(body) * 3 // 4 > MAX_BYTES:
        raise InvalidInput(f"image_url: the picture is over {MAX_BYTES // 10**6} MB")
    try:
        return base64.b64decode(body, validate=True)
    except binascii.Error as error:
        raise InvalidInput("image_url: the data URI is not valid base64") from error


def _download(url: str) -> bytes:
    shown, deadline = redact_url(url), time.monotonic() + TIMEOUT
    data = bytearray()
    try:
        with requests.get(url, stream=True, timeout=(10, 30)) as response:
            if response.status_code != 200:
                raise InvalidInput(f"image_url: {shown} answered HTTP {response.status_code}")
            for chunk in response.iter_content(1 << 16):
                data += chunk
                if len(data) > MAX_BYTES:
                    raise InvalidInput(f"image_url: the picture is over {MAX_BYTES // 10**6} MB")
                if time.monotonic() > deadline:
                    raise requests.Timeout
    except requests.RequestException as error:
        raise InvalidInput(f"image_url: {shown} could not be fetched") from error
    return bytes(data)
