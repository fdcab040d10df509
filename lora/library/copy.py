"""Copies a trainer's adapter into one file for the cache: a .safetensors with its PEFT config in it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from lora.durable import part_file
from lora.errors import LoraCorrupt, LoraTooLarge
from lora.formats.alphas import CONFIG_IN_FILE
from lora.formats.endings import SAFETENSORS
from lora.formats.header import read_header
from lora.formats.pickles import convert, looks_like_pickle

PIECE = 8 << 20
"""Bytes that are copied at a time."""

ALIGNED = 8
"""The header's length is a multiple of this, as the format recommends."""


def copy_whole(weights: Path, config: str | None, target: Path, limit: int) -> str:
    """Copies an adapter of at most `limit` bytes to `target`, and returns the copy's sha256.

    The config's text goes into the copy's metadata, where readers find it as they do beside the file: one
    file is renamed at once; of two, a delete or a crash may leave only one. Pickles become .safetensors.
    Raises: LoraError if the adapter is not whole; OSError.
    """
    if weights.stat().st_size > limit:
        raise LoraTooLarge(
            f"it is over the limit of {limit / 1e6:.0f} MB", "The limit is LORA_MAX_FILE_MB."
        )
    if weights.suffix == SAFETENSORS or not looks_like_pickle(weights):
        return _copy(weights, config, target)
    with part_file(target.parent) as converted:
        convert(weights, converted, limit)
        return _copy(converted, config, target)


def _copy(source: Path, config: str | None, target: Path) -> str:
    read_header(source)
    digest = hashlib.sha256()
    with source.open("rb") as stream, target.open("wb", buffering=0) as out:
        head = stream.read(int.from_bytes(stream.read(8), "little"))
        if config is not None:
            head = _with_config(head, config)
        piece = len(head).to_bytes(8, "little") + head
        while piece:
            digest.update(piece)
            view = memoryview(piece)
            while view:
                view = view[out.write(view) :]
            piece = stream.read(PIECE)
    return digest.hexdigest()


def _with_config(head: bytes, config: str) -> bytes:
    """The header's JSON with the config in it, for every component (the empty name)."""
    try:
        fields = json.loads(head)
        metadata = dict(fields.get("__metadata__", {}))
        beside = {f".{name}": value for name, value in json.loads(config).items()}
        inside = json.loads(metadata.get(CONFIG_IN_FILE, "{}"))
        metadata[CONFIG_IN_FILE] = json.dumps({**inside, **beside})
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise LoraCorrupt("adapter_config.json is not what peft writes") from error
    text = json.dumps({**fields, "__metadata__": metadata}, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % ALIGNED)
