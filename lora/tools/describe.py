"""What an adapter file is: algorithms, layout, base model, ranks, training, hashes, and how much it changes.

Nothing needs a model: the file is read against the modules that it names itself (`own_names`). With a
model's `KeyMap`, what fits and what does not is told besides.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lora.errors import LoraIncompatible, LoraUnsupported
from lora.formats.adapter import LoraFile, load
from lora.formats.algorithms import Algorithm, DoRA
from lora.formats.contents import Layer
from lora.formats.families import family_of, identify
from lora.formats.header import Header, read_header
from lora.formats.names.keys import KeyMap
from lora.tools.adapters.hashes import Hashes, hashes_of
from lora.tools.adapters.metadata import (
    MAX_WORD,
    clean,
    named_bases,
    training_facts,
    trigger_words,
)
from lora.tools.adapters.opening import Opened, opened
from lora.tools.adapters.own_names import own_key_map
from lora.tools.describe_names import block_of, kind_of, layout_of
from lora.tools.factors.norms import delta_norm

MAX_KEYS = 1000
"""How many tensors a list names; its count is told whole."""


@dataclass(frozen=True)
class Spread:
    """The values that layers have."""

    least: float
    most: float
    usual: float
    """The most frequent; the least of several."""


@dataclass(frozen=True)
class Component:
    """What the file does to one component."""

    modules: int
    kinds: Mapping[str, int]
    """Kind of layer -> modules."""
    rank: Spread | None
    alpha: Spread | None
    """None where no layer has one: then it counts as the rank."""
    scaling: Spread | None
    """What the product of the factors is multiplied by, at scale 1."""


@dataclass(frozen=True)
class BlockNorm:
    """How much the file changes one block."""

    component: str
    block: str
    layers: int
    norm: float
    """The Frobenius norm of the block's deltas, taken together, at scale 1."""


@dataclass(frozen=True)
class Key:
    """A tensor that is not used, and why."""

    key: str
    reason: str


@dataclass(frozen=True)
class Fit:
    """How the file fits a model."""

    modules: int
    """How many modules of the model it changes."""
    matched: int
    """Tensors with a place in the model."""
    unmatched: int
    keys: tuple[Key, ...]
    """The unmatched; the first `MAX_KEYS`."""
    trouble: str | None
    """Why the file as a whole cannot be applied."""


@dataclass(frozen=True)
class Description:
    """Everything that can be told of an adapter file. Its texts are cleaned of what a terminal would obey."""

    file: str
    form: str
    bytes: int
    tensors: int
    algorithms: Mapping[str, int]
    """Algorithm -> modules; nothing if it is no adapter."""
    layouts: Mapping[str, int]
    """Convention of the names -> tensors."""
    base: str | None
    """The family of models that it is for."""
    base_told_by: Mapping[str, str]
    """What says so -> what it says: fields of the metadata, and `names and shapes`."""
    dtypes: Mapping[str, int]
    components: Mapping[str, Component]
    words: Mapping[str, int]
    """Trigger words -> how often they were in the captions; 0 where that is not known."""
    embeddings: tuple[str, ...]
    """New words of the prompt whose vectors are in the file; empty text for one named after the file."""
    training: Mapping[str, str]
    hashes: Hashes
    hashes_told: Mapping[str, str]
    """The hashes in the file's own metadata."""
    norms: tuple[BlockNorm, ...]
    without_norm: int
    """Layers whose change depends on the model's weights, or is larger than any layer."""
    unused: tuple[Key, ...]
    """Tensors that no model could use; the first `MAX_KEYS`."""
    fit: Fit | None = None
    warnings: tuple[str, ...] = field(default=())


def describe(path: Path, against: KeyMap | None = None) -> Description:
    """Describes a .safetensors file, a pickle or a PEFT folder. Reads all of it; changes nothing.

    Raises: LoraNotFound, LoraCorrupt (NaN and infinity too), LoraUnsupported for what is no adapter, as a
    whole model's weights; OSError.
    """
    with opened(path) as found:
        header = read_header(found.file)
        hashes = hashes_of(found.original)
        key_map = own_key_map(header)
        file = load(found.file, key_map, hashes.sha256, config=found.config)
        fit = _fit(found, against, hashes.sha256) if against else None
    norms, without = _norms(file)
    told = _told_bases(header, found.config)
    return Description(
        file=clean(path.name),
        form=found.form,
        bytes=found.original.stat().st_size,
        tensors=len(header.tensors),
        algorithms=_algorithms(file),
        layouts=_counted(layout_of(key) for key in header.tensors),
        base=_family(told),
        base_told_by=told,
        dtypes=_counted(info.dtype for info in header.tensors.values()),
        components=_components(file),
        words=trigger_words(header.metadata),
        embeddings=tuple(sorted({clean(one.word, MAX_WORD) for one in file.embeddings})),
        training=training_facts(header.metadata),
        hashes=hashes,
        hashes_told=_told_hashes(header.metadata),
        norms=norms,
        without_norm=without,
        unused=_keys(file),
        fit=fit,
        warnings=_warnings(file, header, hashes, told),
    )


