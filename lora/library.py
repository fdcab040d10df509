"""From a reference to a parsed adapter, by way of the cache; what was parsed lately is kept warm."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass

from lora.cache import CacheEntry, Progress, VolumeCache
from lora.errors import LoraError
from lora.files import LoraFile, load
from lora.keys import KeyMap
from lora.sources import Reference

WARM_FILES = 8
"""How many parsed files are kept; a rank 32 SDXL adapter takes about 200 MB of memory."""


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

    def __init__(self, cache: VolumeCache, key_map: KeyMap) -> None:
        self.cache = cache
        self._key_map = key_map
        self._warm: OrderedDict[str, LoraFile] = OrderedDict()
        self._guard = threading.Lock()

    def load(self, reference: Reference, progress: Progress | None = None) -> Loaded:
        """The adapter that a reference means, from the cache or from where it comes.

        Raises: LoraError, whose sentence names the reference.
        """
        try:
            begun = time.perf_counter()
            place = self.cache.resolve(reference)
            resolved = time.perf_counter()
            entry = self.cache.get(place, progress)
            fetched = time.perf_counter()
            file = self._parse(entry)
        except LoraError as error:
            if reference.shown in error.sentence:
                raise
            raise type(error)(f"{reference.shown}: {error.sentence}", error.hint) from error
        return Loaded(
            reference=reference,
            entry=entry,
            file=file,
            resolve_seconds=resolved - begun,
            download_seconds=fetched - resolved,
            parse_seconds=time.perf_counter() - fetched,
        )

    def _parse(self, entry: CacheEntry) -> LoraFile:
        """The file's parsed form, by its content: a changed file is never mistaken for the old one."""
        key = entry.record.sha256
        with self._guard:
            if key in self._warm:
                self._warm.move_to_end(key)
                return self._warm[key]
        with self.cache.in_use(entry.path):
            file = load(entry.path, self._key_map, key)
        with self._guard:
            self._warm[key] = file
            while len(self._warm) > WARM_FILES:
                self._warm.popitem(last=False)
        return file
