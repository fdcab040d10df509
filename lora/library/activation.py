"""Checks an adapter by reading it whole, as a job would, and publishes a trainer's adapter in the cache."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from lora.durable import part_file, replace_durably
from lora.errors import CacheFull, LoraCorrupt, LoraNotFound, LoraTooLarge
from lora.fetch.sources import CachedName, RemoteFile
from lora.formats.adapter import LoraFile, load
from lora.formats.alphas import CONFIG_IN_FILE
from lora.formats.endings import SAFETENSORS
from lora.formats.families import identify
from lora.formats.header import read_header
from lora.formats.names.keys import KeyMap
from lora.formats.peft import read_config
from lora.formats.pickles import convert, looks_like_pickle
from lora.library.checks import check_config, refuse_half_a_folder, refuse_unused
from lora.library.states import Standing, State, put, unknown
from lora.library.summary import trigger_words
from lora.volume.adapters import StoredAdapter, adapter_at
from lora.volume.cache import VolumeCache
from lora.volume.records import INCOMING, Record, record_path, write
from lora.volume.shelf import file_name

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

PIECE = 8 << 20
"""Bytes that are copied at a time."""

ALIGNED = 8
"""The header's length is a multiple of this, as the format recommends."""


@dataclass(frozen=True)
class Activation:
    """Checks adapters against one worker's model."""

    cache: VolumeCache
    key_map: KeyMap
    model: str
    """The base model's name."""

    def of(self, adapter: StoredAdapter, name: str, *, publish: bool) -> State:
        """The state of an adapter that can be used. `name`: its name in the library.

        With `publish`, a copy of it is put into the cache, and the state's `file` is the copy's name.
        Without, the adapter lies in the cache. Raises: LoraError, whose sentence is the reason why it cannot
        be used; CacheFull if there is no room.
        """
        refuse_half_a_folder(adapter)
        try:
            config = read_config(adapter.root / adapter.config) if adapter.config else None
            if publish:
                return self._published(adapter, config, name)
            return self._read_whole(adapter, config)
        except FileNotFoundError:
            raise LoraNotFound(f"{name} was removed just now") from None
        except OSError as error:
            if error.errno in NO_ROOM:
                raise CacheFull(f"there is no room for {name} ({error.strerror})") from error
            raise LoraCorrupt(f"the file cannot be read ({error.strerror})") from error

    def _read_whole(self, adapter: StoredAdapter, config: str | None) -> State:
        weights = str(adapter.weights)
        with self.cache.in_use(adapter.root / weights):
            entry = self.cache.find(CachedName(weights))
            record = entry.record
            config = record.config if config is None else config
            check_config(config, self.model)
            file = load(
                entry.path, self.key_map, record.sha256, config=config, mapped=entry.mappable
            )
        refuse_unused(file)
        return replace(_active(adapter, entry.path, file), source=record.source)

    def _published(self, adapter: StoredAdapter, config: str | None, name: str) -> State:
        """Puts a checked copy into the cache.

        Its name has the hash of its content, and its time is the original's: workers that publish the same
        version at once write the same file and the same record, and one version never replaces another.
        """
        check_config(config, self.model)
        shelf = self.cache.shelf
        root = shelf.prepare()
        with part_file(root / INCOMING) as part:
            limit = self.cache.limits.file_bytes
            sha256 = _copy_whole(adapter.root / str(adapter.weights), config, part, limit)
            file = load(part, self.key_map, sha256, mapped=shelf.is_local(part))
            refuse_unused(file)
            state = replace(_active(adapter, part, file), source=name)
            path = root / _file_name(adapter, name, sha256)
            _publish(part, path, adapter.version.mtime_ns, state)
            return replace(state, file=path.name)


def _file_name(adapter: StoredAdapter, name: str, sha256: str) -> str:
    path = PurePosixPath(adapter.path)
    readable = "_".join((path if adapter.is_folder else path.with_suffix("")).parts) + SAFETENSORS
    return file_name(RemoteFile("", f"{name} {sha256}", name, readable))


def _publish(part: Path, path: Path, mtime_ns: int, state: State) -> None:
    """Raises: OSError."""
    os.utime(part, ns=(mtime_ns, mtime_ns))
    status = part.stat()
    # Without a time of download, so that it is never evicted: nobody could fetch it again.
    source, sha256 = str(state.source), str(state.sha256)
    record = Record(source, sha256, status.st_size, status.st_mtime_ns, fetched=None)
    write(path.parent, record_path(path), record)
    replace_durably(part, path)
    copy = adapter_at(path.parent, path.name)
    if copy:
        put(copy, replace(state, **copy.version._asdict()))


def _active(adapter: StoredAdapter, path: Path, file: LoraFile) -> State:
    header = read_header(path)
    return replace(
        unknown(adapter),
        state=Standing.ACTIVE,
        at=time.time(),
        sha256=file.sha256,
        algorithm="+".join(file.algorithms),
        rank=file.rank,
        base=identify(header),
        words=trigger_words(header),
        layers=file.modules,
    )


def _copy_whole(weights: Path, config: str | None, target: Path, limit: int) -> str:
    """Copies an adapter of at most `limit` bytes to `target`, and returns the copy's sha256.

    The config's text goes into the copy's metadata, where readers find it as they do beside the file: one
    file is renamed at once; of two, a delete or a crash may leave only one. Pickles become .safetensors.
    Raises: LoraError if the adapter is not whole; OSError.
    """
    if weights.stat().st_size > limit:
        raise LoraTooLarge(
            f"it is over the limit of {limit / 1e6:.0f} MB", "The limit is LORA_MAX_FILE_MB."
        )
    if weights.suffix == SAFETENSORS or not looks_like_pickle(weights):
        return _copy(weights, config, target)
    with part_file(target.parent) as converted:
        convert(weights, converted, limit)
        return _copy(converted, config, target)


def _copy(source: Path, config: str | None, target: Path) -> str:
    read_header(source)
    digest = hashlib.sha256()
    with source.open("rb") as stream, target.open("wb", buffering=0) as out:
        head = stream.read(int.from_bytes(stream.read(8), "little"))
        if config is not None:
            head = _with_config(head, config)
        piece = len(head).to_bytes(8, "little") + head
        while piece:
            digest.update(piece)
            view = memoryview(piece)
            while view:
                view = view[out.write(view) :]
            piece = stream.read(PIECE)
    return digest.hexdigest()


def _with_config(head: bytes, config: str) -> bytes:
    """The header's JSON with the config in it, for every component (the empty name)."""
    try:
        fields = json.loads(head)
        metadata = dict(fields.get("__metadata__", {}))
        beside = {f".{name}": value for name, value in json.loads(config).items()}
        inside = json.loads(metadata.get(CONFIG_IN_FILE, "{}"))
        metadata[CONFIG_IN_FILE] = json.dumps({**inside, **beside})
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise LoraCorrupt("adapter_config.json is not what peft writes") from error
    text = json.dumps({**fields, "__metadata__": metadata}, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % ALIGNED)
