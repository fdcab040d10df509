"""Describes an adapter file: algorithms, layout, base model, ranks, training, hashes, and norms of its
changes.

No model is needed: the file is bound to the modules that it names itself (`own_names`). With the `KeyMap` of
a model, the description also says what fits that model.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lora.errors import LoraIncompatible, LoraUnsupported
from lora.formats.adapter import LoraFile, load
from lora.formats.algorithms import Algorithm, DoRA
from lora.formats.contents import Layer, UnusedKey
from lora.formats.header import Header, read_header
from lora.formats.names.families import evidence, identify, named
from lora.formats.names.family import claimed, family_of
from lora.formats.names.keys import KeyMap
from lora.formats.opening import Opened, opened
from lora.tools.adapters.hashes import HASH_FIELDS, Hashes, hashes_of
from lora.tools.adapters.metadata import MAX_WORD, clean, named_bases, training_facts, word_counts
from lora.tools.adapters.own_names import own_key_map
from lora.tools.describe_names import block_of, kind_of, layout_of
from lora.tools.factors.lowrank import delta_norm

MAX_KEYS = 1000
"""How many tensors a list has at most; the counts are complete."""


@dataclass(frozen=True)
class Spread:
    """The range of a number among layers."""

    least: float
    most: float
    usual: float
    """The most frequent value; of several the least."""


@dataclass(frozen=True)
class Component:
    """What the file changes in one component."""

    modules: int
    kinds: Mapping[str, int]
    """Kind of layer -> modules."""
    rank: Spread | None
    alpha: Spread | None
    """None if no layer has one; then the rank takes its place."""
    scaling: Spread | None
    """By what the product of the factors is multiplied at scale 1."""


@dataclass(frozen=True)
class BlockNorm:
    """How much the file changes one block."""

    component: str
    block: str
    layers: int
    norm: float
    """The Frobenius norm of all deltas of the block together, at scale 1."""


@dataclass(frozen=True)
class Fit:
    """How the file fits a model."""

    modules: int
    """How many modules of the model it changes."""
    matched: int
    """How many tensors have a place in the model."""
    unmatched: int
    keys: tuple[UnusedKey, ...]
    """The unmatched tensors; at most `MAX_KEYS`."""
    trouble: str | None
    """Why the file cannot be applied at all."""


@dataclass(frozen=True)
class Description:
    """Everything that is known of an adapter file. Control characters are removed from all texts."""

    file: str
    """Its path, as it was given."""
    form: str
    bytes: int
    tensors: int
    algorithms: Mapping[str, int]
    """Algorithm -> number of modules; nothing if it is no adapter."""
    layouts: Mapping[str, int]
    """Naming convention -> number of tensors."""
    base: str | None
    """The family of models that it is for."""
    base_told_by: Mapping[str, str]
    """Evidence (a field of the metadata, or `names and shapes`) -> the base model by it."""
    dtypes: Mapping[str, int]
    components: Mapping[str, Component]
    words: Mapping[str, int]
    """Trigger word -> how often the captions had it; 0 if that is not known."""
    embeddings: tuple[str, ...]
    """New words of the prompt, of which the file has the vectors; empty for one named after the file."""
    training: Mapping[str, str]
    hashes: Hashes
    hashes_told: Mapping[str, str]
    """The hashes in the file's own metadata."""
    norms: tuple[BlockNorm, ...]
    without_norm: int
    """How many layers have no norm: it depends on the model's weights, or the matrix is too large to form."""
    unused: tuple[UnusedKey, ...]
    """Tensors that no model could use; at most `MAX_KEYS`."""
    fit: Fit | None = None
    warnings: tuple[str, ...] = field(default=())


def describe(path: Path, against: KeyMap | None = None) -> Description:
    """Describes a .safetensors file, a pickle or a PEFT folder, which is read whole.

    Raises: LoraNotFound; LoraCorrupt, for NaN and infinity too; LoraUnsupported for what is no adapter, such
    as the weights of a whole model; OSError.
    """
    with opened(path) as adapter:
        header = read_header(adapter.file)
        hashes = hashes_of(adapter.original)
        key_map = own_key_map(header)
        file = load(adapter.file, key_map, hashes.sha256, config=adapter.config)
        fit = _fit(adapter, against, hashes.sha256) if against else None
    norms, without = _norms(file)
    bases = _bases(header, adapter.config)
    return Description(
        file=clean(path),
        form=adapter.form,
        bytes=adapter.original.stat().st_size,
        tensors=len(header.tensors),
        algorithms=_algorithms(file),
        layouts=_counted(layout_of(key) for key in header.tensors),
        base=_family(header, bases),
        base_told_by=bases,
        dtypes=_counted(info.dtype for info in header.tensors.values()),
        components=_components(file),
        words=word_counts(header.metadata),
        embeddings=tuple(sorted({clean(one.word, MAX_WORD) for one in file.embeddings})),
        training=training_facts(header.metadata),
        hashes=hashes,
        hashes_told={
            name: clean(text, 80) for name in HASH_FIELDS if (text := header.metadata.get(name))
        },
        norms=norms,
        without_norm=without,
        unused=_keys(file),
        fit=fit,
        warnings=tuple(_warnings(file, header, hashes, bases)),
    )


