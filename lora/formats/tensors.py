"""Reads or maps the tensors of a .safetensors file, and checks them for NaN and infinity.

A file of hundreds of megabytes must load in milliseconds, so nothing is copied without need: the tensors are
views of one buffer. They are never written to.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from pathlib import Path

import torch
from torch import Tensor

from lora.errors import LoraCorrupt
from lora.formats.header import Header, TensorInfo

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

READ_BYTES, THREADS = 8 << 20, 2
"""How a file that is not mapped is read into memory: in pieces of this size, by so many threads."""


@dataclass(frozen=True)
class Run:
    """Tensors of one dtype that follow each other without a gap, in one storage."""

    whole: Tensor
    """[numbers]."""
    entries: list[tuple[str, TensorInfo]]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Each tensor with its name, as a view: so one operation changes the dtype or device of all."""
        size, start = self.whole.element_size(), self.entries[0][1].start
        for name, info in self.entries:
            # Row-major: a stride is the product of the lengths behind it, without the product of all.
            strides = list(accumulate(reversed(info.shape), mul, initial=1))[-2::-1]
            # One call of torch per tensor, where slicing and shaping would be two: files have thousands.
            yield name, self.whole.as_strided(info.shape, strides, (info.start - start) // size)


def read_runs(path: Path, header: Header, *, mapped: bool) -> list[Run]:
    """Every tensor of the file, on the CPU.

    `mapped`: the tensors use the pages of the page cache, without a copy. Only for a file on a local disk
    that no one changes in place: a change would alter the tensors, or kill the process.

    Raises: LoraCorrupt if the file no longer is as its header says, or a tensor holds NaN or infinity.
    """
    try:
        buffer = _map(path) if mapped else _read(path)
    except (OSError, ValueError) as error:  # ValueError: there is nothing to map
        raise LoraCorrupt("the file's tensors cannot be read") from error
    if len(buffer) < max(info.end for info in header.tensors.values()):
        raise LoraCorrupt("the file became shorter while it was read")
    runs = list(_runs(header, buffer))
    for run in runs:
        _check_finite(run)
    return runs


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as stream:
        # Private and writable: torch requires a writable buffer, and no write can reach the file.
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)


def _read(path: Path) -> mmap.mmap:
    """The file's bytes, read into our own memory."""
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        memory = mmap.mmap(-1, size)
        view = memoryview(memory)
        part = (size // THREADS // READ_BYTES + 1) * READ_BYTES

        def fill(start: int) -> None:
            end = min(start + part, size)
            while start < end:
                piece = view[start : min(start + READ_BYTES, end)]
                count = os.preadv(stream.fileno(), [piece], start)
                if not count:
                    raise LoraCorrupt("the file became shorter while it was read")
                start += count

        with ThreadPoolExecutor(THREADS) as threads:
            list(threads.map(fill, range(0, size, part)))
    return memory


def _runs(header: Header, buffer: mmap.mmap) -> Iterator[Run]:
    entries: list[tuple[str, TensorInfo]] = []
    for name, info in header.tensors.items():
        if entries:
            last = entries[-1][1]
            if (last.dtype, last.end) != (info.dtype, info.start):
                yield Run(_whole(buffer, entries[0][1], last), entries)
                entries = []
        entries.append((name, info))
    yield Run(_whole(buffer, entries[0][1], entries[-1][1]), entries)


def _whole(buffer: mmap.mmap, first: TensorInfo, last: TensorInfo) -> Tensor:
    dtype, start, end = DTYPES[first.dtype], first.start, last.end
    if start == end:
        return torch.empty(0, dtype=dtype)
    if start % dtype.itemsize:  # unaligned: the format allows it, processors handle it badly
        return torch.frombuffer(bytearray(buffer[start:end]), dtype=dtype)
    count = (end - start) // dtype.itemsize
    return torch.frombuffer(buffer, dtype=dtype, count=count, offset=start)


COMPUTING = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
"""The dtypes that torch can add and multiply; narrower ones are only for storing."""


def _check_finite(run: Run) -> None:
    """Raises: LoraCorrupt with the first tensor of the run that holds NaN or infinity.

    If the sum is finite, all numbers are; it takes a fiftieth of the time of `torch.isfinite`. If it is not,
    the sum may have overflowed: then each tensor's is taken, and where that is not finite, each number.
    """
    if not run.whole.dtype.is_floating_point:
        return
    if run.whole.dtype in COMPUTING and bool(run.whole.sum().isfinite()):
        return
    for name, tensor in run.tensors():
        exact = tensor if tensor.dtype in COMPUTING else tensor.float()
        if not bool(exact.sum().isfinite()) and not bool(exact.isfinite().all()):
            raise LoraCorrupt(f"the tensor {name[:200]} holds NaN or infinity")
