"""Who downloads, where many workers share a folder: a file that one of them makes and keeps alive.

It only saves bandwidth. Two workers that both believe to hold it download the same file twice, and each
publishes a whole one; on a file system that lies about exclusive creation, nothing else happens.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

log = logging.getLogger(__name__)

BEATS = 5
"""Signs of life within the time after which silence counts as death."""


def process_name(pid: int | str = "self") -> str:
    """What no other process that is or was has: this machine's boot, the pid's namespace, pid and start time.

    Raises: FileNotFoundError or ProcessLookupError if there is no such process, or it is dead and its parent
    did not take note yet; OSError if it may not be looked at, or there is no /proc.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    space = Path(f"/proc/{pid}/ns/pid").readlink()
    number, _, rest = Path(f"/proc/{pid}/stat").read_text().partition(" ")
    # man proc_pid_stat: field 3 is the state, 22 the start in ticks since boot
    state, *others = rest.rpartition(")")[2].split()
    if state in ("Z", "X"):
        raise ProcessLookupError
    return f"{boot}/{space}/{number}/{others[18]}"


@dataclass
class Lease:
    """The right to download one file, while the `with` block runs."""

    path: Path
    silence: float
    """Seconds without a sign of life after which others take it over."""
    _name: str = field(default="", init=False)
    _stop: threading.Event = field(default_factory=threading.Event, init=False)

    def take(self) -> bool:
        """Whether it is ours now. True, too, where the folder takes no lease: then nobody can have one."""
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
        except OSError as error:  # a full volume takes the name and not the text
            log.info("no lease for %s: %s", self.path.name, error.strerror)
            with suppress(OSError):
                self.path.unlink()
        return True

    def __enter__(self) -> Lease:
        threading.Thread(target=self._beat, name="lease", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        with suppress(OSError):
            if self._is_ours():
                self.path.unlink()

    def _is_ours(self) -> bool:
        return self.path.read_text().startswith(f"{self._name} ")

    def _beat(self) -> None:
        """Writes a number that grows. Not the file's time: network file systems show it late."""
        number = 0
        while not self._stop.wait(self.silence / BEATS):
            number += 1
            with suppress(OSError):
                if not self._is_ours():
                    return  # taken over: we go on, and publish as well
                with self.path.open("r+") as stream:
                    stream.write(f"{self._name} {number}\n")


class Watch:
    """Looks at another's lease, and tells when it is dead."""

    def __init__(self, path: Path, silence: float) -> None:
        self._path, self._silence = path, silence
        self._seen: str | None = None
        self._since = time.monotonic()

    def is_dead(self) -> bool:
        """Whether its owner is gone, or silent for too long by our own clock. False if there is none."""
        try:
            text = self._path.read_text()
        except OSError:
            self._seen = None
            return False
        if text != self._seen:
            self._seen, self._since = text, time.monotonic()
        return _owner_is_gone(text) or time.monotonic() - self._since > self._silence

    def remove(self) -> bool:
        """Removes the lease that was last seen, and no other: another waiter may have been faster.

        False if the folder does not let it go: then waiting is in vain.
        """
        taken = self._path.with_name(f"{self._path.name}.{uuid.uuid4().hex}.part")
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
                with suppress(OSError):
                    os.link(taken, self._path)  # a living one: put back, unless there is a newer
            taken.unlink()
        return True


def _owner_is_gone(text: str) -> bool:
    """Whether the owner was a process of this machine, and is no more."""
    owner = text.split(" ", maxsplit=1)[0]
    try:
        here = process_name().split("/")
        boot, space, pid, _ = owner.split("/")
        number = int(pid)
    except (OSError, ValueError):  # there is no /proc here, or was none there
        return False
    if [boot, space] != here[:2]:
        return False
    try:
        return process_name(number) != owner
    except (FileNotFoundError, ProcessLookupError):
        return True
    except OSError:
        return False
