"""From a reference to a parsed adapter, through the cache; files parsed lately are kept in memory."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from lora.errors import DownloadFailed, LoraCorrupt, LoraError, naming
from lora.fetch.sources import Reference, RemoteFile
from lora.fetch.transfers import Report, Transfers
from lora.formats.adapter import LoraFile, load
from lora.formats.embeddings import TokenEmbedding, word_of
from lora.formats.endings import SAFETENSORS
from lora.formats.names.keys import KeyMap
from lora.formats.peft import PEFT_CONFIG, PEFT_STEM, config_beside, template_beside
from lora.lru import ByteLru
from lora.volume.cache import CacheEntry, OnBytes, Resolved, VolumeCache

WARM_BYTES = 2_000_000_000
"""How many bytes of parsed files are kept."""

AT_ONCE = 4
"""How many LoRAs of one job are fetched at the same time."""


@dataclass(frozen=True)
class Loaded:
    """A reference with its parsed file."""

    reference: Reference
    entry: CacheEntry
    file: LoraFile
    resolve_seconds: float
    download_seconds: float
    parse_seconds: float

    @property
    def warnings(self) -> tuple[str, ...]:
        """What may differ from what the adapter's maker or the request meant."""
        own = self.entry.warnings
        if self.entry.record.source.endswith(PEFT_STEM + SAFETENSORS) and not self.file.scaled:
            return (*own, f"{self.entry.name} has no {PEFT_CONFIG}, so alpha counts as the rank")
        return own

    @property
    def template(self) -> str | None:
        """The chat template that the adapter brings; None if it has none. Raises: LoraCorrupt."""
        return self.entry.record.template or template_beside(self.entry.path)

    @property
    def embeddings(self) -> tuple[TokenEmbedding, ...]:
        """The file's new words; one without a name of its own gets the file's."""
        word = word_of(self.entry.path.stem)
        return tuple(replace(new, word=new.word or word) for new in self.file.embeddings)


class LoraLibrary:
    """Finds, fetches and parses adapters for one pipeline. Changes no weight."""

    def __init__(self, cache: VolumeCache, key_map: KeyMap, warm_bytes: int = WARM_BYTES) -> None:
        self.cache = cache
        self._key_map = key_map
        self._warm: ByteLru[LoraFile] = ByteLru(warm_bytes)
        self._guard = threading.Lock()

    def load(self, reference: Reference, on_bytes: OnBytes | None = None) -> Loaded:
        """The adapter of a reference, from the cache or its source. Raises: LoraError that names it."""
        with naming(reference.shown):
            return self._load(reference, self._resolve(reference), on_bytes)

    def load_all(
        self, references: Sequence[Reference], report: Report | None = None
    ) -> list[Loaded]:
        """The adapters of a job, fetched at the same time. `report` gets the progress of all of them.

        Nothing is downloaded until every reference is resolved. Raises: LoraError, with the faults of all.
        """
        transfers = Transfers(report or (lambda transfer: None))
        if len(references) == 1:  # without threads, which would take half a millisecond
            return [self.load(references[0], transfers.of(0))]
        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="lora") as pool:

            def each(work: Callable[..., Result], *columns: Sequence[Any]) -> list[Result]:
                futures = [pool.submit(_named, work, *row) for row in zip(*columns, strict=True)]
                return _results(futures)

            resolved = each(self._resolve, references)
            listeners = [transfers.of(number) for number in range(len(references))]
            return each(self._load, references, resolved, listeners)

    def _resolve(self, reference: Reference) -> tuple[Resolved, float]:
        """Where the file is, and how many seconds it took to find out."""
        begun = time.perf_counter()
        return self.cache.resolve(reference), time.perf_counter() - begun

    def _load(
        self, reference: Reference, timed: tuple[Resolved, float], on_bytes: OnBytes | None
    ) -> Loaded:
        resolved, seconds = timed
        begun = time.perf_counter()
        entry = self.cache.get(resolved, on_bytes)
        fetched = time.perf_counter()
        try:
            file = self._parse(entry)
        except (FileNotFoundError, LoraCorrupt) as error:
            entry = self._get_again(resolved, entry, error, on_bytes)
            fetched = time.perf_counter()
            try:
                file = self._parse(entry)
            except FileNotFoundError as again:
                sentence = f"{entry.name} was removed by another worker, twice"
                raise DownloadFailed(sentence, "Try again later.") from again
        return Loaded(
            reference=reference,
            entry=entry,
            file=file,
            resolve_seconds=seconds,
            download_seconds=fetched - begun,
            parse_seconds=time.perf_counter() - fetched,
        )

    def _get_again(
        self, resolved: Resolved, entry: CacheEntry, error: Exception, on_bytes: OnBytes | None
    ) -> CacheEntry:
        """The file once more, if the one that could not be read is gone, or was damaged on the volume.

        Raises: `error` if fetching again would bring the same bytes.
        """
        resolved = resolved._replace(refresh=False)
        if not isinstance(error, LoraCorrupt):
            return self.cache.get(resolved, on_bytes)
        shelf, is_remote = self.cache.shelf, isinstance(resolved.location, RemoteFile)
        if not is_remote or entry.downloaded or not shelf.is_damaged(entry):
            raise error
        shelf.set_aside(entry.path)
        warning = f"{entry.name} was damaged on the volume; it was fetched again"
        return self.cache.get(resolved, on_bytes).warned(warning)

    def _parse(self, entry: CacheEntry) -> LoraFile:
        """The file's parsed form, kept by its content: a changed file is never mistaken for the old one.

        Raises: LoraError; FileNotFoundError if the file no longer fits its record.
        """
        record = entry.record
        config = config_beside(entry.path) if record.config is None else record.config
        key = record.sha256, config
        with self._guard:
            if file := self._warm.get(key):
                return file
        try:
            with self.cache.in_use(entry.path):
                file = load(
                    entry.path, self._key_map, record.sha256, config=config, mapped=entry.mappable
                )
                status = entry.path.stat()
        except OSError as error:
            # ESTALE: a network file system says that the file is gone.
            if isinstance(error, FileNotFoundError) or error.errno == errno.ESTALE:
                raise FileNotFoundError(entry.path) from error
            raise LoraCorrupt(f"the file cannot be read ({error.strerror})") from error
        if not record.at(status):
            raise FileNotFoundError(entry.path)
        with self._guard:
            self._warm.put(key, file, record.size)
        return file

    def free(self) -> None:
        """Forgets the files that are kept in memory."""
        with self._guard:
            self._warm.clear()


Result = TypeVar("Result")


def _named(work: Callable[..., Result], reference: Reference, *more: Any) -> Result:
    with naming(reference.shown):
        return work(reference, *more)


def _results(futures: Sequence[Future[Result]]) -> list[Result]:
    """All results. Raises: the first error; if all are LoraErrors, its sentence has those of the others."""
    errors = {str(error): error for future in futures if (error := future.exception())}
    coded = [error for error in errors.values() if isinstance(error, LoraError)]
    if len(coded) < 2 or len(coded) < len(errors):
        return [future.result() for future in futures]
    first = coded[0]
    raise type(first)("; ".join(error.sentence for error in coded), first.hint) from first
