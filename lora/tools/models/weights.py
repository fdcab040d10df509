"""Opens one file with a model's weights, .safetensors or of torch.save, without loading it."""

from __future__ import annotations

import errno
import os
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lora.errors import LoraError, ToolError
from lora.formats.header import read_header
from lora.formats.pickles import WRAPPERS, looks_like_pickle
from lora.formats.tensors import DTYPES
from lora.tools import Format, dtype_name

NAMED_DTYPES: Mapping[str, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
}
"""The names that the tools have for torch's dtypes."""


@dataclass(frozen=True)
class Raw:
    """A tensor as it is stored in its file."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


class WeightsFile(Protocol):
    """An open file with weights. `read` may be called from several threads."""

    path: Path
    kind: Format
    tensors: Mapping[str, Raw]
    """In the order in which they are in the file."""
    metadata: Mapping[str, str]
    wrapper: str
    """The key of a pickle's table under which the tensors are; empty if they are in the table itself."""

    def read(self, name: str, third: int | None = None) -> Tensor:
        """The tensor, or one of the three equal blocks of its rows, in memory of its own.

        Raises: ToolError if the file cannot be read or has become shorter.
        """

    def close(self) -> None:
        """Closes the file."""


def open_weights(path: Path, kind: str | None = None) -> WeightsFile:
    """Opens a file as what its first bytes say it is. `kind`: what it must be. Nothing in it is ever run.

    Raises: ToolError if it is unreadable, cut off, quantised, or of another kind.
    """
    try:
        head = _first_bytes(path)
    except OSError as error:
        raise unreadable(path, error) from error
    if head.startswith(b"GGUF"):
        raise ToolError(f"{path} is quantised (GGUF)", UNQUANTISED)
    is_pickle = looks_like_pickle(path)
    actual = Format.PYTORCH if is_pickle else Format.SAFETENSORS
    if kind is not None and kind != actual:
        raise ToolError(f"{path} is no {kind} file", f"Its first bytes say {actual}.")
    opened: WeightsFile = _Pickle(path) if is_pickle else _Safetensors(path)
    try:
        _refuse_quantised(path, opened.tensors.values())
    except ToolError:
        opened.close()
        raise
    return opened


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(8)


def unreadable(path: Path, error: OSError) -> ToolError:
    """The error for a file that the system refuses to read."""
    return ToolError(f"{path} cannot be read ({error.strerror or type(error).__name__})")


UNQUANTISED = "Give the model before its quantisation: fp32, fp16, bf16 or fp8."

_SCALED = ("scale_weight", "weight_scale", "scaled_fp8", "scale_input", "input_scale")
_COMPANIONS = {
    **dict.fromkeys(_SCALED, "fp8 with a scale beside each weight"),
    "comfy_quant": "ComfyUI's quantisation",
    **dict.fromkeys(("absmax", "quant_map"), "bitsandbytes"),
    "SCB": "bitsandbytes' int8",
    **dict.fromkeys(("qweight", "qzeros"), "GPTQ or AWQ"),
}
"""Last word of the name of a tensor that comes with packed weights -> the quantisation that has it."""


def _refuse_quantised(path: Path, tensors: Iterable[Raw]) -> None:
    for raw in tensors:
        how = _COMPANIONS.get(raw.name.rpartition(".")[2])
        if ".quant_state." in raw.name:
            how = "bitsandbytes"
        elif raw.name.endswith(".weight") and not raw.dtype.is_floating_point:
            how = f"a weight of {dtype_name(raw.dtype)}"
        if how:
            raise ToolError(
                f"{path} is quantised ({raw.name[:200]}: {how}), and its weights cannot be changed",
                UNQUANTISED,
            )


class _Safetensors:
    """Tensors are read from their positions when they are asked for."""

    kind, wrapper = Format.SAFETENSORS, ""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            header = read_header(path)
            self._descriptor = os.open(path, os.O_RDONLY)
        except LoraError as error:
            raise ToolError(f"{path}: {error.sentence}", error.hint) from error
        except OSError as error:
            raise unreadable(path, error) from error
        self._infos = dict(sorted(header.tensors.items(), key=lambda item: item[1].start))
        self.metadata = header.metadata
        self.tensors: Mapping[str, Raw] = {
            name: Raw(name, path, info.shape, DTYPES[info.dtype])
            for name, info in self._infos.items()
        }

    def read(self, name: str, third: int | None = None) -> Tensor:
        info, shape = self._infos[name], self.tensors[name].shape
        start, count = info.start, info.end - info.start
        if third is not None:
            count, shape = count // 3, (shape[0] // 3, *shape[1:])
            start += third * count
        return self._bytes(start, count).view(DTYPES[info.dtype]).reshape(shape)

    def _bytes(self, start: int, count: int) -> Tensor:
        buffer = torch.empty(count, dtype=torch.uint8)
        view = memoryview(buffer.numpy())  # type: ignore[arg-type]
        done = 0
        try:
            while done < count:
                got = os.preadv(self._descriptor, [view[done:]], start + done)
                if not got:
                    raise ToolError(f"{self.path} became shorter while it was read")
                done += got
        except OSError as error:
            raise unreadable(self.path, error) from error
        return buffer

    def close(self) -> None:
        os.close(self._descriptor)


class _Pickle:
    """Mapped where torch can do that; files from before torch 1.6 are loaded whole."""

    kind = Format.PYTORCH

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: Mapping[str, str] = {}
        table = _load(path)
        self.wrapper = next((key for key in WRAPPERS if isinstance(table.get(key), Mapping)), "")
        if self.wrapper:
            table = table[self.wrapper]
        self._tensors = {
            str(name): value.detach().to_dense()
            for name, value in table.items()
            if isinstance(value, Tensor)
        }
        if not self._tensors:
            raise ToolError(f"{path} holds no tensors by name")
        self.tensors: Mapping[str, Raw] = {
            name: Raw(name, path, tuple(tensor.shape), tensor.dtype)
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str, third: int | None = None) -> Tensor:
        whole = self._tensors[name]
        part = whole if third is None else whole.chunk(3)[third]
        return part.clone(memory_format=torch.contiguous_format)

    def close(self) -> None:
        self._tensors.clear()


def _load(path: Path) -> Mapping[Any, Any]:
    """The table in a pickle. Raises: ToolError if there is none, or it holds more than tensors and values."""
    try:
        mapped = _first_bytes(path).startswith(b"PK")
        table = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise ToolError(
            f"{path} is a pickle that holds more than tensors, and pickles are never run",
            "If you trust it, convert it to .safetensors on your own machine.",
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        # In a file that is cut off torch seeks before the beginning (EINVAL); others are the system's errors.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise unreadable(path, error) from error
        raise ToolError(f"{path} is a broken pickle, or not all of one") from error
    if not isinstance(table, Mapping):
        raise ToolError(f"{path} is no table of named tensors")
    return table
