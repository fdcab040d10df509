"""Writes an adapter's tensors under the keys of a naming, as a file or PEFT folder: whole, or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from lora.durable import write_durably
from lora.errors import ToolError
from lora.formats.alphas import CONFIG_IN_FILE
from lora.formats.contents import NOT_FLOATING
from lora.formats.names.naming import Naming
from lora.formats.peft import PEFT_CONFIG, PEFT_STEM
from lora.tools import HEADER_ALIGNMENT, Format, dtype_name
from lora.tools.adapters.hashes import HASH_FIELDS, LEGACY_BYTES, LEGACY_START
from lora.tools.adapters.part_names import names_for
from lora.tools.adapters.parts import Adapter
from lora.tools.adapters.peft_configs import USE_OTHER_NAMING, ConfigPart, config_of
from lora.tools.overwriting import refuse_misnamed, refuse_other_kind, refuse_overwriting
from lora.tools.writing import published_folder, write_errors, write_pytorch

STALE = (*HASH_FIELDS, CONFIG_IN_FILE)
"""Metadata about the bytes or the naming of the file that was read."""


@dataclass(frozen=True)
class WriteOptions:
    """How an adapter is written."""

    naming: Naming | None = None
    """None: the keys that the adapter was read with."""
    dtype: torch.dtype | None = None
    """Of the tensors; None: each keeps its own. Alphas always keep theirs, so that no scaling changes."""
    format: Format = Format.SAFETENSORS
    overwrite: bool = False
    """Whether what is at the output is replaced, once the new adapter is whole: see `refuse_overwriting`."""


@dataclass(frozen=True, eq=False)
class _Laid:
    """What goes into the file."""

    tensors: dict[str, Tensor]
    configs: dict[str, dict[str, Any]]
    """Component -> its PEFT config; empty where alphas are tensors."""


def write_adapter(output: Path, adapter: Adapter, options: WriteOptions = WriteOptions()) -> None:
    """Writes the adapter with its metadata and kohya's hashes. The same adapter gives the same bytes.

    With PEFT's naming `output` is a folder. A pytorch file holds tensors and no metadata. Afterwards the file
    is whole, on the disk and under its name; if anything fails, `output` is as it was before.

    Raises: ToolError if something is there that is not to be overwritten, the naming cannot express a part, a
    number overflows the dtype, the name is one of another format, or the disk is full or fails.
    """
    refuse_overwriting(output, options.overwrite)
    laid = _lay(adapter, options)
    naming = options.naming or adapter.naming
    if naming is Naming.PEFT and laid.configs:
        _write_folder(output, laid, adapter.metadata, options)
        return
    refuse_misnamed(output, options.format)
    refuse_other_kind(output, is_folder=False)
    if options.format is Format.PYTORCH:
        _refuse_lost_alphas(adapter, laid)
        write_pytorch(output, laid.tensors)
    else:
        metadata = _metadata(adapter.metadata)
        if laid.configs:
            table = {
                f"{component}.{field}".lstrip("."): value
                for component, config in laid.configs.items()
                for field, value in config.items()
            }
            metadata[CONFIG_IN_FILE] = json.dumps(dict(sorted(table.items())), indent=2)
            metadata["format"] = "pt"
        with write_errors(output):
            write_durably(output, *safetensors_of(laid.tensors, metadata))


def _lay(adapter: Adapter, options: WriteOptions) -> _Laid:
    names = names_for(adapter, options.naming)
    tensors = dict(adapter.words)
    if tensors and names.naming is Naming.PEFT:
        raise ToolError(
            "a PEFT adapter of a network holds no words for the prompt", USE_OTHER_NAMING
        )
    by_component: dict[str, list[ConfigPart]] = {}
    for part in adapter.parts:
        slots = names.slots(part)
        for slot, key in names.keys(part, slots).items():
            if key in tensors:
                raise ToolError(f"two tensors would have the name {key[:200]}")
            tensors[key] = _cast(key, slot, slots[slot], options.dtype)
        entry = ConfigPart(names.config_path(part), slots, part.rank, part.alpha)
        by_component.setdefault(names.component(part), []).append(entry)
    configs = {c: config_of(parts) for c, parts in by_component.items()} if names.has_config else {}
    return _Laid(tensors, configs)


def _cast(key: str, slot: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or slot in NOT_FLOATING or not tensor.is_floating_point():
        return tensor.contiguous()
    cast = tensor.to(dtype)
    if not bool(cast.float().isfinite().all()):
        hint = "Choose a dtype with a larger range."
        raise ToolError(f"{key[:200]} overflows {dtype_name(dtype)}", hint)
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
    """A .safetensors file in two pieces, with kohya's hashes in its metadata; the same bytes for the same
    input.

    As sd-scripts' `precalculate_safetensors_hashes` computes them: `sshs_model_hash` covers the bytes of the
    tensors, `sshs_legacy_hash` 64 KiB after the first MiB of the file with only its `ss_` metadata. If there
    is a ModelSpec, its `hash_sha256` covers the tensors too.
    """
    trained = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    plain = save(dict(tensors), trained)
    start = 8 + int.from_bytes(plain[:8], "little")
    model_hash = hashlib.sha256(memoryview(plain)[start:]).hexdigest()
    legacy = hashlib.sha256(memoryview(plain)[LEGACY_START : LEGACY_START + LEGACY_BYTES])
    hashed = {**metadata, "sshs_model_hash": model_hash, "sshs_legacy_hash": legacy.hexdigest()[:8]}
    if any(key.startswith("modelspec.") for key in metadata):
        hashed["modelspec.hash_sha256"] = f"0x{model_hash}"
    fields = json.loads(plain[8:start]) | {"__metadata__": dict(sorted(hashed.items()))}
    header = json.dumps(
        dict(sorted(fields.items())), separators=(",", ":"), ensure_ascii=False
    ).encode()
    header += b" " * (-len(header) % HEADER_ALIGNMENT)
    return len(header).to_bytes(8, "little") + header, memoryview(plain)[start:]


def _write_folder(
    output: Path, laid: _Laid, metadata: Mapping[str, str], options: WriteOptions
) -> None:
    """Writes a PEFT folder. Raises: ToolError if a file is there."""
    refuse_other_kind(output, is_folder=True)
    (config,) = laid.configs.values()
    with published_folder(output, overwrite=options.overwrite) as folder, write_errors(output):
        stem = folder / PEFT_STEM
        if options.format is Format.PYTORCH:
            write_pytorch(stem.with_suffix(".bin"), laid.tensors)
        else:
            pieces = safetensors_of(laid.tensors, _metadata(metadata))
            write_durably(stem.with_suffix(".safetensors"), *pieces)
        write_durably(folder / PEFT_CONFIG, json.dumps(config, indent=2).encode())
