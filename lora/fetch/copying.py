"""Copies a file that lies on this machine already, within the limits that a download has."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from lora.errors import LoraCorrupt, LoraTooLarge
from lora.fetch.download import Fetched, Limits, OnBytes

PIECE = 1 << 20


def copy_file(
    source: Path,
    part: Path,
    limits: Limits,
    make_room: Callable[[int], None],
    on_bytes: OnBytes,
    *,
    deadline: float,
) -> Fetched:
    """Copies `source` into `part`. `make_room` is called with its size before the first byte is written.

    `deadline`: by time.monotonic(). Raises: LoraTooLarge; LoraCorrupt if `source` cannot be read, or not in
    time; OSError if `part` cannot be written; what `make_room` raises.
    """
    digest, done = hashlib.sha256(), 0
    with _opened(source) as stream, part.open("wb") as target:
        total = _size(stream)
        _check(total, limits)
        make_room(total)
        while piece := _read(stream):
            done += len(piece)
            _check(done, limits)
            if time.monotonic() > deadline:
                raise LoraCorrupt("it takes too long to be read")
            digest.update(piece)
            target.write(piece)
            on_bytes(done, total)
    return Fetched(digest.hexdigest(), done, None, None)


def _opened(source: Path) -> BinaryIO:
    try:
        return source.open("rb")
    except OSError as error:
        raise LoraCorrupt(f"it cannot be read ({error.strerror})") from error


def _size(stream: BinaryIO) -> int:
    size = stream.seek(0, 2)
    stream.seek(0)
    return size


def _read(stream: BinaryIO) -> bytes:
    try:
        return stream.read(PIECE)
    except OSError as error:
        raise LoraCorrupt(f"it cannot be read ({error.strerror})") from error


def _check(size: int, limits: Limits) -> None:
    if size > limits.file_bytes:
        raise LoraTooLarge(
            f"the file is over the limit of {limits.file_bytes / 1e6:.0f} MB",
            "The limit is LORA_MAX_FILE_MB.",
        )
