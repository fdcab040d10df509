"""Worker processes for the tests of the shared cache: real ones, which can be killed.

`python -m tests.lora.workers HANDLE [MODULE ...]` imports the cache and the modules once, and forks a process
for each job that it is told. So a hundred of them cost little, and none is a fork of the test run, which has
threads.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from lora.fetch.sources import Reference
from lora.volume.cache import CacheEntry, Limits, Resolved, VolumeCache
from lora.volume.lease import Lease
from tests.server import LOOPBACK
from tests.waiting import PATIENCE

ROOT = Path(__file__).resolve().parent.parent.parent

FILE_OPERATIONS = frozenset(
    ("open", "os.rename", "os.remove", "os.mkdir", "os.link", "os.utime", "os.listdir")
)
"""Python's names (its audit events) for what a process does with files."""

Tell = Callable[..., None]


def adapter(size: int, seed: object) -> bytes:
    """A .safetensors file with so many random bytes in it."""
    about = {"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    header = json.dumps(about).encode()
    return len(header).to_bytes(8, "little") + header + random.Random(str(seed)).randbytes(size)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class Job:
    """What a worker process does with a cache folder and a URL."""

    what: str
    """`fetch`: gets the file once in each thread. `read`: gets it time and again. `watch`: reads whatever
    lies in the folder time and again, without the cache. The last two go on until they are killed. `tool`:
    runs the command line `lora` with the `arguments`."""
    folder: str
    url: str = ""
    lease: float = PATIENCE
    threads: int = 1
    refresh: bool = False
    useless_lease: bool = False
    """Everybody gets the lease."""
    die_before: int | None = None
    """The number of the file operation in the folder before which it kills itself."""
    arguments: tuple[str, ...] = ()


class UselessLease(Lease):
    """The lease of a file system that gives it to everybody."""

    def take(self) -> bool:
        return True


# --- in the worker process ---------------------------------------------------------------------------


def _fetch(job: Job, tell: Tell) -> None:
    cache, place = _open(job)
    tell(asks=time.monotonic())

    def one() -> None:
        entry, actual = given(cache, place)
        tell(
            bytes=actual,
            record=entry.record.sha256,
            downloaded=entry.downloaded,
            warnings=entry.warnings,
            at=time.monotonic(),
        )

    threads = [threading.Thread(target=one) for _ in range(job.threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _read(job: Job, tell: Tell) -> None:
    cache, place = _open(job)
    known: set[tuple[str, str]] = set()
    while True:
        entry, actual = given(cache, place)
        if (actual, entry.record.sha256) not in known:
            known.add((actual, entry.record.sha256))
            tell(bytes=actual, record=entry.record.sha256)
        time.sleep(0.005)


def _watch(job: Job, tell: Tell) -> None:
    known: set[str] = set()
    tell(asks=time.monotonic())
    while True:
        for path in Path(job.folder).glob("*.safetensors"):
            with suppress(FileNotFoundError):
                seen = sha256(path.read_bytes())
                if seen not in known:
                    known.add(seen)
                    tell(bytes=seen)
        time.sleep(0.005)


def _tool(job: Job, tell: Tell) -> None:
    from lora.__main__ import main

    tell(asks=time.monotonic())
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        code = main(job.arguments)
    tell(code=code, said=said.getvalue())


JOBS = {"fetch": _fetch, "read": _read, "watch": _watch, "tool": _tool}


def _open(job: Job) -> tuple[VolumeCache, Resolved]:
    limits = Limits(timeout=PATIENCE, tries=3, pause=0.05, lease=job.lease)
    lease = UselessLease if job.useless_lease else Lease
    cache = VolumeCache(Path(job.folder), limits, LOOPBACK, lease=lease)
    return cache, cache.resolve(Reference(job.url, refresh=job.refresh))


def given(cache: VolumeCache, place: Resolved) -> tuple[CacheEntry, str]:
    """An entry, and the hash of the bytes that are read by it.

    As the library reads: what is not the record's file any more was replaced, and is asked for again.
    """
    for _ in range(50):
        entry = cache.get(place)
        with suppress(FileNotFoundError):
            with entry.path.open("rb") as stream:
                actual = hashlib.file_digest(stream, "sha256").hexdigest()
            stat = entry.path.stat()
            if (stat.st_size, stat.st_mtime_ns) == (entry.record.size, entry.record.mtime_ns):
                return entry, actual
        place = place._replace(refresh=False)
    raise TimeoutError("the file was replaced 50 times while it was read")


def _die_before(number: int, folder: str) -> None:
    """Kills this process before its file operation of that number in the folder."""
    numbers = itertools.count(1)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        here = event in FILE_OPERATIONS and any(str(one).startswith(folder) for one in arguments)
        if here and next(numbers) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _work(job: Job, pipe: int) -> NoReturn:
    """Does the job; what it tells are lines of JSON, each written at once."""

    def tell(**news: Any) -> None:
        os.write(pipe, json.dumps(news).encode() + b"\n")

    tell(pid=os.getpid())
    signal.alarm(int(2 * PATIENCE))  # a guard: it never hangs for ever
    if job.die_before:
        _die_before(job.die_before, job.folder)
    threading.excepthook = lambda about: tell(error=repr(about.exc_value))
    try:
        JOBS[job.what](job, tell)
    except Exception:  # noqa: BLE001 - whatever it is, the test is to see it
        tell(error=traceback.format_exc())
    os._exit(0)


def serve(control: socket.socket) -> None:
    """Forks a process for each job that comes in, until the other end hangs up."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them: the kernel buries them
    while True:
        message, pipes, _, _ = socket.recv_fds(control, 1 << 16, 1)
        if not message:
            return
        if os.fork() == 0:
            control.close()
            _work(Job(**json.loads(message)), pipes[0])
        os.close(pipes[0])


# --- in the test -------------------------------------------------------------------------------------


class WorkerProcess:
    """A process that does a job, and what it tells."""

    def __init__(self, pipe: int) -> None:
        self._stream = os.fdopen(pipe, "r")
        self.pid = int(self.until("pid")["pid"])
        self._handle: int | None = None
        with suppress(ProcessLookupError):  # it is dead already
            self._handle = os.pidfd_open(self.pid)

    def until(self, key: str) -> dict[str, Any]:
        """What it tells next with that key. Raises: EOFError if it ends without it."""
        for news in self._news():
            if key in news:
                return news
        raise EOFError(f"the process ended before it told {key}")

    def rest(self) -> list[dict[str, Any]]:
        """Waits for its end; all that it tells until then."""
        with self._stream:
            news = list(self._news())
        if self._handle is not None:
            select.select([self._handle], [], [])  # its pipe closes before it is gone
            os.close(self._handle)
            self._handle = None
        return news

    def send(self, sign: signal.Signals) -> None:
        """Signals it, and no other that has its number since it died."""
        if self._handle is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._handle, sign)

    def end(self) -> list[dict[str, Any]]:
        """Kills it; all that it told."""
        self.send(signal.SIGKILL)
        return self.rest()

    def close(self) -> None:
        if not self._stream.closed:
            self.end()

    def _news(self) -> Iterator[dict[str, Any]]:
        for line in self._stream:
            yield json.loads(line)


class Workers:
    """Starts worker processes; those that still run in the end are killed."""

    def __init__(self, *modules: str) -> None:
        """`modules`: what they have imported."""
        self._modules = modules

    def __enter__(self) -> Workers:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            handle = theirs.fileno()
            command = [sys.executable, "-m", "tests.lora.workers", str(handle), *self._modules]
            self._server = subprocess.Popen(command, cwd=ROOT, pass_fds=[handle])
        self._started: list[WorkerProcess] = []
        return self

    def start(self, job: Job) -> WorkerProcess:
        ours, theirs = os.pipe()
        socket.send_fds(self._control, [json.dumps(asdict(job)).encode()], [theirs])
        os.close(theirs)
        worker = WorkerProcess(ours)
        self._started.append(worker)
        return worker

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for worker in self._started:
            worker.close()
        self._control.close()
        self._server.wait()


if __name__ == "__main__":
    for name in sys.argv[2:]:
        import_module(name)
    serve(socket.socket(fileno=int(sys.argv[1])))
