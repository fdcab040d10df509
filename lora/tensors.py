"""The tensors of a .safetensors file: read or mapped, and checked for NaN and infinity on the way.

A file of hundreds of megabytes is to be there in milliseconds, so nothing is copied that need not be: the
tensors are views of one buffer. They are never written to.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lora.errors import LoraCorrupt
from lora.header import Header, TensorInfo

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}

LARGEST_FINITE: Mapping[str, tuple[int, int]] = {
    "F64": (8, 0x7FEF_FFFF_FFFF_FFFF),
    "F32": (4, 0x7F7F_FFFF),
    "F16": (2, 0x7BFF),
    "BF16": (2, 0x7F7F),
    "F8_E4M3": (1, 0x7E),
    "F8_E5M2": (1, 0x7B),
}
"""Bytes of a number, and the largest finite one's bits: above lie infinity and NaN, up to the sign bit."""

NOT_A_NUMBER: Mapping[str, int] = {"F8_E4M3FNUZ": 0x80, "F8_E5M2FNUZ": 0x80, "F8_E8M0": 0xFF}
"""The one byte that is none, in the formats that have neither infinity nor a negative zero."""

READ_BYTES = 8 << 20
THREADS = 2
"""Reading and checking is bound by memory; more threads gained nothing on two cores."""


def read_tensors(path: Path, header: Header, *, mapped: bool) -> dict[str, Tensor]:
    """Every tensor of the file, on the CPU.

    `mapped`: the file's pages are used as they lie in the page cache, without a copy. Only for a file on
    a local disk that no one changes in place: its bytes would change under us, or the process would die.

    Raises: LoraCorrupt if the file is not as its header says any more, or a tensor holds NaN or infinity.
    """
    try:
        buffer = _map(path) if mapped else _read(path)
    except (OSError, ValueError) as error:  # ValueError: there is nothing to map
        raise LoraCorrupt("the file's tensors cannot be read") from error
    if len(buffer) < max(info.end for info in header.tensors.values()):
        raise LoraCorrupt("the file became shorter while it was read")
    runs = list(_runs(header))
    _check_finite(buffer, runs)
    tensors: dict[str, Tensor] = {}
    for run in runs:
        tensors.update(_views(buffer, run))
    return tensors


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as stream:
        # A private, writable mapping: torch wants a writable buffer, and no write could reach the file.
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)


def _read(path: Path) -> mmap.mmap:
    """The file's bytes in memory of our own."""
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        memory = mmap.mmap(-1, size)
        view = memoryview(memory)
        part = (size // THREADS // READ_BYTES + 1) * READ_BYTES

        def fill(start: int) -> None:
            place, end = start, min(start + part, size)
            while place < end:
                count = os.preadv(
                    stream.fileno(), [view[place : min(place + READ_BYTES, end)]], place
                )
                if not count:
                    raise LoraCorrupt("the file became shorter while it was read")
                place += count

        with ThreadPoolExecutor(THREADS) as threads:
            list(threads.map(fill, range(0, size, part)))
    return memory


@dataclass(frozen=True)
class _Run:
    """Tensors of one dtype that follow each other without a gap."""

    dtype: str
    names: list[str]
    infos: list[TensorInfo]

    @property
    def start(self) -> int:
        return self.infos[0].start

    @property
    def end(self) -> int:
        return self.infos[-1].end


def _runs(header: Header) -> Iterator[_Run]:
    run: _Run | None = None
    for name, info in sorted(header.tensors.items(), key=lambda item: item[1].start):
        if run and run.dtype == info.dtype and run.end == info.start:
            run.names.append(name)
            run.infos.append(info)
            continue
        if run:
            yield run
        run = _Run(info.dtype, [name], [info])
    if run:
        yield run


def _views(buffer: mmap.mmap, run: _Run) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a run, all in one storage: a change of dtype or device takes one step for all."""
    dtype, start = DTYPES[run.dtype], run.start
    if start == run.end:
        whole = torch.empty(0, dtype=dtype)
    elif start % dtype.itemsize:  # the format allows it, processors do not like it
        whole = torch.frombuffer(bytearray(buffer[start : run.end]), dtype=dtype)
    else:
        count = (run.end - start) // dtype.itemsize
        whole = torch.frombuffer(buffer, dtype=dtype, count=count, offset=start)
    for name, info in zip(run.names, run.infos, strict=True):
        first, last = (info.start - start) // dtype.itemsize, (info.end - start) // dtype.itemsize
        yield name, whole[first:last].view(info.shape)


def _check_finite(buffer: mmap.mmap, runs: list[_Run]) -> None:
    """Raises: LoraCorrupt with the first tensor that holds NaN or infinity."""
    pieces = [
        (run.dtype, place, min(place + READ_BYTES, run.end))
        for run in runs
        if run.dtype in LARGEST_FINITE or run.dtype in NOT_A_NUMBER
        for place in range(run.start, run.end, READ_BYTES)
    ]
    with ThreadPoolExecutor(THREADS) as threads:
        if all(threads.map(lambda piece: _all_finite(buffer, *piece), pieces)):
            return
    for run in runs:
        for name, info in zip(run.names, run.infos, strict=True):
            if not _all_finite(buffer, run.dtype, info.start, info.end):
                raise LoraCorrupt(f"the tensor {name[:200]} holds NaN or infinity")


def _all_finite(buffer: mmap.mmap, dtype: str, start: int, end: int) -> bool:
    """By the bits: of unsigned numbers the largest tells of negative ones, of signed of positive ones."""
    if dtype in NOT_A_NUMBER:
        return NOT_A_NUMBER[dtype] not in np.frombuffer(buffer, np.uint8, end - start, start)
    if dtype not in LARGEST_FINITE:
        return True
    width, largest = LARGEST_FINITE[dtype]
    bits = np.frombuffer(buffer, np.dtype(f"u{width}"), (end - start) // width, start)
    step, sign = (
        (1 << 19) // width,
        1 << (8 * width - 1),
    )  # half a megabyte: the second look is cached
    for place in range(0, len(bits), step):
        piece = bits[place : place + step]
        if int(piece.view(f"i{width}").max()) > largest or int(piece.max()) > largest + sign:
            return False
    return True
