"""The header of a .safetensors file, read and checked without loading a tensor.

Layout (https://huggingface.co/docs/safetensors): 8 bytes little-endian length, that many bytes of JSON
`{name: {dtype, shape, data_offsets}, "__metadata__": {str: str}}`, then the tensors' bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lora.errors import LoraCorrupt, LoraError, LoraUnsupported

MAX_HEADER_BYTES = 10_000_000
"""A tenth of the format's own limit: JSON takes up to 25 times its bytes in memory, and the largest adapters'
headers with all their tags have two million."""

MAX_DIMENSIONS, MAX_NUMBERS = 64, 1 << 60
"""The largest that torch can describe, even for an empty tensor."""

DTYPE_BYTES: Mapping[str, int] = {
    **{"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4},
    **{"F16": 2, "BF16": 2, "I16": 2, "U16": 2},
    **{"F8_E4M3": 1, "F8_E5M2": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1, "F8_E8M0": 1},
    **{"C64": 8, "I8": 1, "U8": 1, "BOOL": 1},
}


class TensorInfo(NamedTuple):
    """What the header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    """The offset of its first byte in the file."""
    end: int


@dataclass(frozen=True)
class Header:
    """Names, shapes and metadata of a file that is whole."""

    tensors: Mapping[str, TensorInfo]
    """In the order of their bytes."""
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """Reads a file's header and checks that the file is whole.

    Every tensor's byte range must fit its dtype and shape, and the last must end where the file ends. So a
    truncated download, a web page or a file of another format is refused.

    Raises: LoraCorrupt, saying what the file looks like instead; LoraUnsupported for a pickle.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise _not_safetensors(start + stream.read(512), size)
        text = stream.read(length)
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _not_safetensors(start + text[:512], size) from error
    if not isinstance(fields, dict):
        raise LoraCorrupt("the file's safetensors header is not a JSON object")
    return _checked(fields, 8 + length, size)


def _checked(fields: dict[str, Any], data_start: int, size: int) -> Header:
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise LoraCorrupt("the file's metadata is not a JSON object")
    try:
        "".join((*fields, *map(str, metadata), *map(str, metadata.values()))).encode()
    except UnicodeEncodeError as error:  # half a surrogate pair, which no answer could hold
        raise LoraCorrupt("the header's names are no Unicode text") from error
    infos = {name: _tensor_info(name, info, data_start) for name, info in fields.items()}
    tensors = dict(sorted(infos.items(), key=lambda item: (item[1].start, item[1].end)))
    end = data_start
    for info in tensors.values():
        if info.start != end:
            raise LoraCorrupt("the file's tensors overlap, or there is a gap between them")
        end = info.end
    if missing := end - size:
        trouble = f"{missing} bytes are missing" if missing > 0 else f"{-missing} bytes too many"
        raise LoraCorrupt(
            f"the file's length is not the one that its header states ({trouble})",
            "It was probably cut off on the way; upload or download it again.",
        )
    if not tensors:
        raise LoraCorrupt("the file holds no tensors")
    texts = {str(key): str(value) for key, value in metadata.items()}
    return Header(tensors, texts)


def _tensor_info(name: str, info: Any, data_start: int) -> TensorInfo:
    """Checks one entry of the header. Raises: LoraCorrupt if it is malformed or contradicts itself."""
    try:
        dtype, shape, (start, end) = info["dtype"], tuple(info["shape"]), info["data_offsets"]
        numbers = (*shape, start, end)
        whole = all(type(number) is int and 0 <= number <= MAX_NUMBERS for number in numbers)
        whole = whole and len(shape) <= MAX_DIMENSIONS
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise LoraCorrupt(f"the header's entry for {name[:80]!r} is malformed")
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise LoraCorrupt(f"tensor {name[:80]!r} has the unknown dtype {str(dtype)[:20]!r}")
    needed = DTYPE_BYTES[dtype] * math.prod(shape)
    if end - start != needed:
        raise LoraCorrupt(f"tensor {name[:80]!r} has a byte range that its shape does not fill")
    if not needed and math.prod(max(n, 1) for n in shape) > MAX_NUMBERS:
        raise LoraCorrupt(f"tensor {name[:80]!r} has an impossible shape")
    return TensorInfo(dtype, shape, data_start + start, data_start + end)


def _not_safetensors(head: bytes, size: int) -> LoraError:
    """The error for a file that is not .safetensors, by what its first bytes look like."""
    if head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")):
        return LoraUnsupported(
            "the file is a Python pickle or a zip archive", "Convert it to .safetensors."
        )
    text = head.lstrip().lower()
    if size == 0:
        return LoraCorrupt("the file is empty")
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return LoraCorrupt("the file is a web page, not an adapter (a login or error page?)")
    if head.startswith(b"version https://git-lfs"):
        return LoraCorrupt("the file is a Git LFS pointer, not the adapter itself")
    if text.startswith((b"{", b"[")):
        return LoraCorrupt("the file is JSON text, not a .safetensors file")
    return LoraCorrupt("the file is not a .safetensors file, or it was cut off within its header")
