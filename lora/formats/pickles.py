"""Converts files of torch.save (.pt, .pth, .bin, .ckpt) to .safetensors. No code in them is ever run.

What is made of a pickle has no relation to its size: 600 bytes describe gigabytes. So all is counted before
it is made, and a stranger's pickle is read by another process (`lora.formats.apart`).
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora.errors import LoraCorrupt, LoraError, LoraTooLarge, LoraUnsupported

if TYPE_CHECKING:
    import torch

WRAPPERS = ("state_dict", "module", "model")
"""Keys under which trainers put the tensors, where the file also holds an optimiser's state and the like."""

MAX_TEXT = 1_000_000
"""How many characters of all values together are kept as metadata."""

MAX_PARTS, MAX_DEPTH = 10_000, 20
"""Of a list or table that is kept as metadata; a larger one is left out."""

LEFT_OUT = "…"


def looks_like_pickle(path: Path) -> bool:
    """Whether the first bytes are those of a file of torch.save, in its old or new form.

    A .safetensors file begins with its header's length in eight bytes. The first of them may be any, but the
    last four are zero, and a brace follows.
    """
    with path.open("rb") as stream:
        head = stream.read(9)
    starts = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04")
    return head.startswith(starts) and head[4:] != bytes(4) + b"{"


def convert(source: Path, target: Path, limit: int) -> None:
    """Writes the tensors of `source`, at most `limit` bytes unpacked, to `target`.

    Plain numbers become tensors, since alpha often is one; text becomes metadata. Raises: LoraUnsupported if
    there is more than tensors and plain values, LoraTooLarge, LoraCorrupt; OSError if `target` cannot be
    written.
    """
    # Not at the top: the cache and the downloads work without torch.
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    metadata: dict[str, str] = {}
    content = _loaded(source, limit)
    for name, value in _leaves(content):
        if isinstance(value, torch.Tensor):
            tensors[name] = value.detach()
        elif isinstance(value, (bool, int, float)):
            tensors[name] = torch.tensor(_number(name, value))
        else:
            metadata[name] = _text(value)[: MAX_TEXT - sum(map(len, metadata.values()))]
    if not tensors:
        raise LoraUnsupported("the pickle holds no tensors by name")
    _check_size(tensors, limit)
    try:
        save_file(_each_alone(tensors), target, metadata={**metadata, "format": "pt"})
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise LoraUnsupported("the pickle's tensors cannot be kept as .safetensors") from error


def _loaded(source: Path, limit: int) -> Any:
    """What the pickle holds. Raises: LoraError."""
    import torch

    try:
        if zipfile.is_zipfile(source):
            with zipfile.ZipFile(source) as archive:
                unpacked = sum(entry.file_size for entry in archive.infolist())
            if unpacked > limit:
                raise _too_large(unpacked)
        return torch.load(source, map_location="cpu", weights_only=True)
    except LoraError:
        raise
    except pickle.UnpicklingError as error:
        raise LoraUnsupported(
            "the pickle holds more than tensors, and pickles are never run",
            "If you trust it, convert it to .safetensors on your own machine.",
        ) from error
    except MemoryError as error:
        raise LoraTooLarge("the pickle unpacks to more than memory holds") from error
    except Exception as error:
        raise LoraCorrupt("the file is a broken pickle") from error


def _check_size(tensors: Mapping[str, torch.Tensor], limit: int) -> None:
    """Raises: LoraUnsupported for a tensor that is not plain; LoraTooLarge if all are over the limit.

    A tensor that repeats a stored number counts with all its repetitions, as the file will hold them.
    """
    import torch

    total = 0
    for name, tensor in tensors.items():
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not plain or tensor.is_quantized or tensor.is_nested:
            raise LoraUnsupported(
                f"the pickle's tensor {name[:80]!r} is sparse, quantized or nested"
            )
        total += tensor.numel() * tensor.element_size()
        if total > limit:
            raise _too_large(total)


def _each_alone(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors, none of which shares its numbers with another; only those that do are copied."""
    import torch

    seen = set[int]()
    alone: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        whole = storage.nbytes() == tensor.numel() * tensor.element_size()
        if not whole or not tensor.is_contiguous() or storage.data_ptr() in seen:
            tensor = tensor.clone(memory_format=torch.contiguous_format)  # noqa: PLW2901
        seen.add(tensor.untyped_storage().data_ptr())
        alone[name] = tensor
    return alone


def _too_large(size: int) -> LoraTooLarge:
    return LoraTooLarge(
        f"the pickle unpacks to {size / 1e6:.0f} MB", "The limit is LORA_MAX_FILE_MB."
    )


def _number(name: str, value: float) -> float:
    try:
        return float(value)
    except OverflowError as error:
        raise LoraCorrupt(f"the pickle's {name[:80]!r} is no number that a LoRA has") from error


def _leaves(content: Any) -> Iterator[tuple[str, Any]]:
    """(name, value) of the file's tensors and of the values beside them.

    Raises: LoraUnsupported if it is no table of named tensors.
    """
    if not isinstance(content, Mapping):
        raise LoraUnsupported("the pickle is no table of named tensors")
    if isinstance(params := content.get("string_to_param"), Mapping):  # A1111's embedding
        yield from ((f"string_to_param.{name}", vectors) for name, vectors in params.items())
        yield from ((str(n), _text(v)) for n, v in content.items() if n != "string_to_param")
        return
    wrapped = (content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping))
    if "layer_structure" in content and any(isinstance(name, int) for name in content):
        raise LoraUnsupported("the pickle is a hypernetwork, which is not read")
    for name, value in next(wrapped, content).items():
        if not isinstance(name, str):
            raise LoraUnsupported("the pickle is no table of named tensors")
        yield str(name), value


def _text(value: Any) -> str:
    """A value as metadata has it: text as it is, all else as JSON, or left out."""
    if isinstance(value, str):
        return value
    if value is None or not _is_small(value):
        return str(value) if value is None else LEFT_OUT
    try:
        return json.dumps(value, default=lambda _: LEFT_OUT, skipkeys=True)
    except (ValueError, RecursionError):  # an endless number, or a list within itself
        return LEFT_OUT


def _is_small(value: Any) -> bool:
    """Whether a value, written out, has few parts: shared ones count each time."""
    parts, level = 0, [value]
    for _ in range(MAX_DEPTH):
        inner = (part for one in level for part in _parts(one))
        level = list(islice(inner, MAX_PARTS + 1))
        parts += len(level)
        if not level or parts > MAX_PARTS:
            break
    return not level and parts <= MAX_PARTS


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, (list, tuple)) else ()
