"""An adapter file <-> LoraFile: every tensor either belongs to a layer, or is listed with its reason."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from torch import Tensor

from lora.errors import LoraIncompatible, LoraUnsupported
from lora.formats.algorithms import Algorithm, recipes
from lora.formats.alphas import Alphas
from lora.formats.embeddings import TokenEmbedding, is_embedding, read_embedding
from lora.formats.families import cross_attention_width, identify
from lora.formats.header import Header, read_header
from lora.formats.names.keys import REFUSED, SLOTS, KeyMap, Target
from lora.formats.tensors import read_runs

UNKNOWN_MODULE = "no module of this model has that name"

ONE_NUMBER = ("alpha", "on_input", "neumann_terms")

MAX_SHOWN, MAX_SLOTS_SHOWN = 200, 8
"""How much of a tensor's name a message repeats, and how many of a layer's tensors."""

KNOWN_SLOTS = frozenset(SLOTS.values())

NOT_FLOATING = ("bias_indices", "bias_size", "on_input", "neumann_terms", "alpha")
"""The slots that may hold whole numbers."""


@dataclass(frozen=True, eq=False)
class Layer:
    """What a file does to one parameter of one module."""

    target: Target
    parameter: str
    """The module's own name for it: weight, bias, ..."""
    part: Algorithm
    keys: int
    """How many tensors of the file it is made of."""


@dataclass(frozen=True)
class UnusedKey:
    """A tensor of the file that does nothing here, and why."""

    key: str
    reason: str


@dataclass(frozen=True, eq=False)
class LoraFile:
    """A parsed adapter, bound to the modules of one pipeline, its tensors still on the CPU.

    The tensors of its layers, its embeddings and its unused keys together are the whole file.
    """

    sha256: str
    layers: tuple[Layer, ...]
    unused: tuple[UnusedKey, ...]
    metadata: Mapping[str, str]
    embeddings: tuple[TokenEmbedding, ...] = ()
    identity: str = ""
    """What the file does, as a hash: its bytes, and its config's where it has one."""
    size: int = 0
    """Bytes that its tensors take."""
    scaled: bool = True
    """Whether the file or its config says anything of alpha."""

    @cached_property
    def algorithms(self) -> tuple[str, ...]:
        """The algorithms that occur, the most frequent first."""
        found = Counter(layer.part.name for layer in self.layers)
        found["textual inversion"] = len(self.embeddings)
        return tuple(name for name, count in found.most_common() if count)

    @cached_property
    def rank(self) -> int | None:
        """The most frequent rank of its layers; None if none has one."""
        ranks = Counter(layer.part.rank for layer in self.layers if layer.part.rank)
        return ranks.most_common(1)[0][0] if ranks else None

    @cached_property
    def modules(self) -> int:
        """How many modules it changes."""
        return len({layer.target for layer in self.layers})

    @property
    def keys(self) -> int:
        """How many tensors are used."""
        return sum(layer.keys for layer in self.layers) + len(self.embeddings)


def load(
    path: Path, key_map: KeyMap, sha256: str, *, config: str | None = None, mapped: bool = False
) -> LoraFile:
    """Reads a .safetensors adapter and binds it to the pipeline that `key_map` describes.

    `config` is the text of a PEFT adapter's adapter_config.json; `mapped`: see `read_runs`.
    Touches no weight. Raises: LoraCorrupt if the file is not whole, or holds NaN or infinity;
    LoraIncompatible if none of its tensors has a place in this pipeline, or its cross attention is
    another model's; LoraUnsupported if they have, and none can be applied.
    """
    header = read_header(path)
    alphas = Alphas.of(header.metadata, config)
    names = _by_module(header, key_map)
    runs = read_runs(path, header, mapped=mapped)
    tensors = {name: tensor for run in runs for name, tensor in run.tensors()}
    bound = _bind(names, tensors, alphas, key_map)
    _refuse_other_models(header, bound, key_map)
    identity = hashlib.sha256(config.encode()).hexdigest()[:16] if config is not None else ""
    return LoraFile(
        sha256,
        tuple(bound.layers),
        tuple(bound.unused),
        header.metadata,
        tuple(bound.embeddings),
        f"{sha256}{identity}",
        sum(info.end - info.start for info in header.tensors.values()),
        bool(alphas.configs) or any(key.endswith(".alpha") for key in header.tensors),
    )


@dataclass
class _Names:
    """The file's keys by what they mean, before any tensor is looked at."""

    layers: dict[Target, dict[str, str]] = field(default_factory=dict)
    """Module -> slot -> key."""
    stems: dict[Target, str] = field(default_factory=dict)
    """Module -> its name in the file."""
    embeddings: list[str] = field(default_factory=list)
    unused: list[UnusedKey] = field(default_factory=list)


def _by_module(header: Header, key_map: KeyMap) -> _Names:
    names, adapter = _Names(), False
    for key in header.tensors:
        match = key_map.match(key)
        if match is None and is_embedding(key):
            names.embeddings.append(key)
            continue
        if match is None:
            missing = key_map.missing_component(key)
            reason = f"this model has no {missing}" if missing else UNKNOWN_MODULE
            names.unused.append(UnusedKey(key, reason))
            continue
        adapter = adapter or key[len(match.stem) + 1 :] not in ("weight", "bias")
        slots = names.layers.setdefault(match.target, {})
        twin = slots.setdefault(match.slot, key)
        if twin is not key:
            names.unused.append(UnusedKey(key, f"says the same as {twin[:MAX_SHOWN]}"))
        names.stems.setdefault(match.target, match.stem)
    if names.layers and not adapter:
        raise a_model()
    return names


