"""Small pictures that show what an adapter does: made of a job's picture, or of a preview that lies there."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image

from validation import InvalidInput
from worker.pictures.inputs import MAX_BYTES, picture_in

SIDE, QUALITY = 256, 80
"""The longer side of a thumbnail in pixels, and WebP's quality."""

Picture = Image.Image


def made(picture: Picture) -> bytes:
    """A picture as a thumbnail: WebP without any text."""
    small = picture.copy()
    small.thumbnail((SIDE, SIDE))
    clean = Image.new("RGB", small.size)
    clean.paste(small)
    stream = io.BytesIO()
    clean.save(stream, "WEBP", quality=QUALITY)
    return stream.getvalue()


def of_file(path: Path) -> str | None:
    """The thumbnail of a preview's file as a data URI; None if it is no picture that can be read.

    It is made anew of the pixels: what else the file holds goes nowhere.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            return None
        return data_uri(made(picture_in(path.name, path.read_bytes())))
    except (OSError, InvalidInput):
        return None


def data_uri(picture: bytes) -> str:
    """A WebP picture as a data URI."""
    return "data:image/webp;base64," + base64.b64encode(picture).decode()
