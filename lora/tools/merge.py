"""Merges adapters into a model's weights: W + sum of scale * delta in float32, rounded once, tensor by
tensor.

The numbers are those of the engine in `Mode.MERGED`, for each of its algorithms. What no adapter changes is
copied bit for bit, as long as its dtype stays.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora.engine.merging import merge as merge_changes
from lora.engine.stack import LoraUse
from lora.errors import ToolError
from lora.formats.adapter import LoraFile
from lora.formats.algorithms import Algorithm
from lora.formats.contents import UnusedKey
from lora.formats.names.keys import KeyMap
from lora.formats.opening import load_file
from lora.tools import OnProgress, dtype_name, ignore_progress, read_ahead
from lora.tools.adapters.hashes import HASH_FIELDS
from lora.tools.adapters.metadata import json_or_empty
from lora.tools.models.checkpoints import Checkpoint, Place, Stored
from lora.tools.models.outputs import FileToWrite, Output
from lora.tools.models.weights import NAMED_DTYPES, Raw, unreadable
from lora.tools.overwriting import parts_of
from lora.tools.writing import StreamWriter

MERGED_DTYPES: Mapping[str, torch.dtype | None] = {"same": None, **NAMED_DTYPES}
"""The names of the output's dtypes; `same`: each tensor keeps its own."""

NOT_WEIGHTS = "a word's vectors cannot be merged into weights"

Changes = Mapping[Place, Sequence[tuple[Algorithm, float]]]
"""Parameter -> what changes it, and the scale of each change."""


@dataclass(frozen=True)
class MergeOptions:
    """How the result is written."""

    dtype: str = "same"
    """One of `MERGED_DTYPES`. fp8 (float8_e4m3fn) is only for weights of two or more axes; the others and the
    VAE become bf16. Tensors that are no parameters, such as EMA copies, always keep their dtype."""
    format: str | None = None
    """One of `FILE_FORMATS`; by default what the output's name says."""
    allow_unused: bool = False
    """Whether adapters may hold tensors that have no place in the model."""
    overwrite: bool = False
    """Whether what is at the output is replaced, once the new model is whole: see `refuse_overwriting`."""


@dataclass(frozen=True)
class MergedLora:
    """What was merged of one adapter."""

    name: str
    """Its path, as it was given."""
    sha256: str
    scale: float
    used: int
    """How many of its tensors have a place in the model."""
    unused: tuple[UnusedKey, ...]


@dataclass(frozen=True)
class MergeReport:
    """What was done."""

    parameters: int
    """How many of the model's parameters were changed."""
    loras: tuple[MergedLora, ...]
    files: tuple[str, ...]
    """The names of the written files with weights."""
    left_out: tuple[str, ...]
    """Files of the input's folder that were not copied: the same weights in other forms, not merged."""
    bytes: int
    """Of the written tensors."""
    dtype: str
    seconds: float


