"""Checks an adapter by reading it whole, as a job would, and publishes a trainer's adapter in the cache."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
import zipfile
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from lora.durable import part_file, replace_durably, sha256_of
from lora.errors import (
    CacheFull,
    LoraCorrupt,
    LoraIncompatible,
    LoraNotFound,
    LoraTooLarge,
    LoraUnsupported,
)
from lora.fetch.redaction import redact_url
from lora.fetch.sources import CachedName, RemoteFile
from lora.formats.adapter import LoraFile, load
from lora.formats.alphas import CONFIG_IN_FILE, Alphas
from lora.formats.apart import convert_apart
from lora.formats.contents import MAX_SHOWN
from lora.formats.endings import SAFETENSORS
from lora.formats.header import Header, read_header
from lora.formats.names.keys import KeyMap
from lora.formats.peft import PEFT_CONFIG, PEFT_STEM, read_config, template_beside
from lora.formats.pickles import looks_like_pickle
from lora.library.states import Standing, State, put, unknown
from lora.library.summary import summarised
from lora.volume.adapters import StoredAdapter, adapter_at
from lora.volume.cache import VolumeCache
from lora.volume.records import INCOMING, Record, record_path, write
from lora.volume.shelf import file_name

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

PIECE = 8 << 20
"""Bytes per read of a copy."""

AUTOV3_DIGITS = 12

ALIGNED = 8
"""The length of a header is a multiple of this, as the format recommends."""


@dataclass(frozen=True)
class Activation:
    """Checks adapters against one worker's model."""

    cache: VolumeCache
    key_map: KeyMap
    model: str
    """The base model's name."""

    def of(self, adapter: StoredAdapter, name: str, *, publish: bool) -> State:
        """The state of an adapter that can be used. `name`: its name in the library.

        With `publish`, a copy of it goes into the cache, and the state's `file` is the copy's name. Without,
        the adapter lies in the cache already. Raises: LoraError, whose sentence is the reason why it cannot
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
            path, record, mapped = entry.path, entry.record, entry.mappable
            config = record.config if config is None else config
            check_config(config, self.model)
            file = load(path, self.key_map, record.sha256, config=config, mapped=mapped)
        return _active(adapter, path, file, record.source)

    def _published(self, adapter: StoredAdapter, config: str | None, name: str) -> State:
        """Puts a checked copy into the cache.

        Its name has the hash of its content, and its time is the original's. So workers that publish one
        version at once write the same file and record, and no version replaces another.
        """
        check_config(config, self.model)
        shelf = self.cache.shelf
        root = shelf.prepare()
        with part_file(root / INCOMING) as part:
            limit = self.cache.limits.file_bytes
            sha256 = _copy_whole(adapter.root / str(adapter.weights), config, part, limit)
            file = load(part, self.key_map, sha256, mapped=shelf.is_local(part))
            state = _active(adapter, part, file, name)
            path = root / _file_name(adapter, name, sha256)
            os.utime(part, ns=(adapter.version.mtime_ns, adapter.version.mtime_ns))
            status = part.stat()
            # Without a time of download it is never evicted: nobody could fetch it again.
            times = status.st_size, status.st_mtime_ns
            template = template_beside(adapter.root / str(adapter.weights))
            record = Record(name, sha256, *times, fetched=None, template=template)
            write(root, record_path(path), record)
            replace_durably(part, path)
        if copy := adapter_at(root, path.name):
            put(copy, replace(state, **copy.version._asdict()))
        return replace(state, file=path.name)


def _file_name(adapter: StoredAdapter, name: str, sha256: str) -> str:
    path = PurePosixPath(adapter.path)
    readable = "_".join((path if adapter.is_folder else path.with_suffix("")).parts) + SAFETENSORS
    return file_name(RemoteFile("", f"{name} {sha256}", name, readable))


def _active(adapter: StoredAdapter, path: Path, file: LoraFile, source: str) -> State:
    """The state of an adapter that was read whole. Raises: LoraUnsupported if a tensor was not used."""
    if file.unused:  # as a job with `strict_loras` refuses it
        first = file.unused[0]
        raise LoraUnsupported(
            f"{len(file.unused)} of {file.keys + len(file.unused)} tensors cannot be used "
            f"({first.key[:MAX_SHOWN]}: {first.reason})"
        )
    header = read_header(path)
    return replace(
        summarised(unknown(adapter), header),
        state=Standing.ACTIVE,
        at=time.time(),
        sha256=file.sha256,
        autov3=sha256_of(path, min(info.start for info in header.tensors.values()))[:AUTOV3_DIGITS],
        source=source,
        algorithm="+".join(file.algorithms),
        rank=file.rank,
        layers=file.modules,
    )


def _copy_whole(weights: Path, config: str | None, target: Path, limit: int) -> str:
    """Copies an adapter of at most `limit` bytes to `target`, and returns the copy's sha256.

    The config's text goes into the copy's metadata, where readers find it, too: of two files, a delete or a
    crash may leave only one. Pickles become .safetensors. Raises: LoraError if the adapter is not whole;
    OSError.
    """
    if weights.stat().st_size > limit:
        raise LoraTooLarge(
            f"it is over the limit of {limit / 1e6:.0f} MB", "The limit is LORA_MAX_FILE_MB."
        )
    if weights.suffix == SAFETENSORS or not looks_like_pickle(weights):
        return _copy(weights, config, target)
    with part_file(target.parent) as converted:
        convert_apart(weights, converted, limit)
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


def refuse_half_a_folder(adapter: StoredAdapter) -> None:
    """Raises: LoraNotFound if a PEFT folder lacks its weights or its config."""
    if adapter.weights is None:
        raise LoraNotFound(
            f"the folder has {PEFT_CONFIG} and no {PEFT_STEM}{SAFETENSORS} or {PEFT_STEM}.bin",
            "The training may not be done, or the weights were not copied.",
        )
    if adapter.is_peft and adapter.config is None:
        raise LoraNotFound(
            f"the folder has no {PEFT_CONFIG}, so nobody knows how its weights are scaled",
            "Copy it from where the adapter was trained.",
        )


def header_of(path: Path) -> Header | None:
    """The header of a whole adapter; None for a pickle, of which only the end is checked.

    Raises: LoraCorrupt, LoraUnsupported; OSError.
    """
    if path.suffix == SAFETENSORS or not looks_like_pickle(path):
        return read_header(path)
    with path.open("rb") as stream:
        packed = stream.read(2) == b"PK"
    if packed and not zipfile.is_zipfile(path):
        raise LoraCorrupt("the pickle was cut off", "Upload or download it again.")
    return None


def check_config(config: str | None, model: str) -> None:
    """Raises: LoraIncompatible if a PEFT config names a base model that is neither the worker's nor a folder
    that exists; LoraCorrupt or LoraUnsupported if it is no config that can be read.

    If it names no base model, the weights' names and shapes decide later.
    """
    if config is None:
        return
    try:
        base = json.loads(config).get("base_model_name_or_path") or ""
    except (ValueError, AttributeError, RecursionError) as error:
        raise LoraCorrupt(f"{PEFT_CONFIG} is no JSON object") from error
    if not isinstance(base, str):
        raise LoraCorrupt(f"{PEFT_CONFIG}: base_model_name_or_path is no text")
    fits = not base or not model or _same_model(base, model)
    with suppress(OSError, ValueError):
        fits = fits or Path(base).is_dir()
    if not fits:
        shown = PurePosixPath(base).name if base.startswith("/") else redact_url(base)
        raise LoraIncompatible(
            f"it was trained on {shown[:MAX_SHOWN]!r}, and this worker runs {_last(model)!r}",
            "A job can use it all the same.",
        )
    Alphas.of({}, config)


def _same_model(base: str, model: str) -> bool:
    """Whether both mean the same repo, or a folder with the repo's name."""
    if base.startswith("/") or model.startswith("/"):
        return _last(base) == _last(model)
    return base.strip("/").casefold() == model.strip("/").casefold()


def _last(name: str) -> str:
    return PurePosixPath(name).name.removesuffix(SAFETENSORS).casefold()
