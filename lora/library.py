"""From a reference to a parsed adapter, by way of the cache; what was parsed lately is kept warm."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass

from lora.cache import CacheEntry, Progress, VolumeCache
from lora.errors import LoraCorrupt, LoraError
from lora.files import LoraFile, load
from lora.keys import KeyMap
from lora.sources import Reference

WARM_BYTES = 2 << 30
"""How many bytes of parsed files are kept; the last one always is."""


@dataclass(frozen=True)
class Loaded:
    """A reference, found and parsed."""

    reference: Reference
    entry: CacheEntry
    file: LoraFile
    resolve_seconds: float
    download_seconds: float
    parse_seconds: float


class LoraLibrary:
    """Finds, fetches and parses adapters for one pipeline. Changes no weight."""

    def __init__(self, cache: VolumeCache, key_map: KeyMap, warm_bytes: int = WARM_BYTES) -> None:
        self.cache = cache
        self._key_map = key_map
        self._warm_bytes = warm_bytes
        self._warm: OrderedDict[str, tuple[LoraFile, int]] = OrderedDict()
        self._guard = threading.Lock()

    def load(self, reference: Reference, progress: Progress | None = None) -> Loaded:
        """The adapter that a reference means, from the cache or from where it comes.

        Raises: LoraError, whose sentence names the reference.
        """
        try:
            return self._load(reference, progress)
        except LoraError as error:
            if reference.shown in error.sentence:
                raise
            raise type(error)(f"{reference.shown}: {error.sentence}", error.hint) from error

    def _load(self, reference: Reference, progress: Progress | None) -> Loaded:
        begun = time.perf_counter()
        place = self.cache.resolve(reference)
        resolved = time.perf_counter()
        entry = self.cache.get(place, progress)
        fetched = time.perf_counter()
        try:
            file = self._parse(entry)
        except FileNotFoundError:  # another worker evicted or replaced it since: once more
            entry = self.cache.get(place, progress)
            fetched = time.perf_counter()
            file = self._parse(entry)
        return Loaded(
            reference=reference,
            entry=entry,
            file=file,
            resolve_seconds=resolved - begun,
            download_seconds=fetched - resolved,
            parse_seconds=time.perf_counter() - fetched,
        )

    def _parse(self, entry: CacheEntry) -> LoraFile:
        """The file's parsed form, by its content: a changed file is never mistaken for the old one.

        Raises: LoraError; FileNotFoundError if the file is not the one of the record any more.
        """
        record = entry.record
        with self._guard:
            if record.sha256 in self._warm:
                self._warm.move_to_end(record.sha256)
                return self._warm[record.sha256][0]
        try:
            with self.cache.in_use(entry.path):
                file = load(entry.path, self._key_map, record.sha256)
                stat = entry.path.stat()
        except FileNotFoundError:
            raise
        except OSError as error:
            raise LoraCorrupt(f"the file cannot be read ({error.strerror})") from error
        if (stat.st_size, stat.st_mtime_ns) != (record.size, record.mtime_ns):
            raise FileNotFoundError(entry.path)
        self._keep_warm(record.sha256, file, record.size)
        return file

    def _keep_warm(self, sha256: str, file: LoraFile, size: int) -> None:
        with self._guard:
            self._warm[sha256] = file, size
            while len(self._warm) > 1 and sum(s for _, s in self._warm.values()) > self._warm_bytes:
                self._warm.popitem(last=False)