def merge(
    model: Checkpoint,
    loras: Sequence[LoraUse[Path]],
    output: Path,
    options: MergeOptions = MergeOptions(),
    on_progress: OnProgress = ignore_progress,
) -> MergeReport:
    """Writes the model with the adapters merged; it is published whole or not at all.

    If `output` has the ending of a file with weights, it is one file in the model's own names; otherwise it
    is a folder with the model's files, of which those with weights are rewritten. The metadata gets
    `merged_from`, a JSON list of name, sha256, scale and factors, and `model_sha256`. `on_progress`: bytes.

    Raises: ToolError if the output is there already or cannot be written, if an adapter's tensor has no place
    and that is not allowed, or if a weight overflows; LoraError if an adapter cannot be read or fits nowhere.
    """
    started, done = time.monotonic(), 0
    if options.dtype not in MERGED_DTYPES:
        raise ToolError(f"{options.dtype[:40]!r} is no dtype", f"Use {', '.join(MERGED_DTYPES)}.")
    if not all(math.isfinite(factor) for use in loras for factor in use.factors):
        raise ToolError("a scale is not a number")
    parts = [part for use in loras for part in parts_of(use.lora)]
    target = Output.of(model, output, options.format, overwrite=options.overwrite, parts=parts)
    key_map = model.key_map()
    files = [_load(use.lora, key_map) for use in loras]
    merged = [_merged(use, file, options) for use, file in zip(loras, files, strict=True)]
    merging = MergedTensors(model, _changes(loras, files), options.dtype)
    total = sum(merging.bytes_of(raw) for file in target.files for raw in file.tensors)
    target.refuse_full_disk(total)

    def count(raw: Raw) -> None:
        nonlocal done
        done += merging.bytes_of(raw)
        on_progress(done, total, raw.name)

    origin = [_origin(use, lora.sha256) for use, lora in zip(loras, merged, strict=True)]
    with ThreadPoolExecutor(1) as pool, target.published() as folder:
        sha256 = pool.submit(model.sha256)
        for file in target.files:
            _write(merging, file, folder, count, lambda: (origin, sha256.result()))
    return MergeReport(
        parameters=len(merging.changes),
        loras=tuple(merged),
        files=tuple(file.name.name for file in target.files),
        left_out=target.left_out,
        bytes=total,
        dtype=options.dtype,
        seconds=time.monotonic() - started,
    )


def _origin(use: LoraUse[Path], sha256: str) -> dict[str, Any]:
    """An adapter's entry in `merged_from`."""
    entry = {"name": use.lora.name, "sha256": sha256, "scale": use.scale}
    factors = {"components": dict(use.components), "blocks": dict(use.blocks)}
    return entry | {name: table for name, table in factors.items() if table}


def _load(path: Path, key_map: KeyMap) -> LoraFile:
    """Raises: LoraError or ToolError, with the adapter's name."""
    try:
        return load_file(path, key_map)
    except OSError as error:
        raise unreadable(path, error) from error


def _merged(use: LoraUse[Path], file: LoraFile, options: MergeOptions) -> MergedLora:
    """Raises: ToolError for a range, or if a tensor has no place in the model, and that is not allowed."""
    if use.ranged:
        raise ToolError(f"{use.lora} has a start or an end, and merged weights have neither")
    words = {embedding.word or "a new word" for embedding in file.embeddings}
    unused = (*file.unused, *(UnusedKey(word, NOT_WEIGHTS) for word in sorted(words)))
    used = file.keys - len(file.embeddings)
    if unused and not options.allow_unused:
        first = unused[0]
        raise ToolError(
            f"{len(unused)} of {use.lora}'s {used + len(unused)} tensors have no place in this model, "
            f"the first of them {first.key[:200]} ({first.reason})",
            "Allow unused tensors to merge the rest.",
        )
    return MergedLora(str(use.lora), file.sha256, use.scale, used, unused)


def _changes(loras: Sequence[LoraUse[Path]], files: Sequence[LoraFile]) -> Changes:
    changes: dict[Place, list[tuple[Algorithm, float]]] = defaultdict(list)
    for use, file in zip(loras, files, strict=True):
        for layer in file.layers:
            if scale := use.scale_of(layer.target):
                place = Place(layer.target.component, layer.target.path, layer.parameter)
                changes[place].append((layer.algorithm, scale))
    return changes


def _write(
    merging: MergedTensors,
    file: FileToWrite,
    folder: Path,
    count: Callable[[Raw], None],
    origin: Callable[[], tuple[list[dict[str, Any]], str]],
) -> None:
    """Writes one of the output's files. `origin`: the merged adapters, and the hash of the model."""
    # The widest numbers first, so that every tensor is aligned to the size of its own numbers.
    order = sorted(file.tensors, key=lambda raw: -merging.dtype_of(raw).itemsize)
    kept = {name: text for name, text in file.metadata.items() if name not in HASH_FIELDS}
    names = [raw.name for raw in order]
    with file.stream(folder) as path, StreamWriter(path, names, kept) as writer:
        with ThreadPoolExecutor(1) as pool:
            writing: Future[None] | None = None
            for raw, whole in read_ahead(order, merging.model.read_raw):
                tensor = merging.tensor(raw, whole)
                if writing is not None:
                    writing.result()
                writing = pool.submit(writer.put, {raw.name: tensor})
                count(raw)
            if writing is not None:
                writing.result()
        adapters, sha256 = origin()
        earlier = json_or_empty(kept.get("merged_from"), list)
        writer.finish({"merged_from": json.dumps([*earlier, *adapters]), "model_sha256": sha256})


