"""An adapter's tensors under the keys of a naming, as a file or a PEFT folder: whole, or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from lora.durable import sync_folder, write_durably
from lora.errors import ToolError
from lora.formats.alphas import CONFIG_IN_FILE
from lora.formats.contents import NOT_FLOATING
from lora.formats.names.naming import Naming
from lora.formats.peft import PEFT_CONFIG, PEFT_STEM
from lora.tools.adapters.hashes import LEGACY_BYTES, LEGACY_START
from lora.tools.adapters.part_names import names_for
from lora.tools.adapters.parts import Adapter
from lora.tools.adapters.peft_configs import HINT, ConfigPart, config_of
from lora.tools.writing import telling, write_pytorch

STALE = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256", CONFIG_IN_FILE)
"""Metadata that tells of a file's own bytes or of its naming."""


class Format(StrEnum):
    """What kind of file is written."""

    SAFETENSORS = "safetensors"
    PYTORCH = "pytorch"


@dataclass(frozen=True)
class WriteOptions:
    """How an adapter is written."""

    naming: Naming | None = None
    """None: under the keys that it was read under."""
    dtype: torch.dtype | None = None
    """Of the tensors; None: each as it is. Alphas stay as they are, so that no scaling changes."""
    format: Format = Format.SAFETENSORS


@dataclass(frozen=True, eq=False)
class _Laid:
    """What goes into the file."""

    tensors: dict[str, Tensor]
    configs: dict[str, dict[str, Any]]
    """Component -> its PEFT config; empty where alphas are tensors."""


def write_adapter(output: Path, adapter: Adapter, options: WriteOptions = WriteOptions()) -> None:
    """Writes the adapter, with its metadata and the hashes that kohya adds to them. The same adapter gives
    the same bytes.

    PEFT's naming makes `output` a folder. A pytorch file has no metadata; it holds tensors alone. Afterwards
    the file is whole, on the disk and under its name; if anything fails, `output` is as it was before.

    Raises: ToolError if the naming cannot hold a part, with the reason; if a number overflows the dtype; if
    the disk is full or fails.
    """
    laid = _lay(adapter, options)
    naming = options.naming or adapter.naming
    if naming is Naming.PEFT and laid.configs:
        _write_folder(output, laid, adapter.metadata, options.format)
    elif options.format is Format.PYTORCH:
        _refuse_lost_alphas(adapter, laid)
        write_pytorch(output, laid.tensors)
    else:
        metadata = _metadata(adapter.metadata)
        if laid.configs:
            table = {f"{c}.{k}": v for c, config in laid.configs.items() for k, v in config.items()}
            metadata[CONFIG_IN_FILE] = json.dumps(dict(sorted(table.items())), indent=2)
            metadata["format"] = "pt"
        _write_file(output, *safetensors_of(laid.tensors, metadata))


def _lay(adapter: Adapter, options: WriteOptions) -> _Laid:
    names = names_for(adapter, options.naming)
    tensors = dict(adapter.words)
    if tensors and names.naming is Naming.PEFT:
        raise ToolError("a PEFT adapter of a network holds no words for the prompt", HINT)
    by_component: dict[str, list[ConfigPart]] = {}
    for part in adapter.parts:
        slots = names.slots(part)
        for slot, key in names.keys(part, slots).items():
            if key in tensors:
                raise ToolError(f"two tensors would have the name {key[:200]}")
            tensors[key] = _cast(key, slot, slots[slot], options.dtype)
        one = ConfigPart(names.config_path(part), slots, part.rank, part.alpha)
        by_component.setdefault(names.component(part), []).append(one)
    configs = {c: config_of(parts) for c, parts in by_component.items()} if names.has_config else {}
    return _Laid(tensors, configs)


def _cast(key: str, slot: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or slot in NOT_FLOATING or not tensor.is_floating_point():
        return tensor.contiguous()
    cast = tensor.to(dtype)
    if not bool(cast.float().isfinite().all()):
        name = str(dtype).removeprefix("torch.")
        raise ToolError(f"{key[:200]} overflows {name}", "Choose a dtype with a larger range.")
    return cast.contiguous()


def _refuse_lost_alphas(adapter: Adapter, laid: _Laid) -> None:
    if laid.configs and any(part.alpha != part.rank for part in adapter.parts):
        raise ToolError(
            "diffusers keeps alphas in a .safetensors file's metadata, which a pytorch file has not",
            "Write .safetensors, or --naming kohya or original.",
        )


def _metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    return {key: str(value) for key, value in metadata.items() if key not in STALE}


def safetensors_of(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> tuple[bytes, memoryview]:
    """A whole .safetensors file in two pieces, the same bytes for the same input, with kohya's hashes in its
    metadata.

    As sd-scripts' `precalculate_safetensors_hashes` computes them: `sshs_model_hash` of the tensors' bytes,
    `sshs_legacy_hash` of 64 KiB behind the first MiB of the file with its `ss_` metadata alone. Where there
    is a ModelSpec, its `hash_sha256` is that of the tensors too.
    """
    trained = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    plain = save(dict(tensors), trained or None)
    start = 8 + int.from_bytes(plain[:8], "little")
    model_hash = hashlib.sha256(memoryview(plain)[start:]).hexdigest()
    legacy = hashlib.sha256(memoryview(plain)[LEGACY_START : LEGACY_START + LEGACY_BYTES])
    told = {**metadata, "sshs_model_hash": model_hash, "sshs_legacy_hash": legacy.hexdigest()[:8]}
    if any(key.startswith("modelspec.") for key in metadata):
        told["modelspec.hash_sha256"] = f"0x{model_hash}"
    fields = json.loads(plain[8:start]) | {"__metadata__": dict(sorted(told.items()))}
    header = json.dumps(
        dict(sorted(fields.items())), separators=(",", ":"), ensure_ascii=False
    ).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header, memoryview(plain)[start:]


@contextmanager
def _beside(output: Path) -> Iterator[Path]:
    """A name in the output's folder that nobody else has; what stands there in the end is removed."""
    part = output.with_name(f".{output.name}.{uuid.uuid4().hex[:16]}.part")
    try:
        yield part
    finally:
        with suppress(OSError):
            shutil.rmtree(part) if part.is_dir() else part.unlink()


def _write_file(output: Path, *pieces: bytes | memoryview) -> None:
    with telling(output):
        write_durably(output, *pieces)


def _write_folder(output: Path, laid: _Laid, metadata: Mapping[str, str], written: Format) -> None:
    """A PEFT folder. Raises: ToolError if something else than an empty folder stands there."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ToolError(
            f"{output.name} exists, and a PEFT adapter is a folder of its own",
            "Name a folder that does not exist yet.",
        )
    (config,) = laid.configs.values()
    with telling(output), _beside(output) as part:
        part.mkdir()
        if written is Format.PYTORCH:
            write_pytorch(part / f"{PEFT_STEM}.bin", laid.tensors)
        else:
            _write_file(
                part / f"{PEFT_STEM}.safetensors",
                *safetensors_of(laid.tensors, _metadata(metadata)),
            )
        text = json.dumps(config, indent=2)
        _write_file(part / PEFT_CONFIG, text.encode())
        part.replace(output)
        sync_folder(output.parent)
