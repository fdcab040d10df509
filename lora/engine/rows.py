"""One forward that serves many requests: every row of the batch has its own stack of adapters.

y[r] = W x[r] + up (scales[r] * (down x[r])), where `down` and `up` hold the factors of all adapters of the
batch side by side, and `scales` has a row per request: 0 where an adapter is not the request's. So a layer
costs two more products, however many adapters, ranks, scales and stacks the batch has. An adapter keeps its
columns as long as it is placed: one that arrives or leaves moves no other. A row is whatever the first axis
of a layer's input counts: a sequence of a batch of texts, a picture of a batch of pictures.

What is not low-rank has no place here (`Rows.misfit`): it takes a turn alone, in `LoraEngine.applied`.

A product's last digits depend on which columns it has. Where what a row gives must not depend at all on the
other rows, `use` gets the adapters whose columns every batch has, `beside` those of its stacks.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from lora.engine.dynamic import DeviceAndDtype, make_factors
from lora.engine.engine import LoraEngine
from lora.engine.modules import takes_low_rank
from lora.engine.row_layer import Added, RowLayer, Span, on_device, scales_of, span_of
from lora.engine.stack import Stack
from lora.errors import LoraUnsupported
from lora.formats.adapter import LoraFile
from lora.formats.algorithms import LowRank
from lora.formats.contents import Layer
from lora.formats.names.keys import Target

STACKS = 64
"""How many stacks' scales are kept for one layout."""

AT_ONCE = 8
"""Layers that are placed before one looks at the clock."""


class Batch(NamedTuple):
    """What `use` has made of the stacks of a batch."""

    keys: frozenset[str]
    layers: dict[RowLayer, Added]


class Group(NamedTuple):
    """Layers that have the same scales for every stack: of one place and block, with the same adapters."""

    layers: list[RowLayer]
    span: Span


class Layout(NamedTuple):
    """The columns of some adapters in all layers, device by device."""

    groups: dict[DeviceAndDtype, list[Group]]
    stacks: dict[object, dict[DeviceAndDtype, Tensor]]
    """The scales that a stack's row has, of all groups behind each other."""


