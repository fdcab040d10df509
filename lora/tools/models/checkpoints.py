"""A model's checkpoint on disk, opened without loading it: every parameter under its place in the model.

One file (.safetensors, .ckpt, .pt, .bin), shards, or a pipeline's folder; in the names of diffusers or of
the original code. Two checkpoints of one Stable Diffusion model have equal places, however they
are stored. A model that is not known keeps its own names: `blocks.0.modulation` is the parameter
`modulation` of the module `blocks.0` of a `transformer`.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from lora.durable import sha256_of
from lora.errors import ToolError
from lora.formats.names.keys import KeyMap, Shape
from lora.tools.models.folders import sources_of
from lora.tools.models.layouts import ADAPTABLE, Found, Where, places
from lora.tools.models.weights import KINDS, Raw, WeightsFile, open_weights, unreadable

__all__ = ["Checkpoint", "Place", "Raw", "Stored", "file_sha256"]


class Place(NamedTuple):
    """One parameter of a model, the same whatever the file calls it."""

    component: str
    """As in a `KeyMap`; also `vae`, which no adapter changes."""
    path: str
    """The module's path, diffusers' own where the model is known."""
    parameter: str

    def __str__(self) -> str:
        return ".".join(part for part in self if part)


@dataclass(frozen=True)
class Stored:
    """Where and how a parameter is stored."""

    place: Place
    raw: Raw
    """The tensor that holds it."""
    third: int | None
    """Which of the tensor's three blocks of rows it is; None: it is the whole tensor."""
    transposed: bool
    """Whether the tensor is [in, out]."""

    @property
    def shape(self) -> Shape:
        """[out, in(, kh, kw)] for a weight, however it is stored."""
        shape = self.raw.shape
        if self.third is not None:
            return (shape[0] // 3, *shape[1:])
        return shape[::-1] if self.transposed else shape

    @property
    def dtype(self) -> torch.dtype:
        """The stored numbers'."""
        return self.raw.dtype

    @property
    def name(self) -> str:
        """The tensor's name in its file."""
        return self.raw.name

    @property
    def file(self) -> Path:
        """The tensor's file."""
        return self.raw.file


ADAPTERS = (
    ".lora_down.weight",
    ".lora_A.weight",
    ".hada_w1_a",
    ".lokr_w1",
    ".lokr_w1_a",
    ".oft_blocks",
)
"""How tensors end that no model has."""


class Checkpoint:
    """An open checkpoint; a context manager. Reading from several threads is allowed."""

    def __init__(
        self, path: Path, files: tuple[WeightsFile, ...], components: Mapping[Path, str]
    ) -> None:
        """`components`: the part of a pipeline that a file belongs to; empty for a model of its own.

        Raises: ToolError if two tensors have one name, or mean one place.
        """
        self.path, self.files, self.components = path, files, components
        self._files = {file.path: file for file in files}
        stored, others = _placed(files, components)
        self.parameters: Mapping[Place, Stored] = {one.place: one for one in stored}
        """Every parameter of the model, the component that draws first."""
        self.others = tuple(others)
        """Every tensor that is no parameter: EMA copies, schedules, position ids."""
        self._stack = ExitStack()
        for file in files:
            self._stack.callback(file.close)

    @classmethod
    def open(cls, path: Path, kind: str | None = None) -> Checkpoint:
        """Opens a model. `kind`: `safetensors` or `pytorch` if it must be that one; by default what it is.

        Raises: ToolError, of one sentence, for anything that is no whole model: a missing shard, a cut
        file, a pickle with more than tensors, quantised weights.
        """
        if kind is not None and kind not in KINDS:
            raise ToolError(f"{kind[:40]!r} is no kind of checkpoint", f"Use {' or '.join(KINDS)}.")
        sources = sources_of(path)
        with ExitStack() as stack:
            files: list[WeightsFile] = []
            for source in sources:
                files.append(open_weights(source.path, kind))
                stack.callback(files[-1].close)
            checkpoint = cls(path, tuple(files), {one.path: one.component for one in sources})
            if any(key.endswith(ADAPTERS) for file in files for key in file.tensors):
                raise ToolError(
                    f"{path.name} is an adapter, and no model", "Name the model's file."
                )
            stack.pop_all()
        return checkpoint

    @cached_property
    def holds(self) -> Mapping[Raw, tuple[Stored, ...]]:
        """Tensor -> the parameters in it: one, the three of a fused one; others are not in it."""
        found: dict[Raw, list[Stored]] = defaultdict(list)
        for stored in self.parameters.values():
            found[stored.raw].append(stored)
        return {raw: tuple(parts) for raw, parts in found.items()}

    def read(self, place: Place) -> Tensor:
        """A parameter, [out, in(, kh, kw)] for a weight, in its stored dtype and in memory of its own.

        Raises: KeyError if the model has no such place; ToolError if the file cannot be read.
        """
        stored = self.parameters[place]
        tensor = self._files[stored.file].read(stored.name, stored.third)
        return tensor.t().contiguous() if stored.transposed else tensor

    def read_raw(self, raw: Raw) -> Tensor:
        """A tensor as it is stored, in memory of its own. Raises: ToolError."""
        return self._files[raw.file].read(raw.name)

    def key_map(self) -> KeyMap:
        """The names under which adapters address the modules, as a live pipeline's `KeyMap` has them.

        Raises: ToolError if two modules would share a name.
        """
        modules: dict[str, dict[str, dict[str, Shape]]] = {}
        for place, stored in self.parameters.items():
            if place.component in ADAPTABLE:
                paths = modules.setdefault(place.component, {})
                paths.setdefault(place.path, {})[place.parameter] = stored.shape
        if not modules:
            raise ToolError(f"{self.path.name} holds nothing that an adapter could change")
        try:
            return KeyMap(modules)
        except ValueError as error:
            raise ToolError(
                f"{self.path.name} has modules that no name tells apart ({error})"
            ) from error

    def original(self, place: Place) -> str:
        """The dotted path of a place's module as the checkpoint's files have it, unique in the checkpoint.

        In a pipeline's folder the component stands before it. A third of a fused tensor has its own
        name behind: `...attn.q_proj`.
        """
        stored = self.parameters[place]
        path = stored.name.rpartition(".")[0]
        if stored.third is not None:
            path = f"{path}.{place.path.rpartition('.')[2]}"
        elif stored.transposed or not stored.name.endswith(f".{place.parameter}"):
            path = (
                stored.name
            )  # OpenCLIP's `text_projection` and `positional_embedding` are no modules
        component = self.components[stored.file]
        return ".".join(part for part in (component, path) if part)

    @cached_property
    def metadata(self) -> Mapping[str, str]:
        """What the files say of themselves, the first file first where several say something else."""
        merged: dict[str, str] = {}
        for file in reversed(self.files):
            merged |= file.metadata
        return merged

    def sha256(self) -> str:
        """The hash of the one file; of several, that of their hashes (32 bytes each) in the order of names.

        Raises: ToolError if a file cannot be read.
        """
        return self._sha256

    @cached_property
    def _sha256(self) -> str:
        found = [file_sha256(file.path) for file in sorted(self.files, key=lambda one: one.path)]
        together = hashlib.sha256(bytes.fromhex("".join(found))).hexdigest()
        return found[0] if len(found) == 1 else together

    def close(self) -> None:
        """Lets the files go."""
        self._stack.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def file_sha256(path: Path) -> str:
    """The hash of a file's bytes, in hex, without its bytes in memory. Raises: ToolError."""
    try:
        return sha256_of(path)
    except OSError as error:
        raise unreadable(path, error) from error


def _placed(
    files: tuple[WeightsFile, ...], components: Mapping[Path, str]
) -> tuple[list[Stored], list[Raw]]:
    """Every tensor of the files, as the parameters that it holds or as none."""
    by_component: dict[str, dict[str, Raw]] = {}
    for file in files:
        raws = by_component.setdefault(components[file.path], {})
        for name, raw in file.tensors.items():
            twin = raws.setdefault(name, raw)
            if twin is not raw:
                raise ToolError(f"{twin.file.name} and {file.path.name} both hold {name[:200]}")
    places_of: dict[Place, Stored] = {}
    others: list[Raw] = []
    for component, raws in by_component.items():
        for found in places(raws, component):
            raw = raws[found.name]
            stored = [_stored(raw, found, where) for where in found.wheres]
            # Whole numbers are no parameters: position ids, counters of batches.
            if not stored or not raw.dtype.is_floating_point:
                others.append(raw)
                continue
            for one in stored:
                twin_place = places_of.setdefault(one.place, one)
                if twin_place is not one:
                    raise ToolError(
                        f"{twin_place.name[:200]} and {one.name[:200]} are both {one.place}"
                    )
    order = {component: index for index, component in enumerate(ADAPTABLE)}
    ordered = sorted(places_of.values(), key=lambda one: order.get(one.place.component, len(order)))
    return ordered, others


def _stored(raw: Raw, found: Found, where: Where) -> Stored:
    """Raises: ToolError if a fused tensor has no three equal parts, or a transposed one is no matrix."""
    misfit = (where.third is not None and (not raw.shape or raw.shape[0] % 3)) or (
        where.transposed and len(raw.shape) != 2
    )
    if misfit:
        raise ToolError(f"{raw.name[:200]} has the impossible shape {list(raw.shape)}")
    place = Place(found.component, where.path, where.parameter)
    return Stored(place, raw, where.third, where.transposed)
