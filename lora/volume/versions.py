"""What tells two versions of a file apart: its size, its time and its hash."""

from __future__ import annotations

import os
import time
from pathlib import Path

from lora.durable import sha256_of
from lora.errors import LoraError
from lora.formats.header import read_header
from lora.volume.records import Record, read_as, record_path

TICK = 2_000_000_000
"""Nanoseconds: the coarsest clock of a file system that is in use."""

MOMENT = 0.1
"""Seconds within which a copy writes again."""


def stamped(path: Path, sha256: str, before: Record | None) -> os.stat_result:
    """Gives a file a time that depends on its content and is not that of the file before; its status.

    File systems' clocks tick every few milliseconds, or every second. Two contents of one size that are
    published within one tick would have the same time otherwise, and the record of one would fit the other.
    """
    now = time.time_ns() // 1_000_000 * 1_000_000 + int(sha256[:8], 16) % 1_000_000
    os.utime(path, ns=(now, now))
    if before and before.sha256 != sha256 and before.at(path.stat()):
        os.utime(path, ns=(now + TICK, now + TICK))
    return path.stat()


def known(path: Path) -> Record | None:
    """The record of the file that is there, if it is there and has not changed since."""
    record = read_as(Record, record_path(path))
    try:
        return record and record.at(path.stat())
    except OSError:
        return None


def grows(path: Path, before: os.stat_result) -> bool:
    """Whether a file is written to since it had this status, or within a moment from now. Raises: OSError."""
    time.sleep(MOMENT)
    now = path.stat()
    return (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns)


def hash_of(path: Path) -> tuple[str, LoraError | None]:
    """The sha256 of an adapter file, or what is wrong with the file. Raises: OSError."""
    try:
        read_header(path)
        return sha256_of(path), None
    except LoraError as error:
        return "", error
