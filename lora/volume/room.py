"""Room on the volume: which files are removed so that a new one fits."""

from __future__ import annotations

import logging
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lora.errors import CacheFull
from lora.volume.adapters import StoredAdapter, adapters_in, delete
from lora.volume.records import Record, read_as, record_path

log = logging.getLogger(__name__)

RESERVE = 1 << 20
"""Bytes that are left free on the volume for records and other small files."""


class Room:
    """The budget of a cache in bytes, and the files that this worker is using."""

    def __init__(self, budget: int | None) -> None:
        self._budget = budget
        self._guard = threading.Lock()
        self._in_use: Counter[Path] = Counter()

    @contextmanager
    def in_use(self, path: Path) -> Iterator[None]:
        """Keeps a file from being evicted by this worker while the block runs."""
        with self._guard:
            self._in_use[path] += 1
        try:
            yield
        finally:
            with self._guard:
                self._in_use[path] -= 1
                self._in_use = +self._in_use  # without zeros

    def make(self, root: Path, size: int, to_write: int, instead_of: Path | None = None) -> None:
        """Removes the least recently used files until a new one of `size` bytes fits the budget, and the
        `to_write` bytes of it that are not on the disk yet fit the disk.

        Only downloaded files are removed. An operator's, pinned ones and those in use stay. So does
        `instead_of`: the new file will replace it, so it does not count.
        Raises: CacheFull, saying by how much it does not fit; then nothing was removed. OSError.
        """
        lacking = to_write + RESERVE - shutil.disk_usage(root).free
        if lacking <= 0 and self._budget is None:
            return  # the usual case, without reading thousands of records
        adapters = {path: item for path, item in _by_last_use(root) if path != instead_of}
        files = [(path, adapter.version.size) for path, adapter in adapters.items()]
        keep = {path for path, adapter in adapters.items() if adapter.pinned}
        with self._guard:
            keep.update(self._in_use)
        chosen: list[Path] = []
        if self._budget is not None:
            over = sum(size for _, size in files) + size - self._budget
            chosen = files_to_evict(files, over, keep, "its budget", "Raise LORA_CACHE_MAX_GB")
        if lacking > 0:
            remedy = "Make the volume larger"
            more = files_to_evict(files, lacking, keep, "room on the volume", remedy)
            chosen = max(chosen, more, key=len)  # both start with the oldest: one has the other
        for path in chosen:
            log.info("evicting %s", path.name)
            delete(adapters[path])


def files_to_evict(
    files: list[tuple[Path, int]], excess: int, keep: set[Path], lacking: str, remedy: str
) -> list[Path]:
    """Which of these (path, bytes; oldest use first) must go so that `excess` bytes become free.

    Raises: CacheFull, saying by how much removing all but `keep` does not suffice.
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
            f"the LoRA cache lacks {excess / 1e6:.1f} MB of {lacking}", f"{remedy} or remove files."
        )
    return chosen


def _by_last_use(root: Path) -> list[tuple[Path, StoredAdapter]]:
    """The downloaded files with their adapters, the one used longest ago first.

    Files without a record of their download are an operator's: they are neither counted nor removed.
    """
    used = []
    for adapter in adapters_in(root):
        path = root / str(adapter.weights)
        record = read_as(Record, record_path(path)) if adapter.weights else None
        if record and record.fetched is not None and path.exists():
            with suppress(OSError):  # evicted just now
                used.append((record_path(path).stat().st_mtime, path, adapter))
    return [(path, adapter) for _, path, adapter in sorted(used)]
