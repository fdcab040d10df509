"""A .safetensors file that is written tensor by tensor, and appears under its name only when it is whole.

The header stands before the data and is known last, so room for it is left, and filled up with spaces. What
a killed run has written can be taken up by the next one: a journal beside the part says which groups of
tensors are in it, each with a checksum.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora.durable import replace_durably
from lora.errors import ToolError
from lora.formats.tensors import DTYPES

PIECE = 8 << 20
"""How many bytes are written or read at a time."""

ROOM_PER_TENSOR, ROOM = 224, 1 << 16
"""Bytes that a tensor's entry in the header takes at most, beside its name, for up to 8 axes; and bytes that
are left for metadata that is known only in the end."""

ALIGNMENT = 8
"""Where the data begins, so that no number lies across a boundary."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}


class _Entry(NamedTuple):
    """A tensor that is in the file; its place counts from the data's beginning."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class StreamWriter:
    """Writes one .safetensors file; a context manager.

    Left without `finish`, or killed at any moment, it leaves nothing under its name: without a journal no
    trace after an exception, with one the part and the journal, for the next writer of the same.
    """

    def __init__(
        self,
        path: Path,
        names: Iterable[str],
        metadata: Mapping[str, str],
        journal: str | None = None,
    ) -> None:
        """`names`: of all tensors that may be put. `journal`: what the file will be, in one text (the inputs'
        hashes, the options); what another run of the same text has written is taken up.

        Raises: ToolError if the folder cannot be written, or another process is writing the same.
        """
        self.path, self._metadata = path, dict(metadata)
        self._names = frozenset(names)
        self._entries: dict[str, _Entry] = {}
        self.notes: list[dict[str, Any]] = []
        """The notes of the groups that are in the file, in their order: at first those of a killed run."""
        room = sum(len(json.dumps(name)) + ROOM_PER_TENSOR for name in self._names)
        room += len(_json({"__metadata__": self._metadata})) + ROOM
        self._start = -(-(8 + room) // ALIGNMENT) * ALIGNMENT
        self._end = 0
        token = uuid.uuid4().hex if journal is None else _digest(journal, self._start)
        self._part = path.with_name(f".{path.name}.{token[:16]}.part")
        self._resumable = journal is not None
        self._journal: int | None = None
        self._journal_end = 0
        with telling(path):
            alone = os.O_EXCL if journal is None else 0
            self._file = os.open(self._part, os.O_RDWR | os.O_CREAT | alone, 0o666)
            try:
                if journal is not None:
                    self._take_up(journal)
            except BaseException:
                self.close()
                raise

    @property
    def _journal_path(self) -> Path:
        return self._part.with_suffix(".journal")

    def put(self, tensors: Mapping[str, Tensor], note: Mapping[str, Any] | None = None) -> None:
        """Appends a group of tensors, whole or not at all; `note` (JSON) says what it was.

        Raises: ToolError if the disk is full or fails; ValueError for a name that was not announced or is
        there already.
        """
        unknown = [name for name in tensors if name not in self._names or name in self._entries]
        if unknown:
            raise ValueError(f"{unknown[0]!r} was not announced, or is in the file already")
        entries: dict[str, _Entry] = {}
        place, check = self._end, 0
        with telling(self.path):
            for name, tensor in tensors.items():
                view = _bytes_of(tensor)
                _write_all(self._file, view, self._start + place)
                check = zlib.crc32(view, check) if self._resumable else 0
                shape = tuple(tensor.shape)
                entries[name] = _Entry(NAMES[tensor.dtype], shape, place, place + len(view))
                place += len(view)
            if self._journal is not None:
                line = {"tensors": entries, "check": check, "note": dict(note or {})}
                text = _json(line) + b"\n"
                _write_all(self._journal, memoryview(text), self._journal_end)
                self._journal_end += len(text)
        self._entries |= entries
        self._end = place
        self.notes.append(dict(note or {}))

    def finish(self, metadata: Mapping[str, str] = {}) -> None:
        """Publishes the file: afterwards it is whole, on the disk, and under its name. `metadata` is added.

        Raises: ToolError if the disk fails; ValueError if the metadata outgrew the room for it.
        """
        self._metadata |= metadata
        fields: dict[str, Any] = {"__metadata__": self._metadata} if self._metadata else {}
        for name, (dtype, shape, start, end) in self._entries.items():
            fields[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        text = _json(fields)
        length = self._start - 8
        if len(text) > length:
            raise ValueError("the header outgrew the room that was left for it")
        with telling(self.path):
            os.ftruncate(self._file, self._start + self._end)
            head = length.to_bytes(8, "little") + text.ljust(length)
            _write_all(self._file, memoryview(head), 0)
            replace_durably(self._part, self.path)
        self._remove_part()
        self.close()

    def discard(self) -> None:
        """Removes what was written, the journal with it."""
        self._remove_part()
        self.close()

    def close(self) -> None:
        """Lets the files go; without a journal, what is not published is removed."""
        if self._file < 0:
            return
        if not self._resumable:
            self._remove_part()
        if self._journal is not None:
            os.close(self._journal)
            self._journal = None
        os.close(self._file)
        self._file = -1

    def __enter__(self) -> StreamWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _remove_part(self) -> None:
        for left in (self._part, self._journal_path):
            with suppress(OSError):
                left.unlink()

    def _take_up(self, journal: str) -> None:
        """Opens the journal, alone, and goes on behind the last group that is whole."""
        locked = False
        with suppress(BlockingIOError):
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Not one that its writer has published since it was opened.
            locked = os.path.samestat(os.fstat(self._file), self._part.stat())
        if not locked:
            raise ToolError(f"another process is writing {self.path.name}", "Wait for it.")
        self._journal = os.open(self._journal_path, os.O_RDWR | os.O_CREAT, 0o666)
        text = self._journal_path.read_bytes()
        for line in text.splitlines(keepends=True):
            group = _group(line)
            if group is None or not self._is_there(group):
                break
            self._entries |= group[0]
            self._end = max((one.end for one in group[0].values()), default=self._end)
            self.notes.append(group[2])
            self._journal_end += len(line)
        os.ftruncate(self._journal, self._journal_end)
        os.ftruncate(self._file, self._start + self._end)

    def _is_there(self, group: tuple[dict[str, _Entry], int, dict[str, Any]]) -> bool:
        """Whether a group that the journal tells of stands in the part as it was written."""
        entries, wanted, _ = group
        check, place = 0, self._end
        for entry in entries.values():
            if entry.start != place:
                return False
            while place < entry.end:
                piece = os.pread(self._file, min(PIECE, entry.end - place), self._start + place)
                if not piece:
                    return False
                check, place = zlib.crc32(piece, check), place + len(piece)
        return check == wanted


def _write_all(descriptor: int, view: memoryview, place: int) -> None:
    while view:
        done = os.pwrite(descriptor, view[:PIECE], place)
        view, place = view[done:], place + done


def _group(line: bytes) -> tuple[dict[str, _Entry], int, dict[str, Any]] | None:
    """What a line of a journal tells; None if the process was killed while it wrote it."""
    try:
        if not line.endswith(b"\n"):
            return None
        found = json.loads(line)
        entries = {name: _Entry(*fields) for name, fields in found["tensors"].items()}
        return entries, found["check"], found["note"]
    except (ValueError, TypeError, KeyError):
        return None


def _digest(journal: str, start: int) -> str:
    return hashlib.sha256(f"{start} {journal}".encode()).hexdigest()


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def telling(path: Path) -> Iterator[None]:
    """Turns the system's refusals to write `path` into a ToolError of one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise ToolError(
                f"there is no room on the disk for {path.name}", "Free some."
            ) from error
        why = error.strerror or type(error).__name__
        raise ToolError(f"{path.name} cannot be written ({why})") from error


def refuse_overwriting(output: Path, inputs: Iterable[Path]) -> None:
    """Raises: ToolError if the output is one of the inputs."""
    if not output.exists():
        return
    for path in inputs:
        if path.exists() and output.samefile(path):
            raise ToolError(f"the output {output.name} is an input", "Name another output.")


def write_pytorch(path: Path, tensors: Mapping[str, Tensor], wrapper: str = "") -> None:
    """Writes a table of tensors with `torch.save`, whole or not at all; `wrapper`: a key to put it under.

    Raises: ToolError if the disk is full or fails.
    """
    table: Mapping[str, Any] = {wrapper: dict(tensors)} if wrapper else dict(tensors)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:16]}.part")
    try:
        with telling(path):
            with part.open("wb") as stream:
                torch.save(table, stream)
            replace_durably(part, path)
    except RuntimeError as error:  # torch's zip writer, which the system's own error has stopped
        with telling(path):
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
        raise ToolError(f"{path.name} cannot be written (torch.save failed)") from error
    finally:
        with suppress(OSError):
            part.unlink()