@dataclass(frozen=True)
class MergedTensors:
    """The model's tensors with the adapters merged: their numbers and dtypes."""

    model: Checkpoint
    changes: Changes
    dtype: str

    def dtype_of(self, raw: Raw) -> torch.dtype:
        """The dtype in which a tensor is written."""
        stored = self.model.holds.get(raw)
        dtype = MERGED_DTYPES[self.dtype]
        if dtype is None or not stored:
            return raw.dtype
        small = dtype.itemsize == 1 and (len(raw.shape) < 2 or stored[0].place.component == "vae")
        return torch.bfloat16 if small else dtype

    def bytes_of(self, raw: Raw) -> int:
        """The bytes that a tensor will have."""
        return torch.Size(raw.shape).numel() * self.dtype_of(raw).itemsize

    @torch.no_grad()
    def tensor(self, raw: Raw, whole: Tensor) -> Tensor:
        """The tensor with every change. Raises: ToolError if a number overflows."""
        stored, dtype = self.model.holds.get(raw, ()), self.dtype_of(raw)
        if not any(parameter.place in self.changes for parameter in stored):
            return _rounded(raw.name, whole, dtype)
        merged = torch.empty_like(whole, dtype=dtype)
        for parameter in stored:
            place, original = parameter.place, _view(whole, parameter).contiguous()
            name, changes = str(place), self.changes.get(place)
            weight = _changed(name, original, changes, dtype) if changes else original
            _view(merged, parameter).copy_(_rounded(name, weight, dtype))
        return merged


def _changed(
    name: str, original: Tensor, changes: Sequence[tuple[Algorithm, float]], dtype: torch.dtype
) -> Tensor:
    """The merged weight; for fp8 in float32, because rounding to fp8 would hide an overflow."""
    weight = torch.empty_like(original, dtype=torch.float32 if dtype.itemsize == 1 else dtype)
    total = merge_changes(weight, original, changes)
    # Only where the dtype stays does a finite sum prove that no number overflowed.
    if weight.dtype == original.dtype and bool(total.isfinite()):
        return weight
    return _checked(name, weight, original)


def _rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in another dtype. Raises: ToolError if a number is too large for it."""
    if dtype == tensor.dtype:
        return tensor
    # torch rounds what is too large for float8_e4m3fn to its largest number.
    if dtype.itemsize == 1 and tensor.numel():
        largest = float(tensor.float().abs().max())
        if not largest <= torch.finfo(dtype).max:  # true for NaN, too
            raise _overflow(name, dtype)
    return _checked(name, tensor.to(dtype), tensor)


def _view(whole: Tensor, stored: Stored) -> Tensor:
    """The parameter's own numbers in a stored tensor, [out, in(, kh, kw)]."""
    if stored.third is not None:
        rows = whole.shape[0] // 3
        return whole.narrow(0, stored.third * rows, rows)
    return whole.t() if stored.transposed else whole


def _checked(name: str, tensor: Tensor, original: Tensor) -> Tensor:
    """Raises: ToolError if the tensor holds NaN or infinity, and the original does not."""
    if not _finite(tensor) and _finite(original):
        raise _overflow(name, tensor.dtype)
    return tensor


def _overflow(name: str, dtype: torch.dtype) -> ToolError:
    hint = "Choose a smaller scale or a wider dtype."
    return ToolError(f"{name[:200]} overflows {dtype_name(dtype)}", hint)


def _finite(tensor: Tensor) -> bool:
    """First by the sum, in a tenth of the time; the sum may overflow where no number does."""
    numbers = tensor.float()
    return bool(numbers.sum().isfinite()) or bool(numbers.isfinite().all())