def a_model() -> LoraUnsupported:
    """What to say of a file with a model's own weights."""
    return LoraUnsupported(
        "the file holds a model's own weights, and none of an adapter",
        "Extract a LoRA from it first.",
    )


@dataclass
class _Bound:
    layers: list[Layer] = field(default_factory=list)
    embeddings: list[TokenEmbedding] = field(default_factory=list)
    unused: list[UnusedKey] = field(default_factory=list)


def _bind(names: _Names, tensors: Mapping[str, Tensor], alphas: Alphas, key_map: KeyMap) -> _Bound:
    bound = _Bound(unused=names.unused)
    for key in names.embeddings:
        found = read_embedding(key, tensors[key], key_map)
        if isinstance(found, str):
            bound.unused.append(UnusedKey(key, found))
        else:
            bound.embeddings.append(found)
    for target, keys in names.layers.items():
        slots = {slot: tensors[key] for slot, key in keys.items()}
        alphas.complete(slots, target.component, names.stems[target])
        layers, reasons = _read_layer(target, slots, keys)
        bound.layers += layers
        bound.unused += [
            UnusedKey(keys[slot], why) for slot, why in reasons.items() if slot in keys
        ]
    return bound


def _read_layer(
    target: Target, slots: Mapping[str, Tensor], keys: Mapping[str, str]
) -> tuple[list[Layer], Mapping[str, str]]:
    """The layers that one module's tensors make up, and a reason for each slot that is not used.

    A module is changed as a whole or not at all: half of it would be another adapter than the one trained.
    """
    if trouble := _trouble(slots):
        return [], dict.fromkeys(slots, trouble)
    found, left = recipes(frozenset(slots))
    alone = {"alpha": "there is nothing for it to scale"} if found and left == {"alpha"} else {}
    if left and not alone:
        known = left <= KNOWN_SLOTS
        words = "a part is missing" if known else "no known algorithm has such tensors"
        shown = [slot.removeprefix("?")[:40] for slot in sorted(slots)[:MAX_SLOTS_SHOWN]]
        why = (
            f"{words} (the layer has {', '.join(shown)}{', ...' * (len(slots) > MAX_SLOTS_SHOWN)})"
        )
        return [], dict.fromkeys(slots, why)
    layers = []
    for recipe in found:
        part = recipe.make(slots)
        parameter = target.parameter(part.parameter)
        if parameter is None:
            return [], dict.fromkeys(slots, f"the module has no {part.parameter}")
        if misfit := part.misfit(target.parameters[parameter]):
            return [], dict.fromkeys(slots, misfit)
        layers.append(Layer(target, parameter, part, len(recipe.used & keys.keys())))
        for more in part.companions(target.parameters[parameter]):
            if name := target.parameter(more.parameter):
                layers.append(Layer(target, name, more, 0))
    return layers, alone


def _trouble(slots: Mapping[str, Tensor]) -> str | None:
    """What is wrong with a layer's tensors, whatever algorithm they are."""
    for slot, tensor in slots.items():
        if slot in REFUSED:
            return REFUSED[slot]
        if slot in ONE_NUMBER and tensor.numel() != 1:
            return f"{slot} is not one number"
        if 0 in tensor.shape:
            return "a tensor is empty"
        if not tensor.dtype.is_floating_point and (slot not in NOT_FLOATING or tensor.is_complex()):
            return (
                f"{slot} is {str(tensor.dtype).removeprefix('torch.')}, not a floating point number"
            )
    return None


HINT = "Choose a LoRA for this model."


def _refuse_other_models(header: Header, bound: _Bound, key_map: KeyMap) -> None:
    """Some layers of another family's file may fit by chance, so its cross attention must fit too."""
    width, ours = cross_attention_width(header), _cross_attention_of(key_map)
    fits = not (width and ours) or width == ours
    if fits and (bound.layers or bound.embeddings):
        return
    family, unused = identify(header), bound.unused
    what = f"the file was made for {family}" if family else "the file is for an unknown model"
    if not fits:
        raise LoraIncompatible(
            f"{what} (its cross attention reads {width} values per token, this model's {ours})",
            HINT,
        )
    known = [u for u in unused if u.reason != UNKNOWN_MODULE and "has no" not in u.reason]
    if known:
        raise LoraUnsupported(
            f"none of the file's {len(unused)} tensors can be applied "
            f"({known[0].key[:MAX_SHOWN]}: {known[0].reason})",
            "The README lists the algorithms that are read.",
        )
    raise LoraIncompatible(
        f"{what}, and none of its {len(unused)} tensors fits this model "
        f"({unused[0].key[:MAX_SHOWN]}: {unused[0].reason})",
        HINT,
    )


def _cross_attention_of(key_map: KeyMap) -> int | None:
    widths = {t.parameters["weight"][1] for t in key_map.targets if t.path.endswith(".attn2.to_k")}
    return widths.pop() if len(widths) == 1 else None
