"""Takes a file that comes in pieces, and publishes it in the cache once it is whole and has its hash.

The pieces lie in one file of the volume until then, so any of the workers may take the next one. They come in
order: a piece that begins elsewhere is refused with the place where the next one must begin.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from lora.durable import replace_durably, sha256_of
from lora.errors import LoraCorrupt, LoraTooLarge, SourceInvalid
from lora.formats.header import read_header
from lora.volume.cache import VolumeCache
from lora.volume.records import INCOMING, Record, record_path, write, write_errors_as

NAME = re.compile(r"[\w(\[][\w .()\[\]+&',-]{0,180}\.safetensors")
"""Names that an uploaded file may have: no folder, nothing hidden."""


@dataclass(frozen=True)
class Piece:
    """A part of a file, and which file it is."""

    name: str
    sha256: str
    """Of the whole file."""
    size: int
    """Bytes of the whole file."""
    start: int
    data: bytes


def take(cache: VolumeCache, piece: Piece) -> int:
    """Keeps a piece; the number of bytes that are there now. With the last one, the file has its name.

    The same piece again changes nothing, and a file that is there with the same bytes counts as uploaded.
    Raises: SourceInvalid for a name that cannot be, that another file has, or a piece that does not follow;
    LoraTooLarge; LoraCorrupt if the whole file has another hash or is no adapter: then nothing is kept;
    CacheFull.
    """
    if not NAME.fullmatch(piece.name):
        raise SourceInvalid(
            f"an uploaded file cannot be called {piece.name[:100]!r}",
            "NAME.safetensors, no folder.",
        )
    if piece.size > cache.limits.file_bytes:
        raise LoraTooLarge(
            f"it is over the limit of {cache.limits.file_bytes / 1e6:.0f} MB",
            "The limit is LORA_MAX_FILE_MB.",
        )
    with write_errors_as(f"{piece.name} cannot be written"):
        root = cache.shelf.prepare()
        path = root / piece.name
        if path.exists():
            if path.stat().st_size == piece.size and sha256_of(path) == piece.sha256:
                return piece.size
            raise SourceInvalid(
                f"another file is called {piece.name}", "Delete it, or rename yours."
            )
        part = root / INCOMING / f"upload-{piece.sha256}.part"
        there = _appended(cache, root, part, piece)
        if there == piece.size:
            _publish(root, part, path, piece)
        return there


def _appended(cache: VolumeCache, root: Path, part: Path, piece: Piece) -> int:
    if piece.start == 0:
        cache.shelf.room.make(root, piece.size, piece.size)
        part.unlink(missing_ok=True)
        part.touch()
    try:
        there = part.stat().st_size
    except FileNotFoundError:
        raise SourceInvalid(
            "its first pieces are gone", "Begin again with the first one."
        ) from None
    end = piece.start + len(piece.data)
    if end > piece.size or piece.start > there:
        raise SourceInvalid(f"the next piece begins at {there}", "Send the pieces in order.")
    with part.open("r+b") as stream:
        stream.seek(piece.start)
        stream.write(piece.data)
        stream.flush()
        os.fsync(stream.fileno())  # another worker may take the next piece
    return max(end, there)


def _publish(root: Path, part: Path, path: Path, piece: Piece) -> None:
    try:
        if (found := sha256_of(part)) != piece.sha256:
            raise LoraCorrupt(
                f"what came has the sha256 {found[:12]}, not {piece.sha256[:12]}",
                "Upload it again.",
            )
        read_header(part)
    except LoraCorrupt:
        part.unlink(missing_ok=True)
        raise
    status = part.stat()
    # Without a time of download it is never evicted: nobody could fetch it again.
    record = Record(piece.name, piece.sha256, status.st_size, status.st_mtime_ns, None)
    write(root, record_path(path), record)
    replace_durably(part, path)
