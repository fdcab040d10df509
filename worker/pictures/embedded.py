"""The text inside of a picture's file: PNG's `parameters`, and EXIF's UserComment in JPEG and WebP."""

from __future__ import annotations

import struct
from contextlib import suppress

from PIL import Image

PNG_KEY = "parameters"
EXIF_POINTER, USER_COMMENT = 0x8769, 0x9286
LONG, UNDEFINED = 4, 7
ASCII, UNICODE = b"ASCII\0\0\0", b"UNICODE\0"
HEAD = b"Exif\0\0"

JPEG_LIMIT = 65_533
"""Bytes that fit into JPEG's segment for EXIF."""


def exif_of(text: str) -> bytes:
    """EXIF with the text as its UserComment, which web UIs read: ASCII, or else UTF-16 in big endian.

    Not by Pillow's `Exif`, which writes the text into its log.
    """
    comment = ASCII + text.encode() if text.isascii() else UNICODE + text.encode("utf-16-be")
    first = 8  # the first directory, behind the head of TIFF; each has one entry and no next
    size = 2 + 12 + 4
    directory = struct.pack(">HHHIII", 1, EXIF_POINTER, LONG, 1, first + size, 0)
    comments = struct.pack(">HHHIII", 1, USER_COMMENT, UNDEFINED, len(comment), first + 2 * size, 0)
    return HEAD + struct.pack(">2sHI", b"MM", 42, first) + directory + comments + comment


def text_of(picture: Image.Image) -> str | None:
    """The text of an opened picture; None if there is none."""
    text = getattr(picture, "text", {}).get(PNG_KEY)
    if isinstance(text, str):
        return text
    comment = None
    with suppress(Exception):  # broken EXIF raises what it likes
        comment = picture.getexif().get_ifd(EXIF_POINTER).get(USER_COMMENT)
    return _decoded(comment) if isinstance(comment, bytes) else None


def _decoded(comment: bytes) -> str | None:
    kind, body = comment[:8], comment[8:]
    if kind == UNICODE:
        # Which end comes first is not said: in most scripts of a text's letters, the zero does.
        big = body[::2].count(0) >= body[1::2].count(0)
        text = body.decode("utf-16-be" if big else "utf-16-le", "replace")
    else:
        text = (body if kind == ASCII else comment).decode("utf-8", "replace")
    return text.strip("\0 \n") or None