class Rows:
    """Places adapters side by side in a model's layers, and says for each batch which row has which."""

    def __init__(
        self, engine: LoraEngine, budget: int = 1_000_000_000, component: str | None = None
    ) -> None:
        """`budget`: the bytes of placed factors; beyond it, the one used longest ago makes room.

        `component`: the only one whose layers are changed; what an adapter does to others is passed over.
        """
        self._engine, self._budget, self._component = engine, budget, component
        self._layouts: dict[frozenset[str], Layout] = {}
        self._layers: dict[Target, RowLayer] = {}
        self._placed: OrderedDict[str, tuple[int, list[RowLayer]]] = OrderedDict()
        self._batches: dict[object, Batch] = {}
        self._now: frozenset[str] = frozenset()
        self._under_way: dict[str, Generator[None]] = {}
        """The adapters that are placed in part."""

    @contextmanager
    def opened(self) -> Iterator[Rows]:
        """While the block runs, `use` may be called; at first no row has an adapter.

        However it ends, every module has its own `forward` afterwards. No weight is ever written.
        Raises: EngineBusy if a stack is applied or another block is open; RestoreFailed.
        """
        with self._engine.alone():
            self._engine.undo.run()
            try:
                yield self
            finally:
                self._engine.undo.forwards()
                self._now = frozenset()

    def misfit(self, file: LoraFile) -> str | None:
        """Why an adapter must be applied alone; None if it can share a batch."""
        for layer in self._layers_of(file):
            low_rank = layer.algorithm.is_low_rank and layer.parameter == "weight"
            if not low_rank or not takes_low_rank(self._engine.module(layer.target)):
                return f"{layer.target} has {layer.algorithm.name} on its {layer.parameter}"
        return "it teaches words" if file.embeddings and not self._component else None

    def _layers_of(self, file: LoraFile) -> list[Layer]:
        one = self._component
        return [layer for layer in file.layers if not one or layer.target.component == one]

    def use(self, stacks: Sequence[Stack], beside: Sequence[LoraFile] = ()) -> None:
        """Row i of the forwards that follow has `stacks[i]`. Where no stack has a scale, no forward is ours.

        `beside`: adapters whose columns are there in any case, in rows without them with a scale of 0.

        Raises: LoraUnsupported for a file with a `misfit`; LoraIncompatible if its factors or a scale
        overflow the model's precision. Then no row has an adapter.
        """
        stacks = [[use for use in stack if any(use.factors)] for stack in stacks]
        name = tuple(_name_of(stack) for stack in stacks), *(file.identity for file in beside)
        batch = self._batches.get(name)
        try:
            if batch is None:
                batch = self._made(stacks, beside)
                self._batches = {name: batch, **dict(list(self._batches.items())[:7])}
            self._attach(batch)
        except BaseException:
            self._engine.undo.forwards()
            self._now = frozenset()
            raise

    def _attach(self, batch: Batch) -> None:
        undo = self._engine.undo
        undo.forwards(keep={layer.module for layer in batch.layers})
        for layer, added in batch.layers.items():
            layer.original = undo.replace_forward(layer.module, layer)
            layer.added = added
        self._now = batch.keys
        for key in batch.keys:
            self._placed.move_to_end(key)

    def _made(self, stacks: Sequence[Stack], beside: Sequence[LoraFile]) -> Batch:
        files = {file.identity: file for file in beside}
        files |= {use.lora.identity: use.lora for stack in stacks for use in stack}
        for file in files.values():
            self._place(file, files.keys())
        keys = frozenset(files)
        layout = self._layouts.get(keys)
        if layout is None:
            layout = self._layouts[keys] = self._layout(keys)
        added: dict[RowLayer, Added] = {}
        for place, groups in layout.groups.items():
            rows = [self._row(layout, stack)[place] for stack in stacks]
            scales, at = torch.stack(rows), 0
            for layers, span in groups:
                own = scales[:, at : at + span.width]
                at += span.width
                added |= {layer: layer.between(span, own) for layer in layers}
        return Batch(keys, added)

    def _layout(self, keys: frozenset[str]) -> Layout:
        used = {layer: None for key in sorted(keys) for layer in self._placed[key][1]}
        groups: dict[object, list[RowLayer]] = {}
        for layer in used:
            entries = tuple((k, c) for k, c in layer.columns.items() if k in keys)
            target = layer.target
            groups.setdefault((layer.place, target.component, target.block, entries), []).append(
                layer
            )
        by_place: dict[DeviceAndDtype, list[Group]] = {}
        for layers in groups.values():
            group = Group(layers, span_of(layers[0], keys))
            by_place.setdefault(layers[0].place, []).append(group)
        return Layout(by_place, {})

    def _row(self, layout: Layout, stack: Stack) -> dict[DeviceAndDtype, Tensor]:
        name = _name_of(stack)
        row = layout.stacks.get(name)
        if row is None:
            row = {
                place: on_device(
                    place, [x for g in groups for x in scales_of(g.layers[0], g.span, stack)]
                )
                for place, groups in layout.groups.items()
            }
            if len(layout.stacks) >= STACKS:
                del layout.stacks[next(iter(layout.stacks))]
            layout.stacks[name] = row
        return row

    def place(self, file: LoraFile) -> None:
        """Puts an adapter's factors beside those of the others, ready for `use`; nothing is applied.

        Raises: as `use`.
        """
        self._place(file, self._now)

    def place_for(self, file: LoraFile, seconds: float) -> bool:
        """As `place`, for about so long; whether it is done. The next call goes on from there.

        What was begun of another file is undone. Raises: as `use`.
        """
        for key in [key for key in self._under_way if key != file.identity]:
            self._under_way.pop(key).close()
        if file.identity in self._placed:
            return True
        if file.identity not in self._under_way:
            self._under_way[file.identity] = self._placing(file, self._now)
        until = time.perf_counter() + seconds
        return all(time.perf_counter() < until for _ in self._under_way[file.identity])

    def _place(self, file: LoraFile, keep: Collection[str]) -> None:
        """`keep`: the identities of adapters that may not make room for it."""
        if file.identity not in self._placed:
            for _ in self._under_way.get(file.identity) or self._placing(file, keep):
                pass

    @torch.no_grad()
    def _placing(self, file: LoraFile, keep: Collection[str]) -> Generator[None]:
        """Places a few layers at a time. Left early, nothing of it stays."""
        key = file.identity
        layers: list[RowLayer] = []
        try:
            if reason := self.misfit(file):
                raise LoraUnsupported(f"the LoRA cannot share a batch ({reason})")
            planned = [
                (self._row_layer(layer.target), _factors(layer)) for layer in self._layers_of(file)
            ]
            size = sum(_bytes_of(layer, factors) for layer, factors in planned)
            self._make_room(size, keep)
            for start in range(0, len(planned), AT_ONCE):
                some = planned[start : start + AT_ONCE]
                parts = [(layer.module, str(layer.target), [own]) for layer, own in some]
                for (layer, _), own in zip(some, make_factors(parts), strict=True):
                    layers.append(layer)
                    layer.insert(key, own, own.parts[0].scaling)
                self._layouts.clear()  # a layer's buffers may be others now
                yield
            self._placed[key] = size, layers
        finally:
            self._under_way.pop(key, None)
            if key not in self._placed:
                self._layouts.clear()
                for placed in layers:
                    placed.columns.pop(key, None)

    def _row_layer(self, target: Target) -> RowLayer:
        if target not in self._layers:
            self._layers[target] = RowLayer(self._engine.module(target), target)
        return self._layers[target]

    def _make_room(self, size: int, keep: Collection[str]) -> None:
        held = self.size
        for key in [key for key in self._placed if key not in keep]:
            if held + size <= self._budget:
                return
            held -= self._placed[key][0]
            self._drop(key)

    def remove(self, key: str) -> None:
        """Frees the columns of the adapter with this identity. Raises: ValueError if a batch uses it now."""
        if key in self._now:
            raise ValueError("the batch under way uses this adapter")
        if key in self._placed:
            self._drop(key)

    def _drop(self, key: str) -> None:
        for layer in self._placed.pop(key)[1]:
            layer.columns.pop(key, None)
        self._batches = {name: b for name, b in self._batches.items() if key not in b.keys}
        self._layouts.clear()

    @property
    def size(self) -> int:
        """The bytes of the factors that are placed."""
        return sum(size for size, _ in self._placed.values())


def _name_of(stack: Stack) -> tuple[object, ...]:
    return tuple((use.lora.identity, use.all_scales) for use in stack)


def _bytes_of(layer: RowLayer, factors: LowRank) -> int:
    return (factors.down.numel() + factors.up.numel()) * layer.place[1].itemsize


def _factors(layer: Layer) -> LowRank:
    factors = layer.algorithm.low_rank()
    if factors is None:
        raise TypeError(f"{layer.algorithm.name} has no factors")
    return factors