def _counted(names: Iterable[str]) -> dict[str, int]:
    """The most frequent first; of as many, in the order of the alphabet."""
    return dict(sorted(Counter(names).items(), key=lambda item: (-item[1], item[0])))


def _algorithms(file: LoraFile) -> dict[str, int]:
    layers = {(one.target, one.algorithm.name) for one in file.layers}
    words = ["textual inversion"] * len(file.embeddings)
    return _counted([*(name for _, name in layers), *words])


BY_SHAPES = "names and shapes"


def _told_bases(header: Header, config: str | None) -> dict[str, str]:
    """What says which base model it is for -> what it says; names and shapes first."""
    by_shapes = identify(Header(header.tensors, {}))
    first = {BY_SHAPES: by_shapes} if by_shapes else {}
    return first | named_bases(header.metadata, config)


def _family(told: Mapping[str, str]) -> str | None:
    families = (family_of(base) for name, base in told.items() if name != BY_SHAPES)
    return told.get(BY_SHAPES) or next((family for family in families if family), None)


HASHES_TOLD = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")


def _told_hashes(metadata: Mapping[str, str]) -> dict[str, str]:
    return {name: clean(metadata[name], 80) for name in HASHES_TOLD if metadata.get(name)}


def _warnings(
    file: LoraFile, header: Header, hashes: Hashes, told: Mapping[str, str]
) -> tuple[str, ...]:
    found = []
    model_hash = header.metadata.get("sshs_model_hash", "").lower()
    if model_hash and hashes.model_hash and model_hash != hashes.model_hash:
        found.append("sshs_model_hash is not the tensors' hash: they were changed after training")
    if not file.scaled and any(layer.algorithm.rank for layer in file.layers):
        found.append("the file says nothing of alpha: it counts as the rank")
    for name, base in told.items():
        family = family_of(base) if name != BY_SHAPES else None
        if family and BY_SHAPES in told and family != told[BY_SHAPES]:
            found.append(f"{name} says {family}, names and shapes say {told[BY_SHAPES]}")
    return tuple(found)


def _components(file: LoraFile) -> dict[str, Component]:
    layers: dict[str, list[Layer]] = defaultdict(list)
    for layer in file.layers:
        layers[layer.target.component].append(layer)
    return {component: _component(found) for component, found in layers.items()}


def _component(layers: list[Layer]) -> Component:
    parts = [_inner(layer.algorithm) for layer in layers]
    ranked = [(part, rank) for part in parts if (rank := part.rank)]
    alphas = [_alpha(part) for part, _ in ranked]
    return Component(
        modules=len({layer.target for layer in layers}),
        kinds=_counted(kind_of(target.path) for target in {layer.target for layer in layers}),
        rank=_spread(rank for _, rank in ranked),
        alpha=_spread(alpha for alpha in alphas if alpha is not None),
        scaling=_spread(
            alpha / rank if alpha else 1.0 for (_, rank), alpha in zip(ranked, alphas, strict=True)
        ),
    )


def _inner(part: Algorithm) -> Algorithm:
    return part.inner if isinstance(part, DoRA) else part


def _alpha(part: Algorithm) -> float | None:
    alpha = getattr(part, "alpha", None)
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
    found = (
        BlockNorm(component, block, len(parts), math.sqrt(math.fsum(parts)))
        for (component, block), parts in squares.items()
    )
    return tuple(
        sorted(found, key=lambda one: (one.component != "unet", one.component, one.block))
    ), without


def _keys(file: LoraFile) -> tuple[Key, ...]:
    return tuple(Key(clean(one.key), clean(one.reason)) for one in file.unused[:MAX_KEYS])


def _fit(found: Opened, key_map: KeyMap, sha256: str) -> Fit:
    """What of the file has a place in a model."""
    try:
        file = load(found.file, key_map, sha256, config=found.config)
    except (LoraIncompatible, LoraUnsupported) as error:
        count = len(read_header(found.file).tensors)
        return Fit(0, 0, count, (), clean(error.sentence))
    return Fit(file.modules, file.keys, len(file.unused), _keys(file), None)
