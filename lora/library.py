"""From a reference to a parsed adapter, by way of the cache; what was parsed lately is kept warm."""

from __future__ import annotations

import hashlib
import threading
import time
from dataclasses import dataclass, replace

from lora.cache import CacheEntry, Progress, VolumeCache
from lora.embeddings import TokenEmbedding, word_of
from lora.errors import LoraCorrupt, LoraError
from lora.files import LoraFile, load
from lora.keys import KeyMap
from lora.lru import ByteLru
from lora.sources import Reference

WARM_BYTES = 2_000_000_000
"""How many bytes of parsed files are kept."""

PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""A folder that PEFT saved: the tensors, and beside them the numbers that scale them."""

CONFIG_BYTES = 10_000_000


@dataclass(frozen=True)
class Loaded:
    """A reference, found and parsed."""

    reference: Reference
    entry: CacheEntry
    file: LoraFile
    resolve_seconds: float
    download_seconds: float
    parse_seconds: float

    @property
    def warnings(self) -> tuple[str, ...]:
        """What may be otherwise than the adapter's maker meant it."""
        remote = self.entry.record.fetched is not None
        if remote and self.entry.record.source.endswith(PEFT_FILE) and not self.file.scaled:
            return (
                f"{self.entry.name}: its {PEFT_CONFIG} is not fetched, so alpha counts as the rank",
            )
        return ()

    @property
    def embeddings(self) -> tuple[TokenEmbedding, ...]:
        """The file's new words; one that has no name of its own has the file's."""
        word = word_of(self.entry.path.stem)
        return tuple(replace(one, word=one.word or word) for one in self.file.embeddings)


class LoraLibrary:
    """Finds, fetches and parses adapters for one pipeline. Changes no weight."""

    def __init__(self, cache: VolumeCache, key_map: KeyMap, warm_bytes: int = WARM_BYTES) -> None:
        self.cache = cache
        self._key_map = key_map
        self._warm: ByteLru[LoraFile] = ByteLru(warm_bytes)
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
        record, config = entry.record, _config(entry)
        key = record.sha256, hashlib.sha256((config or "").encode()).hexdigest()
        with self._guard:
            warm = self._warm.get(key)
        if warm is not None:
            return warm
        try:
            with self.cache.in_use(entry.path):
                file = load(
                    entry.path, self._key_map, record.sha256, config=config, mapped=entry.mappable
                )
                stat = entry.path.stat()
        except FileNotFoundError:
            raise
        except OSError as error:
            raise LoraCorrupt(f"the file cannot be read ({error.strerror})") from error
        if (stat.st_size, stat.st_mtime_ns) != (record.size, record.mtime_ns):
            raise FileNotFoundError(entry.path)
        with self._guard:
            self._warm.put(key, file, record.size)
        return file

    def free(self) -> None:
        """Forgets what is kept warm."""
        with self._guard:
            self._warm.clear()


def _config(entry: CacheEntry) -> str | None:
    """The text of the PEFT config beside a PEFT adapter. Raises: LoraCorrupt if it cannot be read."""
    path = entry.path.with_name(PEFT_CONFIG)
    if entry.path.name != PEFT_FILE or not path.is_file():
        return None
    try:
        if path.stat().st_size > CONFIG_BYTES:
            raise LoraCorrupt(f"{PEFT_CONFIG} is no adapter's config")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LoraCorrupt(f"{PEFT_CONFIG} cannot be read") from error
