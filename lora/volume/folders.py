"""The folders of a cache: which of them can be written, and which adapters lie in them."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from lora.durable import is_orphan, leads_out, part_file
from lora.errors import SourceInvalid
from lora.formats.endings import EXTENSIONS
from lora.formats.peft import STEMS
from lora.volume.adapters import StoredAdapter, adapter_at, adapters_in, is_hidden
from lora.volume.records import DAMAGED, INCOMING

log = logging.getLogger(__name__)

DAMAGED_DAYS = 1.0
"""How long a damaged file is kept to be looked at."""

LOCAL = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "zfs", "tmpfs", "overlay"})
"""File systems whose open files stay readable after a rename or delete. All others count as remote."""

MOUNTS = Path("/proc/self/mountinfo")


class Folders:
    """The volume's folder and, for when that cannot be written, another."""

    behind: Path | None = None
    """A folder whose files are found behind those of `roots`; it is neither written to nor listed."""

    def __init__(self, root: Path, fallback: Path | None, stale_after: float) -> None:
        """`stale_after`: seconds without a write after which an unfinished file is a dead worker's."""
        self.root, self.fallback = root, fallback
        self._stale_after = stale_after
        self._local = {folder: on_local_disk(folder) for folder in self.roots}
        self.trouble: str | None = None
        """Why files go to the fallback, as far as the last writer knew: see `look_again`."""

    @property
    def roots(self) -> tuple[Path, ...]:
        """The folders to look for files in, in this order."""
        return (self.root, self.fallback) if self.fallback else (self.root,)

    def prepare(self) -> Path:
        """The volume or, with a warning, the fallback if that fails. Raises: OSError if both fail."""
        if root := next(self.writable(), None):
            return root
        raise OSError(errno.EROFS, "neither the volume nor this container's disk can be written")

    def look_again(self) -> str | None:
        """Why files go to the fallback, if they still do."""
        if self.trouble:
            next(self.writable(), None)
        return self.trouble

    def writable(self) -> Iterator[Path]:
        """The folders that can be written, the volume first, without the leftovers of dead workers."""
        for root in self.roots:
            try:
                incoming = root / INCOMING
                incoming.mkdir(parents=True, exist_ok=True)
                with part_file(incoming, "probe") as probe:
                    probe.touch()
                    now = probe.stat().st_mtime
            except OSError as error:
                self.lost(root, error)
                continue
            if root == self.root:
                self.trouble = None
            _sweep(root, self._stale_after, now)
            yield root

    def lost(self, root: Path, error: OSError) -> None:
        """Notes that a folder cannot be written."""
        trouble = f"the LoRA cache on the volume cannot be written ({error.strerror})"
        if root == self.root and self.fallback:
            trouble += "; LoRAs are kept on this container's disk"
            if self.trouble != trouble:
                log.warning("%s: %s", root, trouble)
            self.trouble = trouble

    def root_of(self, path: Path) -> Path:
        """The folder that a file of the cache is in."""
        return next(root for root in self._readable if path.is_relative_to(root))

    @property
    def _readable(self) -> tuple[Path, ...]:
        return (*self.roots, self.behind) if self.behind else self.roots

    def is_own(self, path: Path) -> bool:
        """Whether the file lies in `roots`, so that the cache may write beside it and delete it."""
        return self.root_of(path) in self.roots

    def name_of(self, path: Path) -> str:
        """The name of a file in the cache, as a request would give it."""
        return str(path.relative_to(self.root_of(path)))

    def is_local(self, path: Path) -> bool:
        """Whether a file of the cache is on a disk of this machine."""
        return self._local.get(self.root_of(path), False)

    def adapters(self) -> list[StoredAdapter]:
        """Every adapter that has its weights, in the order of their files' paths, the volume's first."""
        return [
            adapter
            for root in self.roots
            for adapter in sorted(adapters_in(root), key=lambda item: str(item.weights).split("/"))
            if adapter.weights
        ]

    def names(self, *, own: bool = False) -> list[str]:
        """The names that `existing` finds, without their endings; those in the folder behind unless `own`."""
        return [
            str(PurePosixPath(adapter.weights).with_suffix(""))
            for root in (self.roots if own else self._readable)
            for adapter in adapters_in(root)
            if adapter.weights
        ]

    def files(self) -> list[Path]:
        """The files of `adapters`."""
        return [adapter.root / str(adapter.weights) for adapter in self.adapters()]

    def existing(self, name: str) -> Path | None:
        """The file of this name. A .safetensors file goes before pickles, the volume before the fallback.

        Raises: SourceInvalid if it leads out of the folders.
        """
        stems = (name, *(f"{name}/{stem}" for stem in STEMS))
        candidates = [name, *(stem + ext for stem in stems for ext in EXTENSIONS)]
        for root in self._readable if not is_hidden(name) else ():
            for candidate in candidates:
                path = root / candidate
                with suppress(OSError):
                    if candidate.endswith(EXTENSIONS) and path.is_file():
                        if leads_out(path, root):
                            raise SourceInvalid(f"{name!r} leads out of the LoRA cache")
                        return path
        return None

    def adapter(self, name: str) -> StoredAdapter | None:
        """The adapter of this name. Unlike `existing`, also finds a PEFT folder without its weights.

        Raises: SourceInvalid if it leads out of the folders.
        """
        if (path := self.existing(name)) and self.is_own(path):
            return adapter_at(self.root_of(path), self.name_of(path))
        if is_hidden(name) or name.startswith("/") or ".." in PurePosixPath(name).parts:
            return None
        return next(filter(None, (adapter_at(root, name) for root in self.roots)), None)


def on_local_disk(folder: Path, mounts: Path = MOUNTS) -> bool:
    """Whether the folder, which need not exist yet, is on a local file system; False if unknown."""
    mount = mount_of(folder, mounts)
    return mount is not None and mount.kind in LOCAL


class Mount(NamedTuple):
    """A file system, and where it is mounted."""

    place: Path
    kind: str


def mount_of(folder: Path, mounts: Path = MOUNTS) -> Mount | None:
    """The mount that the folder, which need not exist yet, lies in; None if unknown."""
    try:
        lines = mounts.read_text().splitlines()
    except OSError:
        return None
    target, best = Path(os.path.realpath(folder)), None
    for line in lines:
        # "36 35 98:0 / /mnt rw,noatime master:1 - ext3 /dev/root rw" (man proc_pid_mountinfo)
        before, _, after = line.partition(" - ")
        place = Path(before.split(" ")[4].replace("\\040", " "))
        if target.is_relative_to(place) and (not best or len(place.parts) >= len(best.place.parts)):
            best = Mount(place, after.split(" ")[0])
    return best


def _sweep(root: Path, age: float, now: float) -> None:
    """Removes old damaged files, parts of processes that ended, and parts and leases that nobody wrote to for
    `age` seconds. `now`: the folder's own time, to which this machine's clock may not be near.
    """
    for folder, oldest in ((INCOMING, age), (DAMAGED, DAMAGED_DAYS * 86_400)):
        with suppress(OSError):
            for path in (root / folder).iterdir():
                with suppress(OSError):  # another worker finished or swept it just now
                    if now - path.stat().st_mtime > oldest or is_orphan(path):
                        path.unlink()
