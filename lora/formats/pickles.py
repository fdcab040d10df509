"""Converts files of torch.save (.pt, .pth, .bin, .ckpt) to .safetensors. No code in them is ever run."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lora.errors import LoraCorrupt, LoraTooLarge, LoraUnsupported

WRAPPERS = ("state_dict", "module", "model")
"""Keys under which trainers put the tensors, where the file also holds an optimiser's state and the like."""

MAX_TEXT = 1_000_000
"""How many characters of a value are kept as metadata."""


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
    there is more than tensors and plain values, LoraTooLarge, LoraCorrupt.
    """
    # Not at the top: the cache and the downloads work without torch.
    import torch
    from safetensors.torch import save_file

    try:
        if zipfile.is_zipfile(source):
            with zipfile.ZipFile(source) as archive:
                unpacked = sum(entry.file_size for entry in archive.infolist())
            if unpacked > limit:
                raise LoraTooLarge(
                    f"the pickle unpacks to {unpacked / 1e6:.0f} MB",
                    "The limit is LORA_MAX_FILE_MB.",
                )
        content = torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise LoraUnsupported(
            "the pickle holds more than tensors, and pickles are never run",
            "If you trust it, convert it to .safetensors on your own machine.",
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise LoraCorrupt("the file is a broken pickle") from error
    tensors: dict[str, torch.Tensor] = {}
    metadata: dict[str, str] = {}
    for name, value in _leaves(content):
        if isinstance(value, torch.Tensor):
            tensors[name] = value.detach().to_dense().clone(memory_format=torch.contiguous_format)
        elif isinstance(value, (bool, int, float)):
            tensors[name] = torch.tensor(float(value))
        else:
            metadata[name] = str(value)[:MAX_TEXT]
    if not tensors:
        raise LoraUnsupported("the pickle holds no tensors by name")
    save_file(tensors, target, metadata={**metadata, "format": "pt"})


def _leaves(content: Any) -> Iterator[tuple[str, Any]]:
    """(name, value) of the file's tensors and of the values beside them.

    Raises: LoraUnsupported if it is no table of named tensors.
    """
    if not isinstance(content, Mapping):
        raise LoraUnsupported("the pickle is no table of named tensors")
    wrapped = (content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping))
    for name, value in next(wrapped, content).items():
        if isinstance(value, Mapping):
            yield str(name), json.dumps(value, default=lambda _: "…", skipkeys=True)
        else:
            yield str(name), value
