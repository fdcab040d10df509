"""Making a file appear under its name whole, at once, and so that a loss of power does not take it."""

from __future__ import annotations

import logging
import os
import uuid
from contextlib import suppress
from pathlib import Path

log = logging.getLogger(__name__)


def write_durably(target: Path, *pieces: bytes | memoryview) -> None:
    """Writes a file, whole or not at all. Raises: OSError."""
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex[:16]}.part")
    try:
        with part.open("xb") as stream:
            for piece in pieces:
                stream.write(piece)
        replace_durably(part, target)
    finally:
        with suppress(OSError):
            part.unlink()


def replace_durably(part: Path, target: Path) -> None:
    """Renames a whole file of the same file system to `target`. Raises: OSError."""
    handle = os.open(part, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    part.replace(target)
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Waits until the disk knows the folder's names. Raises: OSError if there is no such folder."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:  # some network file systems cannot sync a folder; that loses little
        log.debug("cannot sync %s: %s", folder.name, error.strerror)
    finally:
        os.close(handle)
