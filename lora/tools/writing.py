"""Writes a .safetensors file tensor by tensor; it gets its name only when it is whole.

The header stands before the data and is known last, so room is left for it and filled up with spaces. The
next run can continue what a killed run has written: a journal beside the unfinished file lists the groups of
tensors that are in it, each with a checksum.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora.durable import (
    part_file,
    part_path,
    published,
    rename_folder,
    replace_durably,
    sweep,
    sync_folder,
)
from lora.errors import ToolError
from lora.formats.tensors import DTYPES
from lora.tools import HEADER_ALIGNMENT

_HIDDEN = re.compile(r"^\.(.+)\.[^.]+\.[0-9a-f]{16}\.part$")
"""What `lora.durable.part_file` calls a file or folder until it is whole."""

PIECE = 8 << 20
"""How many bytes are written or read at a time."""

ROOM_PER_TENSOR, ROOM = 224, 1 << 16
"""Bytes kept free in the header: for each tensor besides its name (8 axes at most), and for late metadata."""

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class _Entry(NamedTuple):
    """A tensor in the file; its offsets count from the beginning of the data."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class _Group(NamedTuple):
    """A line of the journal."""

    entries: dict[str, _Entry]
    check: int
    note: dict[str, Any]


class StreamWriter:
    """Writes one .safetensors file; a context manager.

    Left without `finish`, or killed at any moment, it leaves nothing under the file's name. After an
    exception nothing is left at all, or, with a journal, the unfinished file and the journal for the next
    writer. Without a journal, what a killed writer left is removed by the next of the same name.
    """

    def __init__(
        self,
        path: Path,
        names: Iterable[str],
        metadata: Mapping[str, str],
        journal: str | None = None,
    ) -> None:
        """`names`: of all tensors that may be put. `journal`: a text that identifies the file's content
        (hashes of the inputs, options); what an earlier run with the same text has written is kept.
        """
        self.path, self._metadata = path, dict(metadata)
        self._names = frozenset(names)
        self._entries: dict[str, _Entry] = {}
        self.notes: list[dict[str, Any]] = []
        """The notes of the groups in the file, in order; at first those of an earlier run."""
        room = sum(len(json.dumps(name)) + ROOM_PER_TENSOR for name in self._names)
        room += len(_json({"__metadata__": self._metadata})) + ROOM
        self._start = -(-(8 + room) // HEADER_ALIGNMENT) * HEADER_ALIGNMENT
        self._end = 0
        self._final_name = _HIDDEN.sub(r"\1", path.name)
        self._part = part_path(path.parent, self._final_name)
        if journal is not None:
            content = hashlib.sha256(f"{self._start} {journal}".encode())
            self._part = path.with_name(f".{path.name}.{content.hexdigest()[:16]}.part")
        self._journal_path = self._part.with_suffix(".journal")
        self._resumable = journal is not None
        self._file = self._journal = -1
        self._journal_end = 0

    def __enter__(self) -> StreamWriter:
        """Raises: ToolError if the folder cannot be written, or another process is writing the same file."""
        # The file is made here and not before: an interrupt in between would leave it.
        try:
            with write_errors(self.path):
                if not self._resumable:
                    sweep(self.path.parent, self._final_name)
                alone = 0 if self._resumable else os.O_EXCL
                self._file = os.open(self._part, os.O_RDWR | os.O_CREAT | alone, 0o666)
                if self._resumable:
                    self._resume()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def put(self, tensors: Mapping[str, Tensor], note: Mapping[str, Any] | None = None) -> None:
        """Appends a group of tensors, whole or not at all; `note` (JSON) says what the group is.

        Raises: ToolError if the disk is full or fails; ValueError for a name that was not announced or is
        in the file already.
        """
        unknown = [name for name in tensors if name not in self._names or name in self._entries]
        if unknown:
            raise ValueError(f"{unknown[0]!r} was not announced, or is in the file already")
        entries: dict[str, _Entry] = {}
        place, check = self._end, 0
        with write_errors(self.path):
            for name, tensor in tensors.items():
                view = _bytes_of(tensor)
                _write_all(self._file, view, self._start + place)
                check = zlib.crc32(view, check) if self._resumable else 0
                shape = tuple(tensor.shape)
                entries[name] = _Entry(DTYPE_NAMES[tensor.dtype], shape, place, place + len(view))
                place += len(view)
            if self._resumable:
                line = {"tensors": entries, "check": check, "note": dict(note or {})}
                text = _json(line) + b"\n"
                _write_all(self._journal, memoryview(text), self._journal_end)
                self._journal_end += len(text)
        self._entries |= entries
        self._end = place
        self.notes.append(dict(note or {}))

    def finish(self, metadata: Mapping[str, str] = {}) -> None:
        """Publishes the file: afterwards it is whole, on the disk and under its name. `metadata` is added.

        Raises: ToolError if the disk fails; ValueError if the metadata is larger than the room for it.
        """
        self._metadata |= metadata
        fields: dict[str, Any] = {"__metadata__": self._metadata} if self._metadata else {}
        for name, (dtype, shape, start, end) in self._entries.items():
            fields[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        text = _json(fields)
        length = self._start - 8
        if len(text) > length:
            raise ValueError("the header outgrew the room that was left for it")
        with write_errors(self.path):
            os.ftruncate(self._file, self._start + self._end)
            head = length.to_bytes(8, "little") + text.ljust(length)
            _write_all(self._file, memoryview(head), 0)
            replace_durably(self._part, self.path)
        self.discard()

    def discard(self) -> None:
        """Removes what is not published, the journal too."""
        for path in (self._part, self._journal_path):
            with suppress(OSError):
                path.unlink()
        self.close()

    def close(self) -> None:
        """Closes the files; without a journal, what is not published is removed."""
        if not self._resumable:
            with suppress(OSError):
                self._part.unlink()
        for descriptor in (self._journal, self._file):
            if descriptor >= 0:
                os.close(descriptor)
        self._file = self._journal = -1

    def _resume(self) -> None:
        """Locks the file, opens the journal, and continues behind the last group that is whole."""
        locked = False
        with suppress(BlockingIOError):
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its writer may have published it after it was opened here.
            locked = os.path.samestat(os.fstat(self._file), self._part.stat())
        if not locked:
            raise ToolError(f"another process is writing {self.path}", "Wait until it ends.")
        self._journal = os.open(self._journal_path, os.O_RDWR | os.O_CREAT, 0o666)
        for line in self._journal_path.read_bytes().splitlines(keepends=True):
            group = _parse_group(line)
            if group is None or not self._is_whole(group):
                break
            self._entries |= group.entries
            self._end = max((entry.end for entry in group.entries.values()), default=self._end)
            self.notes.append(group.note)
            self._journal_end += len(line)
        os.ftruncate(self._journal, self._journal_end)
        os.ftruncate(self._file, self._start + self._end)

    def _is_whole(self, group: _Group) -> bool:
        """Whether the bytes of a group in the journal are in the file as they were written."""
        check, place = 0, self._end
        for entry in group.entries.values():
            if entry.start != place:
                return False
            while place < entry.end:
                piece = os.pread(self._file, min(PIECE, entry.end - place), self._start + place)
                if not piece:
                    return False
                check, place = zlib.crc32(piece, check), place + len(piece)
        return check == group.check


def _write_all(descriptor: int, view: memoryview, place: int) -> None:
    while view:
        done = os.pwrite(descriptor, view[:PIECE], place)
        view, place = view[done:], place + done


def _parse_group(line: bytes) -> _Group | None:
    """None for a line during whose writing the process was killed."""
    try:
        if not line.endswith(b"\n"):
            return None
        fields = json.loads(line)
        entries = {name: _Entry(*entry) for name, entry in fields["tensors"].items()}
        return _Group(entries, fields["check"], fields["note"])
    except (ValueError, TypeError, KeyError):
        return None


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turns the system's refusals to write `path` into a ToolError of one sentence.

    A file within a folder that has no name yet is told by the name that the folder will have.
    """
    try:
        yield
    except OSError as error:
        path = Path(*(_HIDDEN.sub(r"\1", part) for part in path.parts))
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            hint = "Free some space."
            raise ToolError(f"there is no room on the disk for {path}", hint) from error
        why = error.strerror or type(error).__name__
        raise ToolError(f"{path} cannot be written ({why})") from error


@contextmanager
def published_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A new folder beside `path`, which becomes `path`, with all that is in it, when the block ends. If the
    block fails, it is removed. The block itself sees to it that its files are on the disk.

    With `overwrite`, a folder or link that is at `path` is moved away at the end, and removed when the new
    folder is there; between the two moves nothing is at `path`. Raises: ToolError if the disk is full or
    fails, or something else than an empty folder is at `path` and not to be overwritten.
    """
    sweep(path.parent, path.name)
    with part_file(path.parent, path.name) as part:
        try:
            with write_errors(path):
                part.mkdir()
            yield part
            with write_errors(path):
                for folder, _, _ in os.walk(part):
                    sync_folder(Path(folder))
                rename_folder(part, path, overwrite=overwrite)
                sync_folder(path.parent)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def write_pytorch(path: Path, tensors: Mapping[str, Tensor], wrapper: str = "") -> None:
    """Writes a table of tensors with `torch.save`, whole or not at all; `wrapper`: a key to put it under.

    Raises: ToolError if the disk is full or fails.
    """
    table: Mapping[str, Any] = {wrapper: dict(tensors)} if wrapper else dict(tensors)
    try:
        with write_errors(path), published(path) as part, part.open("xb") as stream:
            torch.save(table, stream)
    except RuntimeError as error:  # torch's zip writer, stopped by an error of the system
        with write_errors(path):
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
        raise ToolError(f"{path} cannot be written (torch.save failed)") from error
