"""Threads of one worker that want the same file at once share one download."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from lora.errors import DownloadFailed
from lora.fetch.download import Progress
from lora.volume.shelf import CacheEntry


@dataclass
class _Running:
    """A fetch that several threads wait for."""

    future: Future[CacheEntry] = field(default_factory=Future)
    listeners: list[Progress] = field(default_factory=list)

    def on_bytes(self, done: int, total: int | None) -> None:
        for listener in self.listeners:
            listener(done, total)


class SharedFetches:
    """The fetches that run in this worker now, by what they fetch."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._running: dict[Hashable, _Running] = {}

    def run(
        self,
        key: Hashable,
        shown: str,
        fetch: Callable[[Progress], CacheEntry],
        on_bytes: Progress | None,
    ) -> CacheEntry:
        """The result of `fetch`, or of another thread's that began with the same key and still runs.

        Raises what that fetch raises.
        """
        with self._guard:
            ours = key not in self._running
            running = self._running.setdefault(key, _Running())
            if on_bytes:
                running.listeners.append(on_bytes)
        if not ours:
            return replace(running.future.result(), downloaded=False)
        try:
            entry = fetch(running.on_bytes)
        except BaseException as error:
            ended = DownloadFailed(f"{shown}: the download was broken off")
            running.future.set_exception(error if isinstance(error, Exception) else ended)
            raise
        else:
            running.future.set_result(entry)
            return entry
        finally:
            with self._guard:
                del self._running[key]
