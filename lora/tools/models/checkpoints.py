"""Opens a model's checkpoint without loading it, and finds every parameter by its place in the model.

A checkpoint is one file (.safetensors, .ckpt, .pt, .bin), shards, or the folder of a pipeline, in the names
of diffusers or of the original code. Two checkpoints of one Stable Diffusion model have equal places, however
they are stored. A model that is not known keeps its own names: `blocks.0.modulation` is the parameter
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
from typing import NamedTuple

from torch import Tensor

from lora.durable import sha256_of
from lora.errors import ToolError
from lora.formats.names.keys import KeyMap
from lora.formats.names.slots import REFUSED, SLOTS, Shape
from lora.tools import FILE_FORMATS
from lora.tools.models.folders import files_of
from lora.tools.models.layouts import ADAPTABLE, Found, Where, places
from lora.tools.models.weights import Raw, WeightsFile, open_weights, unreadable


class Place(NamedTuple):
    """One parameter of a model, whatever name the file has for it."""

    component: str
    """As in a `KeyMap`; also `vae`, which no adapter changes."""
    path: str
    """The path of the module: that of diffusers if the model is known."""
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
    """Which of the tensor's three blocks of rows it is; None if it is the whole tensor."""
    transposed: bool
    """Whether the tensor is [in, out]."""

    @property
    def shape(self) -> Shape:
        """[out, in(, kh, kw)] for a weight, however it is stored."""
        shape = self.raw.shape
        if self.third is not None:
            return (shape[0] // 3, *shape[1:])
        return shape[::-1] if self.transposed else shape


_IN_MODELS = {"weight", "bias", "alpha", "rescale", *REFUSED}
_OLD_SUFFIXES = ("up.weight", "down.weight")  # behind `processor.to_q_lora`
ADAPTER_ENDINGS = (
    *(f".{s}" for s, slot in SLOTS.items() if slot not in _IN_MODELS and s not in _OLD_SUFFIXES),
    *(f"_lora.{suffix}" for suffix in _OLD_SUFFIXES),
)
"""Endings of tensors that no model has."""


class Checkpoint:
    """An open checkpoint; a context manager. Reading from several threads is allowed."""

    def __init__(
        self, path: Path, files: tuple[WeightsFile, ...], components: Mapping[Path, str]
    ) -> None:
        """`components`: the component of a pipeline that each file belongs to; empty for a model of its own.

        Raises: ToolError if two tensors have the same name or the same place.
        """
        self.path, self.files, self.components = path, files, components
        self._files = {file.path: file for file in files}
        self._sha256 = ""
        stored, others = _placed(files, components)
        self.parameters: Mapping[Place, Stored] = stored
        """Every parameter of the model; the UNet or transformer comes first."""
        self.others = tuple(others)
        """Every tensor that is no parameter, such as EMA copies, schedules and position ids."""
        self._stack = ExitStack()
        for file in files:
            self._stack.callback(file.close)

    @classmethod
    def open(cls, path: Path, kind: str | None = None) -> Checkpoint:
        """Opens a model. `kind`: the one of `FILE_FORMATS` that it must have, if any.

        Raises: ToolError for anything that is no whole model: a missing shard, a file that is cut off, a
        pickle with more than tensors, quantised weights.
        """
        if kind is not None and kind not in FILE_FORMATS:
            hint = f"Use {' or '.join(FILE_FORMATS)}."
            raise ToolError(f"{kind[:40]!r} is no kind of checkpoint", hint)
        sources = files_of(path)
        with ExitStack() as stack:
            files: list[WeightsFile] = []
            for file in sources:
                files.append(open_weights(file.path, kind))
                stack.callback(files[-1].close)
            checkpoint = cls(path, tuple(files), {file.path: file.component for file in sources})
            if any(key.endswith(ADAPTER_ENDINGS) for opened in files for key in opened.tensors):
                hint = "Name the model's file."
                raise ToolError(f"{path} is an adapter, and no model", hint)
            stack.pop_all()
        return checkpoint

    @property
    def parts(self) -> tuple[Path, ...]:
        """The files of a model whose path is not that of its one file."""
        return tuple(file.path for file in self.files if file.path != self.path)

    @cached_property
    def holds(self) -> Mapping[Raw, tuple[Stored, ...]]:
        """Tensor -> the parameters in it: one, or three if it is fused. Tensors without any are left out."""
        parameters: dict[Raw, list[Stored]] = defaultdict(list)
        for stored in self.parameters.values():
            parameters[stored.raw].append(stored)
        return {raw: tuple(parts) for raw, parts in parameters.items()}

    def read(self, place: Place) -> Tensor:
        """A parameter, [out, in(, kh, kw)] for a weight, in its stored dtype, as a copy.

        Raises: KeyError if the model has no such place; ToolError if the file cannot be read.
        """
        stored = self.parameters[place]
        tensor = self._files[stored.raw.file].read(stored.raw.name, stored.third)
        return tensor.t().contiguous() if stored.transposed else tensor

    def read_raw(self, raw: Raw) -> Tensor:
        """A tensor as it is stored, as a copy. Raises: ToolError."""
        return self._files[raw.file].read(raw.name)

    def key_map(self) -> KeyMap:
        """The names by which adapters address the modules, as in the `KeyMap` of a live pipeline.

        Raises: ToolError if two modules would have the same name.
        """
        modules: dict[str, dict[str, dict[str, Shape]]] = {}
        for place, stored in self.parameters.items():
            if place.component in ADAPTABLE:
                paths = modules.setdefault(place.component, {})
                paths.setdefault(place.path, {})[place.parameter] = stored.shape
        if not modules:
            raise ToolError(f"{self.path} holds nothing that an adapter could change")
        try:
            return KeyMap(modules)
        except ValueError as error:
            raise ToolError(
                f"{self.path} has several modules with the same name ({error})"
            ) from error

    @cached_property
    def metadata(self) -> Mapping[str, str]:
        """The metadata of all files; where they contradict each other, that of the first counts."""
        merged: dict[str, str] = {}
        for file in reversed(self.files):
            merged |= file.metadata
        return merged

    def sha256(self) -> str:
        """The hash of the file; of several files, the hash of their hashes (32 bytes each) in order of names.

        Raises: ToolError if a file cannot be read.
        """
        if not self._sha256:
            hashes = [file_sha256(path) for path in sorted(self._files)]
            together = hashlib.sha256(bytes.fromhex("".join(hashes))).hexdigest()
            self._sha256 = hashes[0] if len(hashes) == 1 else together
        return self._sha256

    def close(self) -> None:
        """Closes the files."""
        self._stack.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def file_sha256(path: Path) -> str:
    """The hash of a file's bytes, in hex; they are not loaded into memory. Raises: ToolError."""
    try:
        return sha256_of(path)
    except OSError as error:
        raise unreadable(path, error) from error


def _placed(
    files: tuple[WeightsFile, ...], components: Mapping[Path, str]
) -> tuple[dict[Place, Stored], list[Raw]]:
    """(parameters, tensors that hold none), of all files. Raises: ToolError."""
    by_component: dict[str, dict[str, Raw]] = {}
    for file in files:
        raws = by_component.setdefault(components[file.path], {})
        for name, raw in file.tensors.items():
            twin = raws.setdefault(name, raw)
            if twin is not raw:
                raise ToolError(f"{twin.file} and {file.path} both hold {name[:200]}")
    parameters: dict[Place, Stored] = {}
    others: list[Raw] = []
    for component, raws in by_component.items():
        for found in places(raws, component):
            raw = raws[found.name]
            stored = [_stored(raw, found, where) for where in found.wheres]
            # Integers are no parameters, but position ids and counters of batches.
            if not stored or not raw.dtype.is_floating_point:
                others.append(raw)
                continue
            for parameter in stored:
                earlier = parameters.setdefault(parameter.place, parameter)
                if earlier is not parameter:
                    names = f"{earlier.raw.name[:200]} and {parameter.raw.name[:200]}"
                    raise ToolError(f"{names} are both {parameter.place}")
    order = {component: index for index, component in enumerate(ADAPTABLE)}
    last = len(order)
    ordered = sorted(parameters, key=lambda place: order.get(place.component, last))
    return {place: parameters[place] for place in ordered}, others


def _stored(raw: Raw, found: Found, where: Where) -> Stored:
    """Raises: ToolError if a fused tensor has no three equal parts, or a transposed one is no matrix."""
    misfit = (where.third is not None and (not raw.shape or raw.shape[0] % 3)) or (
        where.transposed and len(raw.shape) != 2
    )
    if misfit:
        raise ToolError(f"{raw.name[:200]} has the impossible shape {list(raw.shape)}")
    place = Place(found.component, where.path, where.parameter)
    return Stored(place, raw, where.third, where.transposed)
