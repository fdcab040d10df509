"""Adapters into a model's weights: W + sum of scale * delta in float32, rounded once, one tensor at a time.

Every algorithm of the engine, with the engine's own numbers: those that `Mode.MERGED` computes.
What no adapter touches is copied bit for bit, as long as its dtype stays.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lora.engine.stack import LoraUse
from lora.errors import ToolError
from lora.formats.adapter import LoraFile, load
from lora.formats.algorithms import Algorithm
from lora.formats.contents import UnusedKey
from lora.formats.names.keys import KeyMap
from lora.tools import OnProgress, ignore_progress
from lora.tools.adapters.opening import opened
from lora.tools.merged_tensors import DTYPES, Changes, MergedTensors
from lora.tools.models.checkpoints import Checkpoint, Place, Raw, file_sha256
from lora.tools.models.outputs import Job, Output
from lora.tools.writing import StreamWriter

STALE = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
"""Metadata that would be wrong of a merged model."""

NOT_WEIGHTS = "a word's vectors cannot be merged into weights"


@dataclass(frozen=True)
class MergeOptions:
    """How the result is to be."""

    dtype: str = "same"
    """One of `DTYPES`. fp8 is float8_e4m3fn, and only for weights of two and more axes: the others and the
    VAE become bf16. Tensors that are no parameters, such as EMA copies, always keep theirs."""
    format: str | None = None
    """`safetensors` or `pytorch`; by default what the output's name says."""
    allow_unused: bool = False
    """Whether adapters may hold tensors that have no place in the model."""


@dataclass(frozen=True)
class MergedLora:
    """What became of one adapter."""

    name: str
    sha256: str
    scale: float
    used: int
    """How many of its tensors are merged."""
    unused: tuple[UnusedKey, ...]


@dataclass(frozen=True)
class MergeReport:
    """What was done."""

    parameters: int
    """How many of the model's were changed."""
    loras: tuple[MergedLora, ...]
    files: tuple[str, ...]
    """The names of the written files with weights."""
    left_out: tuple[str, ...]
    """Files of the input's folder that are not in the output's: the same weights in other forms, unmerged."""
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
    """Writes the model with the adapters merged, published whole or not at all.

    `output` with the ending of weights is one file in the model's own names; any other is a folder with the
    model's files, each with weights written anew under its own name. The metadata gets `merged_from`, a
    JSON list of name, sha256 and scale, and `model_sha256`. `on_progress` counts bytes.

    Raises: ToolError if the output is the input or cannot be written, an adapter's tensor has no place and
    that is not allowed, or a weight overflows; LoraError if an adapter cannot be read or fits nowhere.
    """
    started = time.monotonic()
    if options.dtype not in DTYPES:
        raise ToolError(f"{options.dtype[:40]!r} is no dtype", f"Use {', '.join(DTYPES)}.")
    if not all(math.isfinite(factor) for use in loras for factor in use.factors):
        raise ToolError("a scale is not a number")
    target = Output.of(model, output, options.format, [use.lora for use in loras])
    files = _load([use.lora for use in loras], model.key_map())
    merged = [_merged(use, file, options) for use, file in zip(loras, files, strict=True)]
    merging = MergedTensors(model, _changes(loras, files), options.dtype)
    total = sum(merging.bytes_of(raw) for job in target.jobs for raw in job.tensors)
    target.refuse_full_disk(total)
    with ThreadPoolExecutor(1) as pool, target.published():
        sha256 = pool.submit(model.sha256)
        progress = _Progress(total, on_progress)
        for job in target.jobs:
            _write(merging, job, lambda: _metadata(merged, sha256.result()), progress)
    return MergeReport(
        parameters=len(merging.changes),
        loras=tuple(merged),
        files=tuple(job.path.name for job in target.jobs),
        left_out=target.left_out,
        bytes=total,
        dtype=options.dtype,
        seconds=time.monotonic() - started,
    )


