"""Making a file appear under its name whole, at once, and so that a loss of power does not take it."""

from __future__ import annotations

import logging
import os
from pathlib import Path

log = logging.getLogger(__name__)


def replace_durably(part: Path, target: Path) -> None:
    """Renames a whole file of the same file system to `target`. Raises: OSError."""
    handle = os.open(part, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    part.replace(target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:  # some network file systems cannot sync a folder; that loses little
        log.debug("cannot sync %s: %s", target.parent.name, error.strerror)
    finally:
        os.close(folder)
