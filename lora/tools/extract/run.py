"""The difference of two models as an adapter: factors where they do, exact differences where they do not.

D = target - source, tensor by tensor, so that memory holds a few of them and never a model. A linear
layer's or a convolution's D becomes the best product of two thin matrices of its rank (truncated SVD,
`lora.tools.factors.svd`), stored so that alpha = rank and nothing is scaled; norms, biases, embeddings and
whatever is small are stored as they differ. Every tensor of both models is in the file, the same in both, or
left out with its reason.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora.errors import ToolError
from lora.tools import OnProgress, ignore_progress
from lora.tools.extract.budget import Limits, budget_for_factors, ranks_within, values_of
from lora.tools.extract.layer import Pair, changed, extract_layer
from lora.tools.extract.metadata import layers_metadata, sources_metadata
from lora.tools.extract.options import Conv, ExtractOptions
from lora.tools.extract.output import ExtractOutput, verify
from lora.tools.extract.plan import Plan, Planned, plan_extraction
from lora.tools.extract.report import ExtractReport, LayerReport, LeftOut, Verified
from lora.tools.factors.ranks import RankPolicy
from lora.tools.models.checkpoints import Checkpoint
from lora.tools.writing import StreamWriter

__all__ = [
    "Conv",
    "ExtractOptions",
    "ExtractReport",
    "LayerReport",
    "LeftOut",
    "Verified",
    "extract",
]


@torch.no_grad()
def extract(
    source: Checkpoint,
    target: Checkpoint,
    output: Path,
    options: ExtractOptions,
    on_progress: OnProgress = ignore_progress,
) -> ExtractReport:
    """Writes an adapter that leads from `source` to `target`, published whole or not at all.

    A run that was killed is taken up by the next one with the same models, output and options: layers that
    are written are not computed again, and the file is the same, byte for byte. `on_progress` counts tensors.

    Raises: ToolError if the two are no states of one model, do not differ, hold NaN or infinity, or if
    the output is an input or cannot be written.
    """
    begun = time.monotonic()
    plan = plan_extraction(source, target, options)
    where = ExtractOutput.of(output, plan.options, [*source.files, *target.files])
    journal = plan.options.identity(*_hashes(source, target))
    told = sources_metadata(source, target, output.stem)
    with StreamWriter(where.stream, plan.names, told, journal) as writer:
        run = _Run(source, target, plan, writer, on_progress)
        for note in writer.notes:
            run.add(note)
        resumed = len(run.layers)
        try:
            run.all(told)
            if not run.layers:
                raise _nothing(run, plan)
        except ToolError:  # the next run would end so too
            writer.discard()
            raise
        writer.finish(layers_metadata(run.layers, plan.options))
    verified = verify(source, target, where.stream) if options.verify else None
    where.convert(source)
    return ExtractReport(
        output=output,
        layers=run.layers,
        left_out=(*plan.left_out, *run.left_out),
        unchanged=run.unchanged,
        resumed=resumed,
        bytes=where.size(),
        seconds=time.monotonic() - begun,
        verified=verified,
    )


def _hashes(source: Checkpoint, target: Checkpoint) -> tuple[str, str]:
    """Both models', at the same time: hashing lets go of the interpreter."""
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.submit(source.sha256), pool.submit(target.sha256)
        return first.result(), second.result()


