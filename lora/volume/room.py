"""Room on the volume: what may go so that something new fits."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from lora.errors import CacheFull
from lora.formats.endings import EXTENSIONS
from lora.volume.records import INCOMING, Record, pin_path, read_as, record_path

log = logging.getLogger(__name__)

RESERVE = 1 << 20
"""Bytes that are left free on the volume for records and whatever else is written there."""

DAMAGED = ".damaged"
"""The folder of files that were found changed on the volume."""


def adapter_files(root: Path) -> list[Path]:
    """Every adapter file in the cache, in the order of their names."""
    found = [p for ext in EXTENSIONS for p in root.rglob(f"*{ext}") if p.is_file()]
    return sorted(p for p in found if not {INCOMING, DAMAGED} & set(p.relative_to(root).parts))


def make_room(
    root: Path,
    size: int,
    to_write: int,
    budget: int | None,
    keep: Iterable[Path],
    instead_of: Path | None = None,
) -> None:
    """Removes the files used least recently until another of `size` bytes fits the budget, and the disk
    what of it is still `to_write`.

    Only what was downloaded goes; what an operator put there, what is pinned and `keep` stay. So does
    `instead_of`, which the new file will replace, and it does not count.
    Raises: CacheFull, saying by how much it does not fit; then nothing was removed. OSError.
    """
    lacking = to_write + RESERVE - shutil.disk_usage(root).free
    if lacking <= 0 and budget is None:
        return  # the usual case, without a look at thousands of records
    files = [(path, bytes_) for path, bytes_ in _by_last_use(root) if path != instead_of]
    kept = {*keep, *(path for path, _ in files if pin_path(path).exists())}
    if budget is not None:
        over = sum(size for _, size in files) + size - budget
        chosen = files_to_evict(files, over, kept, "its budget", "Raise LORA_CACHE_MAX_GB")
    else:
        chosen = []
    if lacking > 0:
        more = files_to_evict(files, lacking, kept, "room on the volume", "Make the volume larger")
        chosen = max(chosen, more, key=len)  # both are the oldest ones: one holds the other
    for path in chosen:
        log.info("evicting %s", path.name)
        path.unlink(missing_ok=True)
        record_path(path).unlink(missing_ok=True)


def files_to_evict(
    files: list[tuple[Path, int]], excess: int, keep: set[Path], what: str, remedy: str
) -> list[Path]:
    """Which of these (path, bytes; oldest use first) must go so that `excess` bytes become free.

    Raises: CacheFull if even without all that may go, it does not suffice; it says by how much.
    """
    chosen = []
    for path, size in files:
        if excess <= 0:
            break
        if path not in keep:
            chosen.append(path)
            excess -= size
    if excess > 0:
        raise CacheFull(
            f"the LoRA cache lacks {excess / 1e6:.1f} MB of {what}", f"{remedy} or remove files."
        )
    return chosen


def _by_last_use(root: Path) -> list[tuple[Path, int]]:
    """(file, bytes) of what was downloaded, the one used longest ago first.

    Files without a record of their download are an operator's: they are neither counted nor removed.
    """
    used = []
    for path in adapter_files(root):
        record = read_as(Record, record_path(path))
        if record and record.fetched is not None:
            with suppress(OSError):  # evicted just now
                used.append((record_path(path).stat().st_mtime, path, path.stat().st_size))
    return [(path, size) for _, path, size in sorted(used)]
