"""The hashes by which sites and tools know an adapter file.

| name | what is hashed | who says it |
| --- | --- | --- |
| sha256 | the whole file | Civitai (SHA256), the hub |
| AutoV1 | 64 KiB from the first MiB on; 8 digits | A1111's first hash, Civitai (AutoV1) |
| AutoV2 | the whole file; 10 digits of the sha256 | Civitai (AutoV2) |
| AutoV3 | the file without its header; 12 digits | Civitai (AutoV3), A1111's `Lora hashes` in pictures |
| model hash | the file without its header; all digits | kohya (`sshs_model_hash`) |
| legacy hash | as AutoV1, of the file with `ss_` metadata alone; 8 digits | kohya (`sshs_legacy_hash`) |
| CRC32 | the whole file | Civitai (CRC32) |

From sd-scripts `train_util.precalculate_safetensors_hashes`, `addnet_hash_safetensors` and
`addnet_hash_legacy`; Civitai's are as its API and its scanner name them. No torch.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lora.formats.header import Header, read_header

PIECE = 1 << 20

LEGACY_START, LEGACY_BYTES = 1 << 20, 1 << 16
"""What A1111's first hash looked at."""

AUTOV1_DIGITS, AUTOV2_DIGITS, AUTOV3_DIGITS = 8, 10, 12

ALIGNMENT = 8
"""To which the safetensors library fills a header with spaces."""


@dataclass(frozen=True)
class Hashes:
    """A file's hashes, in lower-case hex."""

    sha256: str
    autov1: str
    autov2: str
    crc32: str
    model_hash: str | None = None
    """Of the tensors' bytes; None for what is no .safetensors file."""
    autov3: str | None = None
    legacy_hash: str | None = None


def hashes_of(path: Path) -> Hashes:
    """All hashes of a file, which is read once, a megabyte at a time.

    Raises: OSError; LoraError if it ends in `.safetensors` and is none.
    """
    header = read_header(path) if path.suffix == ".safetensors" else None
    whole, data, crc = hashlib.sha256(), hashlib.sha256(), 0
    place, start = 0, _data_start(header)
    for piece in _pieces(path):
        whole.update(piece)
        crc = zlib.crc32(piece, crc)
        if header is not None:
            data.update(memoryview(piece)[max(0, start - place) :])
        place += len(piece)
    sha256 = whole.hexdigest()
    autov1 = _part_hash(path, LEGACY_START, LEGACY_BYTES)
    if header is None:
        return Hashes(sha256, autov1, sha256[:AUTOV2_DIGITS], f"{crc:08x}")
    model_hash = data.hexdigest()
    return Hashes(
        sha256=sha256,
        autov1=autov1,
        autov2=sha256[:AUTOV2_DIGITS],
        crc32=f"{crc:08x}",
        model_hash=model_hash,
        autov3=model_hash[:AUTOV3_DIGITS],
        legacy_hash=_legacy_hash(path, header),
    )


def _data_start(header: Header | None) -> int:
    return min((info.start for info in header.tensors.values()), default=0) if header else 0


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        while piece := stream.read(PIECE):
            yield piece


def _part_hash(path: Path, start: int, count: int) -> str:
    with path.open("rb") as stream:
        stream.seek(start)
        return hashlib.sha256(stream.read(count)).hexdigest()[:AUTOV1_DIGITS]


def _legacy_hash(path: Path, header: Header) -> str | None:
    """kohya's: the trainer hashes the file before it adds its last metadata, so its header is shorter.

    None where that header reaches beyond the first MiB: its order is not known, so nor are its bytes.
    """
    kept = {key: text for key, text in header.metadata.items() if key.startswith("ss_")}
    length = _header_length(header, kept)
    if length > LEGACY_START:
        return None
    return _part_hash(path, _data_start(header) + LEGACY_START - length, LEGACY_BYTES)


def _header_length(header: Header, metadata: Mapping[str, str]) -> int:
    """Bytes before the tensors' own in a file with this metadata, as the safetensors library writes it."""
    start = _data_start(header)
    fields: dict[str, object] = {"__metadata__": dict(metadata)}
    for name, info in header.tensors.items():
        offsets = [info.start - start, info.end - start]
        fields[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": offsets}
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":"))
    return 8 + -(-len(text.encode()) // ALIGNMENT) * ALIGNMENT