def _counted(names: Iterable[str]) -> dict[str, int]:
    """The most frequent name first; names of the same count in alphabetical order."""
    return dict(sorted(Counter(names).items(), key=lambda item: (-item[1], item[0])))


def _algorithms(file: LoraFile) -> dict[str, int]:
    layers = {(one.target, one.algorithm.name) for one in file.layers}
    words = ["textual inversion"] * len(file.embeddings)
    return _counted([*(name for _, name in layers), *words])


BY_SHAPES = "names and shapes"


def _bases(header: Header, config: str | None) -> dict[str, str]:
    """Evidence -> the base model that the file is for by it; names and shapes come first."""
    by_shapes = identify(Header(header.tensors, {}))  # no metadata: the fields follow
    first = {BY_SHAPES: by_shapes} if by_shapes else {}
    return first | named_bases(header.metadata, config)


def _family(header: Header, bases: Mapping[str, str]) -> str | None:
    """Of the families that names and shapes leave, the one that the metadata names, if there is one."""
    found, told = evidence(header), claimed(bases)
    return told if told and (not found or told in found) else bases.get(BY_SHAPES)


def _warnings(
    file: LoraFile, header: Header, hashes: Hashes, bases: Mapping[str, str]
) -> Iterator[str]:
    model_hash = header.metadata.get("sshs_model_hash", "").lower()
    if model_hash and hashes.model_hash and model_hash != hashes.model_hash:
        yield "sshs_model_hash is not the tensors' hash: they were changed after training"
    if not file.scaled and any(layer.algorithm.rank for layer in file.layers):
        yield "the file says nothing of alpha: it counts as the rank"
    found = evidence(header)
    for name, base in bases.items():
        family = family_of(base) if name != BY_SHAPES else None
        if family and found and family not in found:
            yield f"{name} says {family}, names and shapes say {named(found)}"


def _components(file: LoraFile) -> dict[str, Component]:
    layers: dict[str, list[Layer]] = defaultdict(list)
    for layer in file.layers:
        layers[layer.target.component].append(layer)
    return {component: _component(changed) for component, changed in layers.items()}


def _component(layers: list[Layer]) -> Component:
    inner = (_inner(layer.algorithm) for layer in layers)
    ranked = [(algorithm, rank) for algorithm in inner if (rank := algorithm.rank)]
    alphas = [_alpha(algorithm) for algorithm, _ in ranked]
    return Component(
        modules=len({layer.target for layer in layers}),
        kinds=_counted(kind_of(target.path) for target in {layer.target for layer in layers}),
        rank=_spread(rank for _, rank in ranked),
        alpha=_spread(alpha for alpha in alphas if alpha is not None),
        scaling=_spread(
            alpha / rank if alpha else 1.0 for (_, rank), alpha in zip(ranked, alphas, strict=True)
        ),
    )


def _inner(algorithm: Algorithm) -> Algorithm:
    return algorithm.inner if isinstance(algorithm, DoRA) else algorithm


def _alpha(algorithm: Algorithm) -> float | None:
    alpha = getattr(algorithm, "alpha", None)
    return None if alpha is None else float(alpha)


def _spread(values: Iterable[float]) -> Spread | None:
    counts = Counter(float(f"{value:.6g}") for value in values if math.isfinite(value))
    if not counts:
        return None
    usual = min(counts, key=lambda value: (-counts[value], value))
    return Spread(min(counts), max(counts), usual)


def _norms(file: LoraFile) -> tuple[tuple[BlockNorm, ...], int]:
    squares: dict[tuple[str, str], list[float]] = defaultdict(list)
    without = 0
    for layer in file.layers:
        target = layer.target
        norm = delta_norm(layer.algorithm, target.parameters[layer.parameter])
        if norm is None:
            without += 1
        else:
            squares[target.component, block_of(target.component, target.path)].append(norm**2)
    norms = [
        BlockNorm(component, block, len(layers), math.sqrt(math.fsum(layers)))
        for (component, block), layers in squares.items()
    ]
    norms.sort(key=lambda norm: (norm.component != "unet", norm.component, norm.block))
    return tuple(norms), without


def _keys(file: LoraFile) -> tuple[UnusedKey, ...]:
    return tuple(UnusedKey(clean(one.key), clean(one.reason)) for one in file.unused[:MAX_KEYS])


def _fit(adapter: Opened, key_map: KeyMap, sha256: str) -> Fit:
    """Which tensors of the file have a place in a model."""
    try:
        file = load(adapter.file, key_map, sha256, config=adapter.config)
    except (LoraIncompatible, LoraUnsupported) as error:
        count = len(read_header(adapter.file).tensors)
        return Fit(0, 0, count, (), clean(error.sentence))
    return Fit(file.modules, file.keys, len(file.unused), _keys(file), None)
