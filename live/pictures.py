"""Frames as files: what came in as a picture, and a picture as what goes out. Imports without torch."""

from __future__ import annotations

import io

from PIL import Image

from pipelines.pixels import BROKEN, as_rgb
from validation import InvalidInput

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 4096 * 4096


def read(data: bytes) -> Image.Image:
    """A frame's file as RGB, upright, on white.

    Raises: InvalidInput if it is no JPEG, PNG or WebP, not whole, or over `MAX_PIXELS`.
    """
    try:
        picture: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        if picture.width * picture.height > MAX_PIXELS:  # before anything is unpacked
            raise InvalidInput(f"the frame is over {MAX_PIXELS / 1e6:.0f} megapixels")
        return as_rgb(picture)
    except InvalidInput:
        raise
    except BROKEN:
        raise InvalidInput(
            "the frame is no whole JPEG, PNG or WebP", "Send the file's bytes behind the JSON."
        ) from None


def write(picture: Image.Image, file_format: str, quality: int) -> bytes:
    """The picture as a jpeg, png or webp file."""
    buffer = io.BytesIO()
    options = {"compress_level": 1} if file_format == "png" else {"quality": quality}
    picture.save(buffer, file_format.upper(), **options)
    return buffer.getvalue()
