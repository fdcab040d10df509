"""The base models that jobs name: one is loaded at a time, and another takes its place in its turn."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Generic, Protocol, TypeVar

import torch

log = logging.getLogger("worker")


class Closable(Protocol):
    """A loaded base."""

    def close(self) -> None:
        """Ends all that runs on it, and lets go of its memory, whoever still holds it."""


Kind = TypeVar("Kind", bound=Closable)


class Bases(Generic[Kind]):
    """Lets jobs in by the order in which they came. Those for the base that is loaded run together; one for
    another waits until they have ended, and those behind it wait for it.
    """

    def __init__(self, load: Callable[[str], Kind]) -> None:
        """`load` makes a base of this name; the one before is closed by then."""
        self._load = load
        self._guard = threading.Lock()
        self._waiting: deque[tuple[str, Future[Kind]]] = deque()
        self._inside = 0
        self._loading = False
        self._name = self._first = ""
        self.now: Kind | None = None
        """The base that is loaded; None while one is being loaded, or after that failed."""

    def start(self, name: str) -> None:
        """Loads the first base. Raises: what `load` raises."""
        self.now, self._name, self._first = self._load(name), name, name

    @asynccontextmanager
    async def entered(self, name: str | None) -> AsyncIterator[Kind]:
        """The base of this name, which stays while the block runs; None stands for the one that is loaded.

        Raises: what loading it raises; whoever comes next is served as before.
        """
        place: Future[Kind] = Future()
        with self._guard:
            self._waiting.append((name or self._name, place))
            if name is None and self.now is not None and not self._loading:
                self._waiting.rotate(1)  # it keeps nobody waiting
            self._advance()
        try:
            base = await asyncio.wrap_future(place)
        except BaseException:
            with self._guard:
                if place.done() and not place.cancelled() and place.exception() is None:
                    self._inside -= 1  # it was let in while it gave up
                self._advance()
            raise
        try:
            yield base
        finally:
            del base, place
            with self._guard:
                self._inside -= 1
                self._advance()

    def _advance(self) -> None:
        """Lets in whoever may enter, or begins to load what the first who waits needs. The guard is held."""
        while self._waiting and not self._loading:
            name, place = self._waiting[0]
            if place.cancelled():
                self._waiting.popleft()
            elif self.now is not None and name == self._name:
                self._waiting.popleft()
                if place.set_running_or_notify_cancel():
                    self._inside += 1
                    place.set_result(self.now)
            elif self._inside:
                return
            else:
                self._loading = True
                threading.Thread(
                    target=self._change, args=(name,), name="base", daemon=True
                ).start()

    def _change(self, name: str) -> None:
        if self.now is not None:
            log.info("%s makes room for %s", self._name, name)
            self.now.close()
            self.now = None
            gc.collect()
            torch.cuda.empty_cache()
        made, failed = None, None
        try:
            made = self._load(name)
        except Exception as error:  # noqa: BLE001 - whoever asked for it is told
            failed = error
        with self._guard:
            self._loading, self.now = False, made
            self._name = name if made is not None else self._first
            if failed is not None:
                for _, place in [one for one in self._waiting if one[0] == name]:
                    if place.set_running_or_notify_cancel():
                        place.set_exception(failed)
                self._waiting = deque(one for one in self._waiting if one[0] != name)
            self._advance()
