"""A file with which one of many workers that share a folder shows that it does a job, and that it is alive.

A lease only saves bandwidth. If two workers hold it, which happens on a file system without exclusive
creation, both download the same file and each publishes a whole one.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from lora.durable import is_gone, part_file, process_name

log = logging.getLogger(__name__)

BEATS = 5
"""Signs of life within the silence that counts as death."""

Made = TypeVar("Made")


@dataclass
class Lease:
    """The right to download or change one file, while the `with` block runs."""

    path: Path
    silence: float
    """Seconds without a sign of life after which others take the lease over."""
    _name: str = field(default="", init=False)
    _stop: threading.Event = field(default_factory=threading.Event, init=False)

    def wait(
        self, look: Callable[[], Made | None], deadline: float, poll: float, too_late: Exception
    ) -> Made | None:
        """Waits until the lease is ours (None), or until `look` returns what its owner was to make.

        A dead owner's lease is taken over. If it cannot be removed, nobody can have it, and no waiter waits
        on. `poll`: seconds between two tries. Raises: `too_late` after `deadline`, by time.monotonic().
        """
        watch = LeaseWatch(self.path, self.silence)
        while not self.take():
            if result := look():
                return result
            if watch.is_dead():
                if not watch.remove():
                    break
            elif time.monotonic() > deadline:
                raise too_late
            else:
                time.sleep(poll)
        return None

    def take(self) -> bool:
        """Whether the lease is ours now. Also True if the folder allows none: then nobody can have it."""
        try:
            owner = process_name()
        except OSError:
            owner = socket.gethostname()
        self._name = f"{owner} {uuid.uuid4().hex}"
        try:
            handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        except FileExistsError:
            return False
        except OSError as error:
            log.info("no lease for %s: %s", self.path.name, error.strerror)
            return True
        try:
            with os.fdopen(handle, "w") as stream:
                stream.write(f"{self._name} 0\n")
        except OSError as error:  # a full volume holds the name, but not the text
            log.info("no lease for %s: %s", self.path.name, error.strerror)
            with suppress(OSError):
                self.path.unlink()
        return True

    def __enter__(self) -> Lease:
        threading.Thread(target=self._beat, name="lease", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        with suppress(OSError):
            if self._is_ours():
                self.path.unlink()

    def _is_ours(self) -> bool:
        return self.path.read_text().startswith(f"{self._name} ")

    def _beat(self) -> None:
        """Writes a growing number: network file systems show the file's time late."""
        number = 0
        while not self._stop.wait(self.silence / BEATS):
            number += 1
            with suppress(OSError):
                if not self._is_ours():
                    return  # taken over: our job goes on, and both publish
                with self.path.open("r+") as stream:
                    stream.write(f"{self._name} {number}\n")


class LeaseWatch:
    """Watches a lease that another worker holds, and notices when that worker is dead."""

    def __init__(self, path: Path, silence: float) -> None:
        self._path, self._silence = path, silence
        self._seen: str | None = None
        self._since = time.monotonic()

    def is_dead(self) -> bool:
        """Whether its owner is gone, or silent for too long by our own clock. False if there is no lease."""
        try:
            text = self._path.read_text()
        except OSError:
            self._seen = None
            return False
        if text != self._seen:
            self._seen, self._since = text, time.monotonic()
        return (
            is_gone(text.split(" ", maxsplit=1)[0])
            or time.monotonic() - self._since > self._silence
        )

    def remove(self) -> bool:
        """Removes the lease that `is_dead` saw, and no other: another waiter may have been faster.

        False if the folder does not allow it: then waiting is in vain.
        """
        with part_file(self._path.parent, self._path.name) as taken:
            try:
                if self._path.read_text() != self._seen:
                    return True
                self._path.rename(taken)
            except FileNotFoundError:
                return True
            except OSError as error:
                log.info("%s stays: %s", self._path.name, error.strerror)
                return False
            with suppress(OSError):
                if taken.read_text() != self._seen:
                    os.link(taken, self._path)  # it is alive: put back, unless there is a newer one
        return True
