"""How a file that came in is checked, converted if need be, and appears in the cache under its name."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lora.durable import part_file, replace_durably, sha256_of
from lora.errors import naming
from lora.fetch.download import Fetched
from lora.fetch.sources import RemoteFile
from lora.formats.header import read_header
from lora.formats.peft import config_beside
from lora.formats.pickles import convert, looks_like_pickle
from lora.volume.records import INCOMING, Record, record_path, write
from lora.volume.room import Room
from lora.volume.shelf import CacheEntry, Damaged, Shelf, check_sha256, file_name


@dataclass(frozen=True)
class Publisher:
    """Puts files into the cache, each whole and with its record."""

    shelf: Shelf
    room: Room
    max_bytes: int

    def publish(
        self, part: Path, root: Path, remote: RemoteFile, fetched: Fetched, config: str | None
    ) -> CacheEntry:
        """Checks the bytes of `part`, then gives them their name in `root`.

        The record appears first, so that a file with a record is never taken for an operator's.
        Raises: LoraError, OSError; then nothing new lies under the name.
        """
        check_sha256(remote.sha256, fetched.sha256, remote.shown)
        path, sha256 = root / file_name(remote), fetched.sha256
        with naming(remote.shown), part_file(root / INCOMING, path.name) as converted:
            if looks_like_pickle(part):
                convert(part, converted, self.max_bytes)
                part, sha256 = converted, sha256_of(converted)
            read_header(part)
            status = _stamped(part, sha256)
            # Again, because not every server says the size first.
            self.room.make(path, status.st_size, 0)
            now = time.time()
            record = Record(
                source=remote.shown,
                sha256=sha256,
                size=status.st_size,
                mtime_ns=status.st_mtime_ns,
                fetched=now,
                checked=now,
                etag=fetched.etag,
                modified=fetched.modified,
                source_sha256=fetched.sha256 if sha256 != fetched.sha256 else None,
                config=config,
            )
            write(root, record_path(path), record)
            replace_durably(part, path)
        return CacheEntry(path, path.name, record, True, self.shelf.is_local(path))

    def converted(self, path: Path) -> CacheEntry:
        """An operator's pickle as .safetensors, written once per version. Raises: LoraError, OSError."""
        status, name = path.stat(), self.shelf.name_of(path)
        identity = f"file:{name}:{status.st_size}:{status.st_mtime_ns}"
        remote = RemoteFile("", identity, name, path.name, fixed=True)
        with suppress(Damaged):
            if kept := self.shelf.kept(remote):
                return kept
        root = self.shelf.prepare()
        with part_file(root / INCOMING, path.name) as part:
            shutil.copyfile(path, part)
            fetched = Fetched(sha256_of(part), status.st_size, None, None)
            return self.publish(part, root, remote, fetched, config_beside(path))


def _stamped(path: Path, sha256: str) -> os.stat_result:
    """Gives a file a time that depends on its content, and returns its status.

    Clocks of file systems tick every few milliseconds: two contents of one size, published within a tick,
    would otherwise have the same time, and one's record would fit the other.
    """
    now = time.time_ns() // 1_000_000 * 1_000_000 + int(sha256[:8], 16) % 1_000_000
    os.utime(path, ns=(now, now))
    return path.stat()
