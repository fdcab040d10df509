"""The hashes by which sites and tools identify an adapter file.

| name | what is hashed | who uses it |
| --- | --- | --- |
| sha256 | the whole file | Civitai (SHA256), the hub |
| AutoV1 | 64 KiB from the first MiB on; 8 digits | A1111's first hash, Civitai (AutoV1) |
| AutoV2 | the whole file; 10 digits of the sha256 | Civitai (AutoV2) |
| AutoV3 | the file without its header; 12 digits | Civitai (AutoV3), A1111's `Lora hashes` in pictures |
| model hash | the file without its header; all digits | kohya (`sshs_model_hash`) |
| legacy hash | as AutoV1, of the file with `ss_` metadata alone; 8 digits | kohya (`sshs_legacy_hash`) |
| CRC32 | the whole file | Civitai (CRC32) |

From sd-scripts `train_util.precalculate_safetensors_hashes`, `addnet_hash_safetensors` and
`addnet_hash_legacy`; Civitai's names are those of its API and its scanner. No torch.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from lora.formats.header import Header, read_header
from lora.tools import HEADER_ALIGNMENT

HASH_FIELDS = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
"""Metadata in which a file carries its own hashes: stale as soon as a tensor changes."""

PIECE = 1 << 20

LEGACY_START, LEGACY_BYTES = 1 << 20, 1 << 16
"""The bytes that A1111's first hash covered."""

AUTOV1_DIGITS, AUTOV2_DIGITS, AUTOV3_DIGITS = 8, 10, 12


@dataclass(frozen=True)
class Hashes:
    """A file's hashes, in lower-case hex."""

    sha256: str
    autov1: str
    autov2: str
    crc32: str
    model_hash: str | None = None
    """Of the bytes of the tensors; None if the file is no .safetensors file."""
    autov3: str | None = None
    legacy_hash: str | None = None


def hashes_of(path: Path) -> Hashes:
    """All hashes of a file, which is read once, a megabyte at a time.

    Raises: OSError; LoraError if its name ends in `.safetensors` and it is none.
    """
    header = read_header(path) if path.suffix == ".safetensors" else None
    whole, data, crc = hashlib.sha256(), hashlib.sha256(), 0
    place, start = 0, _data_start(header)
    with path.open("rb") as stream:
        while piece := stream.read(PIECE):
            whole.update(piece)
            crc = zlib.crc32(piece, crc)
            if header is not None:
                data.update(memoryview(piece)[max(0, start - place) :])
            place += len(piece)
    sha256 = whole.hexdigest()
    autov1 = _part_hash(path, LEGACY_START, LEGACY_BYTES)
    own = Hashes(sha256, autov1, sha256[:AUTOV2_DIGITS], f"{crc:08x}")
    if header is None:
        return own
    model_hash, legacy = data.hexdigest(), _legacy_hash(path, header)
    return replace(
        own, model_hash=model_hash, autov3=model_hash[:AUTOV3_DIGITS], legacy_hash=legacy
    )


def _data_start(header: Header | None) -> int:
    return min((info.start for info in header.tensors.values()), default=0) if header else 0


def _part_hash(path: Path, start: int, count: int) -> str:
    with path.open("rb") as stream:
        stream.seek(start)
        return hashlib.sha256(stream.read(count)).hexdigest()[:AUTOV1_DIGITS]


def _legacy_hash(path: Path, header: Header) -> str | None:
    """kohya's hash. The trainer hashes the file before it adds its last metadata, so with a shorter header.

    None if that header is longer than a MiB: the hash would cover a part of it, whose order is not known.
    """
    kept = {key: text for key, text in header.metadata.items() if key.startswith("ss_")}
    length = _header_length(header, kept)
    if length > LEGACY_START:
        return None
    return _part_hash(path, _data_start(header) + LEGACY_START - length, LEGACY_BYTES)


def _header_length(header: Header, metadata: Mapping[str, str]) -> int:
    """Bytes before the tensors in a file with this metadata, as the safetensors library writes it."""
    start = _data_start(header)
    fields: dict[str, object] = {"__metadata__": dict(metadata)}
    for name, info in header.tensors.items():
        offsets = [info.start - start, info.end - start]
        fields[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": offsets}
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":"))
    return 8 + -(-len(text.encode()) // HEADER_ALIGNMENT) * HEADER_ALIGNMENT