def _nothing(run: _Run, plan: Plan) -> ToolError:
    changed = [*run.left_out, *plan.left_out]
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
    """What is done so far, and what is told of it."""

    source: Checkpoint
    target: Checkpoint
    plan: Plan
    writer: StreamWriter
    on_progress: OnProgress
    layers: list[LayerReport] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    unchanged: int = 0
    spectra: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    """Name, how many were looked for -> singular values, where a budget is spent."""
    done: set[str] = field(default_factory=set)
    """The names of parameters that need no second look."""

    def add(self, note: Mapping[str, Any]) -> None:
        """Counts what is in the file, or known to be in it never."""
        if "spectrum" in note:
            self.spectra[note["name"], note["limit"]] = note["spectrum"]
            return
        self.done.add(note["name"])
        if "layer" in note:
            self.layers.append(LayerReport.of_note(note["layer"]))
        elif "reason" in note:
            self.left_out.append(LeftOut(note["name"], note["reason"]))
        else:
            self.unchanged += 1

    def all(self, metadata: Mapping[str, str]) -> None:
        """Every parameter that is not done."""
        policy = self.plan.options.policy
        self._parts(self.plan.exact, {})
        if policy.max_bytes is None:
            self._parts(self.plan.thin, {})
            return
        exact = sum(layer.bytes for layer in self.layers if layer.kind == "diff")
        budget = budget_for_factors(self.plan.names, metadata, exact, self.plan.options)
        ranks = ranks_within(self.plan.thin, budget, self.plan.options, self._measure)
        self._parts(self.plan.thin, ranks)

    def _parts(self, planned: Sequence[Planned], ranks: Mapping[str, int]) -> None:
        """Writes what each parameter needs; `ranks`: where a budget has chosen them."""
        todo = [one for one in planned if str(one.place) not in self.done]
        for one, pair in self._pairs(todo):
            policy = self.plan.options.policy
            if rank := ranks.get(pair.name):
                policy = RankPolicy(rank=rank)
            elif ranks.get(pair.name) == 0:
                self._put(
                    {}, {"reason": "the bytes were spent on layers that gain more"}, pair.name
                )
                continue
            self._put(*self._part(one, pair, policy), pair.name)

    def _part(
        self, one: Planned, pair: Pair, policy: RankPolicy
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors to be written for a parameter, and its note."""
        change = changed(pair, self.plan.options)
        if isinstance(change, str):
            return {}, {"reason": change} if change else {}
        if one.reason:
            return {}, {"reason": one.reason}
        part = extract_layer(pair, change, policy, self.plan.options)
        if part is None or not part.tensors.keys() <= one.slots.keys():
            return {}, {"reason": "its change fits into no tensor that the naming has"}
        tensors = {one.slots[slot]: tensor for slot, tensor in part.tensors.items()}
        return tensors, {"layer": part.report.as_note()}

    def _put(self, tensors: Mapping[str, Tensor], note: Mapping[str, Any], name: str) -> None:
        note = {"name": name, **note}
        self.writer.put(tensors, note)
        self.add(note)
        self.on_progress(len(self.done), len(self.plan.exact) + len(self.plan.thin), name)

    def _measure(self, planned: Sequence[Planned], limits: Limits) -> dict[str, list[float]]:
        """See `Measure`; what a killed run has found is not looked for again."""
        wanted = {str(one.place): limits[str(one.place)] for one in planned}
        todo = [
            one for one in planned if (name := str(one.place), wanted[name]) not in self.spectra
        ]
        for count, (_, pair) in enumerate(self._pairs(todo)):
            values = values_of(pair, wanted[pair.name], self.plan.options)
            note = {"name": pair.name, "limit": wanted[pair.name], "spectrum": values}
            self.writer.put({}, note)
            self.add(note)
            self.on_progress(count + 1, len(todo), f"singular values of {pair.name}")
        found = {name: self.spectra[name, limit] for name, limit in wanted.items()}
        return {name: values for name, values in found.items() if values}

    def _pairs(self, planned: Sequence[Planned]) -> Iterator[tuple[Planned, Pair]]:
        """Each parameter of both models, read while the one before it is worked on."""
        with ThreadPoolExecutor(1) as pool:
            coming: Future[Pair] | None = None
            for one, after in zip(planned, (*planned[1:], None), strict=False):
                pair = self._read(one) if coming is None else coming.result()
                coming = None if after is None else pool.submit(self._read, after)
                yield one, pair

    def _read(self, one: Planned) -> Pair:
        return Pair(str(one.place), self.source.read(one.place), self.target.read(one.place))
