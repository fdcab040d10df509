"""Extracts the difference of two models as an adapter: factors for matrices, exact differences for the rest.

D = target - source is computed tensor by tensor, so that a few tensors are in memory and never a model. D of
a linear layer or a convolution becomes the best product of two thin matrices of its rank (truncated SVD,
`lora.tools.factors.svd`), with alpha = rank, so that nothing is scaled. For norms, biases, embeddings and
small tensors D itself is stored. Every tensor of both models is in the file, is the same in both, or is left
out with a reason.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora.engine.merging import merge
from lora.errors import ToolError
from lora.formats.adapter import load
from lora.formats.header import read_header
from lora.formats.names.naming import Naming
from lora.formats.tensors import read_runs
from lora.tools import Format, OnProgress, ignore_progress, read_ahead
from lora.tools.adapters.reading import read_adapter
from lora.tools.adapters.saving import WriteOptions, write_adapter
from lora.tools.extract.layer import Pair, changed, extract_layer, largest_of
from lora.tools.extract.options import ExtractOptions
from lora.tools.extract.plan import (
    ExtractPlan,
    Limits,
    Planned,
    budget_for_factors,
    plan_extraction,
    ranks_within,
    values_of,
)
from lora.tools.extract.report import (
    ExtractReport,
    LayerReport,
    LeftOut,
    Verified,
    layers_metadata,
    sources_metadata,
)
from lora.tools.factors.cutting import relative_error
from lora.tools.factors.ranks import RankPolicy
from lora.tools.factors.svd import energy
from lora.tools.models.checkpoints import Checkpoint, Place
from lora.tools.overwriting import refuse_misnamed, refuse_other_kind, refuse_overwriting
from lora.tools.writing import StreamWriter, write_pytorch


@torch.no_grad()
def extract(
    source: Checkpoint,
    target: Checkpoint,
    output: Path,
    options: ExtractOptions,
    on_progress: OnProgress = ignore_progress,
) -> ExtractReport:
    """Writes an adapter that leads from `source` to `target`; it is published whole or not at all.

    The next run with the same models, output and options continues a run that was killed: layers that are
    written are not computed again, and the file is the same, byte for byte. `on_progress` counts tensors.

    Raises: ToolError if the two are not states of one model, do not differ, hold NaN or infinity, or if the
    output is there already or cannot be written.
    """
    started = time.monotonic()
    plan = plan_extraction(source, target, options)
    where = _Output.of(output, plan.options, (*source.parts, *target.parts))
    with ThreadPoolExecutor(2) as pool:
        hashes = pool.map(Checkpoint.sha256, (source, target))
        journal = plan.options.identity(*hashes)
    metadata = sources_metadata(source, target, output.stem)
    with StreamWriter(where.stream, plan.names, metadata, journal) as writer:
        run = _Run(source, target, plan, writer, on_progress)
        for note in writer.notes:
            run.add(note)
        resumed = len(run.layers)
        try:
            run.extract_all(metadata)
        except ToolError as error:
            # With any other error the next run would end, too.
            if not isinstance(error.__cause__, OSError):
                writer.discard()
            raise
        writer.finish(layers_metadata(run.layers, plan.options))
    verified = where.completed(source, target)
    return ExtractReport(
        output=output,
        layers=run.layers,
        left_out=(*plan.left_out, *run.left_out),
        unchanged=run.unchanged,
        resumed=resumed,
        bytes=where.size(),
        seconds=time.monotonic() - started,
        verified=verified,
    )


def _nothing(run: _Run) -> ToolError:
    changed = [*run.left_out, *run.plan.left_out]
    if not run.left_out:
        return ToolError(
            "the two models do not differ: all of their common tensors are the same",
            f"{changed[0].name}: {changed[0].reason}." if changed else "Was a file given twice?",
        )
    return ToolError(
        f"nothing that changed can be stored ({changed[0].name[:200]}: {changed[0].reason})"
    )


@dataclass
class _Run:
    """An extraction under way, and its results so far."""

    source: Checkpoint
    target: Checkpoint
    plan: ExtractPlan
    writer: StreamWriter
    on_progress: OnProgress
    layers: list[LayerReport] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    unchanged: int = 0
    spectra: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    """(name, limit) -> at most `limit` singular values, if the size of the file is given."""
    done: set[str] = field(default_factory=set)
    """The names of the parameters that are finished."""

    def add(self, note: Mapping[str, Any]) -> None:
        """Adds the result that a note of the journal describes."""
        if "spectrum" in note:
            self.spectra[note["name"], note["limit"]] = note["spectrum"]
            return
        self.done.add(note["name"])
        if "layer" in note:
            layer = note["layer"]
            self.layers.append(LayerReport(**{**layer, "shape": tuple(layer["shape"])}))
        elif "reason" in note:
            self.left_out.append(LeftOut(note["name"], note["reason"]))
        else:
            self.unchanged += 1

    def extract_all(self, metadata: Mapping[str, str]) -> None:
        """Extracts every parameter that is not finished. Raises: ToolError if nothing can be stored."""
        options, ranks = self.plan.options, dict[str, int]()
        self._extract(self.plan.exact, {})
        if options.policy.max_bytes is not None:
            exact = sum(layer.bytes for layer in self.layers if layer.kind == "diff")
            budget = budget_for_factors(self.plan.names, metadata, exact, options)
            ranks = ranks_within(self.plan.thin, budget, options, self._measure)
        self._extract(self.plan.thin, ranks)
        if not self.layers:
            raise _nothing(self)

    def _extract(self, planned: Sequence[Planned], ranks: Mapping[str, int]) -> None:
        """Writes the tensors of each parameter; `ranks`: those that a budget in bytes has chosen."""
        todo = [parameter for parameter in planned if parameter.name not in self.done]
        for parameter, pair in read_ahead(todo, self._read):
            rank = ranks.get(pair.name)
            if rank == 0:
                note = {"reason": "the bytes were spent on layers that gain more"}
                self._put({}, note, pair.name)
                continue
            policy = RankPolicy(rank=rank) if rank else self.plan.options.policy
            self._put(*self._tensors_of(parameter, pair, policy), pair.name)

    def _tensors_of(
        self, parameter: Planned, pair: Pair, policy: RankPolicy
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        change = changed(pair, self.plan.options)
        if isinstance(change, str):
            return {}, {"reason": change} if change else {}
        if parameter.reason:
            return {}, {"reason": parameter.reason}
        stored = extract_layer(pair, change, policy, self.plan.options)
        if stored is None or not stored.tensors.keys() <= parameter.slots.keys():
            return {}, {"reason": "its change fits into no tensor that the naming has"}
        tensors = {parameter.slots[slot]: tensor for slot, tensor in stored.tensors.items()}
        return tensors, {"layer": asdict(stored.report)}

    def _put(self, tensors: Mapping[str, Tensor], note: Mapping[str, Any], name: str) -> None:
        note = {"name": name, **note}
        self.writer.put(tensors, note)
        self.add(note)
        self.on_progress(len(self.done), len(self.plan.exact) + len(self.plan.thin), name)

    def _measure(self, planned: Sequence[Planned], limits: Limits) -> dict[str, list[float]]:
        """See `Measure`; the results of an earlier run are used."""
        wanted = {parameter.name: limits[parameter.name] for parameter in planned}
        todo = [
            parameter
            for parameter in planned
            if (name := parameter.name, wanted[name]) not in self.spectra
        ]
        for count, (_, pair) in enumerate(read_ahead(todo, self._read)):
            values = values_of(pair, wanted[pair.name], self.plan.options)
            note = {"name": pair.name, "limit": wanted[pair.name], "spectrum": values}
            self.writer.put({}, note)
            self.add(note)
            self.on_progress(count + 1, len(todo), f"singular values of {pair.name}")
        spectra = {name: self.spectra[name, limit] for name, limit in wanted.items()}
        return {name: values for name, values in spectra.items() if values}

    def _read(self, parameter: Planned) -> Pair:
        place = parameter.place
        return Pair(parameter.name, self.source.read(place), self.target.read(place))


@dataclass(frozen=True)
class _Output:
    """The file that is wanted, and the .safetensors file that the tensors are streamed into."""

    path: Path
    stream: Path
    """The same path for a .safetensors file in a naming without a config; else one beside it."""
    options: ExtractOptions

    @classmethod
    def of(cls, path: Path, options: ExtractOptions, parts: Iterable[Path]) -> _Output:
        """Raises: ToolError if the output is there already, or the file's name or folder does not do."""
        refuse_overwriting(path, options.overwrite, parts)
        if options.naming is not Naming.PEFT:
            refuse_misnamed(path, options.format)
        if not path.parent.is_dir():
            raise ToolError(f"there is no folder for {path}", "Make the folder first.")
        refuse_other_kind(path, is_folder=options.naming is Naming.PEFT)
        plain = options.format is Format.SAFETENSORS and options.holds_differences
        return cls(path, path if plain else path.with_name(f".{path.name}.stream"), options)

    def completed(self, source: Checkpoint, target: Checkpoint) -> Verified | None:
        """Makes the wanted file, and verifies it if that is an option. Raises: ToolError; LoraError."""
        try:
            verified = _verify(source, target, self.stream) if self.options.verify else None
            self.convert(source)
        finally:
            if self.stream != self.path:
                self.stream.unlink(missing_ok=True)
        return verified

    def convert(self, source: Checkpoint) -> None:
        """Makes the wanted file from the streamed one. Raises: ToolError."""
        if self.stream == self.path:
            return
        if self.options.holds_differences:
            runs = read_runs(self.stream, read_header(self.stream), mapped=True)
            write_pytorch(self.path, {name: t for run in runs for name, t in run.tensors()})
        else:
            written = WriteOptions(
                self.options.naming, None, self.options.format, self.options.overwrite
            )
            write_adapter(self.path, read_adapter(self.stream, source.key_map()), written)

    def size(self) -> int:
        """The bytes of what was written."""
        files = self.path.iterdir() if self.path.is_dir() else [self.path]
        return sum(file.stat().st_size for file in files)


def _verify(source: Checkpoint, target: Checkpoint, path: Path) -> Verified:
    """Reads the file as the engine does, merges each layer into the source, and compares it with the target.

    Raises: ToolError if a tensor of the file has no place in the source; LoraError if it cannot be read.
    """
    file = load(path, source.key_map(), source.sha256(), mapped=True)
    if file.unused:
        first = file.unused[0]
        raise ToolError(f"the file cannot be read back ({first.key[:200]}: {first.reason})")
    errors, energies, largest, unequal, numbers = [], [], 0.0, 0, 0
    for layer in file.layers:
        place = Place(layer.target.component, layer.target.path, layer.parameter)
        original, wanted = source.read(place), target.read(place)
        merged = torch.empty_like(original)
        merge(merged, original, [(layer.algorithm, 1.0)])
        wanted = wanted.to(original.dtype)
        error = merged.float() - wanted.float()
        errors.append(energy(error))
        energies.append(energy(wanted.float() - original.float()))
        largest = max(largest, largest_of(error))
        unequal += int(error.count_nonzero())
        numbers += error.numel()
    return Verified(largest, relative_error(errors, energies), unequal, numbers)