def _load(paths: Sequence[Path], key_map: KeyMap) -> list[LoraFile]:
    """Raises: LoraError or ToolError with the adapter's name."""
    files = []
    for path in paths:
        try:
            files.append(_bind(path, key_map))
        except OSError as error:
            why = error.strerror or type(error).__name__
            raise ToolError(f"{path.name} cannot be read ({why})") from error
    return files


def _bind(path: Path, key_map: KeyMap) -> LoraFile:
    with opened(path) as found:
        return load(found.file, key_map, file_sha256(found.original), config=found.config)


def _merged(use: LoraUse[Path], file: LoraFile, options: MergeOptions) -> MergedLora:
    """Raises: ToolError if not all of its tensors have a place, and that is not allowed."""
    words = {word for one in file.embeddings for word in (one.word or "a new word",)}
    unused = (*file.unused, *(UnusedKey(word, NOT_WEIGHTS) for word in sorted(words)))
    used = file.keys - len(file.embeddings)
    if unused and not options.allow_unused:
        first = unused[0]
        raise ToolError(
            f"{len(unused)} of {use.lora.name}'s {used + len(unused)} tensors have no place in this model, "
            f"the first of them {first.key[:200]} ({first.reason})",
            "Allow unused tensors to merge the rest.",
        )
    return MergedLora(use.lora.name, file.sha256, use.scale, used, unused)


def _changes(loras: Sequence[LoraUse[Path]], files: Sequence[LoraFile]) -> Changes:
    """In the stack's order."""
    changes: dict[Place, list[tuple[Algorithm, float]]] = defaultdict(list)
    for use, file in zip(loras, files, strict=True):
        for layer in file.layers:
            if scale := use.scale_of(layer.target):
                place = Place(layer.target.component, layer.target.path, layer.parameter)
                changes[place].append((layer.algorithm, scale))
    return changes


@dataclass
class _Progress:
    total: int
    on_progress: OnProgress
    done: int = 0

    def add(self, count: int, what: str) -> None:
        self.done += count
        self.on_progress(self.done, self.total, what)


def _write(
    merging: MergedTensors, job: Job, metadata: Callable[[], dict[str, str]], progress: _Progress
) -> None:
    """Writes one of the output's files."""
    # The widest numbers first, so that none lies across its own boundaries.
    order = sorted(job.tensors, key=lambda raw: -merging.dtype_of(raw).itemsize)
    kept = {name: text for name, text in job.metadata.items() if name not in STALE}
    with job.scratch() as path, StreamWriter(path, [raw.name for raw in order], kept) as writer:
        with ThreadPoolExecutor(1) as hand:
            writing: Future[None] | None = None
            for raw, whole in _ahead(merging.model, order):
                tensor = merging.tensor(raw, whole)
                if writing is not None:
                    writing.result()
                writing = hand.submit(writer.put, {raw.name: tensor})
                progress.add(merging.bytes_of(raw), raw.name)
            if writing is not None:
                writing.result()
        added = metadata()
        earlier = _list(kept.get("merged_from", ""))
        added["merged_from"] = json.dumps([*earlier, *json.loads(added["merged_from"])])
        writer.finish(added)
        job.convert(path)


def _ahead(model: Checkpoint, order: Sequence[Raw]) -> Iterator[tuple[Raw, Tensor]]:
    """Each tensor, read while the one before it is worked on."""
    with ThreadPoolExecutor(1) as pool:
        coming: Future[Tensor] | None = None
        for raw, after in zip(order, (*order[1:], None), strict=True):
            whole = model.read_raw(raw) if coming is None else coming.result()
            coming = None if after is None else pool.submit(model.read_raw, after)
            yield raw, whole


def _metadata(loras: Sequence[MergedLora], sha256: str) -> dict[str, str]:
    merged = [{"name": one.name, "sha256": one.sha256, "scale": one.scale} for one in loras]
    return {"merged_from": json.dumps(merged), "model_sha256": sha256}


def _list(text: str) -> list[object]:
    """What an earlier merge wrote; nothing if it is something else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return []
    return found if isinstance(found, list) else []
