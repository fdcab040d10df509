"""The one reader of adapter files: their tensors grouped by module, and checked.

The engine, the tools and the library's check read every file through `read_contents`. Each tensor of the file
ends up in a module, among the words that it teaches, or among the unused ones with its reason.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from lora.errors import LoraIncompatible, LoraUnsupported
from lora.formats.algorithms import Algorithm, Flaw, recipes
from lora.formats.alphas import Alphas
from lora.formats.evidence import HINT, Keys, refuse_strangers
from lora.formats.header import Header
from lora.formats.names.encoders import encoder_of
from lora.formats.names.families import identify
from lora.formats.names.keys import KeyMap, Match, Target
from lora.formats.names.prefixes import unwrapped
from lora.formats.names.slots import BARE, MAX_KEY, ONE_NUMBER, REFUSED, SLOTS
from lora.formats.shared import is_shared, share
from lora.formats.tensors import read_runs
from lora.formats.trainers import settle
from lora.formats.twins import AGAIN, repeated

UNKNOWN_MODULE = "no module of this model has that name"

NOT_FLOATING = ("bias_indices", "bias_size", *ONE_NUMBER)
"""The slots that may hold whole numbers, and whose precision is never changed."""

MAX_SHOWN, MAX_SLOTS_SHOWN = 200, 8
"""How much of a tensor's name a message repeats, and how many of a module's tensors."""


@dataclass(frozen=True, eq=False)
class Layer:
    """What a file does to one parameter of one module."""

    target: Target
    parameter: str
    """The module's own name for it: weight, bias, ..."""
    algorithm: Algorithm
    keys: int
    """How many tensors of the file it is made of."""


@dataclass(frozen=True)
class UnusedKey:
    """A tensor of the file that is not used, and why."""

    key: str
    reason: str


@dataclass(eq=False, slots=True)
class Module:
    """The tensors that a file has for one module of the model, under one name and of one adapter."""

    target: Target
    stem: str
    """The module's name in the file."""
    adapter: str = ""
    """The adapter's name in its keys, where PEFT left one."""
    keys: dict[str, str] = field(default_factory=dict)
    """Slot of `slots.SLOTS` -> key."""
    slots: dict[str, Tensor] = field(default_factory=dict)
    """Slot -> tensor, with those that a PEFT config adds."""
    layers: list[Layer] = field(default_factory=list)
    """What the tensors do to the module's parameters; empty if shapes were not checked."""


@dataclass(eq=False)
class Contents:
    """A whole adapter file."""

    header: Header
    alphas: Alphas
    modules: dict[tuple[Target, str, str], Module] = field(default_factory=dict)
    """By target, name in the file and adapter: tensors of different ones are never joined."""
    words: dict[str, Tensor] = field(default_factory=dict)
    """Key -> the vectors of a word of the prompt, as the file has them."""
    unused: list[UnusedKey] = field(default_factory=list)
    misfits: list[UnusedKey] = field(default_factory=list)
    """Those of the unused whose module the model has, and in other shapes."""


def read_contents(
    path: Path,
    header: Header,
    key_map: KeyMap,
    *,
    config: str | None = None,
    mapped: bool = False,
    check_shapes: bool = True,
) -> Contents:
    """Reads a .safetensors adapter and binds its tensors to the modules of `key_map`.

    `header`: the file's own. `config`: the text of a PEFT adapter's adapter_config.json. `mapped`: see
    `read_runs`. Without `check_shapes`, `key_map` is only asked for names: its model may have other shapes.
    A module is used as a whole or not at all: half of it would be another adapter than the one trained.

    Raises: LoraCorrupt if the file is not whole, or holds NaN or infinity; LoraIncompatible if it is for
    another model; LoraUnsupported if it is a model, holds two LoRAs, or its config says what is not read.
    """
    contents = Contents(header, Alphas.of(header.metadata, config))
    keys = _group_keys(contents, key_map)
    refuse_strangers(header, key_map, keys, contents.alphas.base_model, widths=check_shapes)
    runs = read_runs(path, header, mapped=mapped)
    tensors = {name: tensor for run in runs for name, tensor in run.tensors()}
    contents.words = {key: tensors[key] for key in keys.words}
    modules = contents.modules
    for module in modules.values():
        module.slots = {slot: tensors[key] for slot, key in module.keys.items()}
    if len(modules) > len({target for target, _, _ in modules}):
        for twin, reason in tuple(repeated(modules.values())):
            _drop(
                contents,
                modules[twin.target, twin.stem, twin.adapter],
                dict.fromkeys(twin.slots, reason),
            )
    shared = {key: tensors[key] for key in keys.shared}
    if not share(modules.values(), shared):
        contents.unused += [UnusedKey(key, "no layer of the file uses it") for key in shared]
    for module in list(modules.values()):
        if reasons := _check(contents, module, check_shapes=check_shapes):
            _drop(contents, module, reasons)
    return contents


def _group_keys(contents: Contents, key_map: KeyMap) -> Keys:
    """Finds the module of each key, before any tensor is read."""
    keys, modules = Keys(has_config=bool(contents.alphas.configs)), contents.modules
    tensors = contents.header.tensors
    for key in tensors:
        if is_shared(key):
            keys.shared.append(key)
        elif match := key_map.match(key):
            _put(modules, match, key)
        else:
            keys.strangers.append(key)
    keys.tell_words(tensors)
    if keys.strangers and (encoder := encoder_of(tensors, keys.strangers, key_map)):
        others, keys.strangers = keys.strangers, []
        for key in others:
            if match := key_map.match(f"{encoder}.{unwrapped(key)}"):
                _put(modules, match, key)
            else:
                keys.strangers.append(key)
    if keys.strangers:
        _sort_strangers(contents, keys, key_map)
    if keys.strangers or any(not BARE.isdisjoint(module.keys) for module in modules.values()):
        # A plain file has nothing to compare them with.
        for module in modules.values():
            keys.count(module.keys, draws=module.target.component == key_map.components[0])
    return keys


def _put(modules: dict[tuple[Target, str, str], Module], match: Match, key: str) -> None:
    """Adds a key to its module."""
    place = match.target, match.stem, match.adapter
    while True:
        module = modules.get(place)
        if module is None:
            module = modules[place] = Module(*place)
        if module.keys.setdefault(match.slot, key) is key:
            return
        # Another suffix for the same slot (`lora_A.weight`, `lora_down.weight`) begins another set.
        place = match.target, match.stem, place[2] + AGAIN


_PART = re.compile(r"_(?:lora|dora|magnitude|alpha|diff|hada|lokr|oft|boft|rescale|bias|scale)")


def _sort_strangers(contents: Contents, keys: Keys, key_map: KeyMap) -> None:
    """Gives reasons to the keys of no module. One that plainly continues a module's name belongs to it, so
    that the module is not used without it.
    """
    stems = {module.stem.replace(".", "_"): module for module in contents.modules.values()}
    orphans = set()
    for key in keys.strangers:
        flat = unwrapped(key).replace(".", "_")
        parts = (flat[: part.start()] for part in _PART.finditer(flat[:MAX_KEY]))
        if module := next(filter(None, map(stems.get, parts)), None):
            module.keys[f"?{key}"] = key
            orphans.add(key)
            continue
        missing = key_map.missing_component(key)
        keys.elsewhere += missing is not None
        reason = f"this model has no {missing}" if missing else UNKNOWN_MODULE
        contents.unused.append(UnusedKey(key, reason))
    keys.strangers = [key for key in keys.strangers if key not in orphans]


def _drop(contents: Contents, module: Module, reasons: Mapping[str, str]) -> None:
    """Lists slots as unused, and takes the module out if none is left."""
    for slot, reason in reasons.items():
        module.slots.pop(slot, None)
        if slot in module.keys:
            contents.unused.append(UnusedKey(module.keys.pop(slot), reason))
    if not module.slots:
        del contents.modules[module.target, module.stem, module.adapter]


def _check(contents: Contents, module: Module, *, check_shapes: bool) -> Mapping[str, str]:
    """Makes the module's layers, or notes that it does not fit. Returns a reason for each slot that cannot
    be used.
    """
    slots, target = module.slots, module.target
    alphas, about = contents.alphas, contents.header.metadata
    shape = target.parameters.get("weight", ())
    trouble = settle(slots, module.keys, module.stem, shape, about, has_config=bool(alphas.configs))
    if trouble := trouble or _trouble(slots):
        return _whole(module, trouble)
    if trouble := alphas.complete(slots, target.component, module.stem):
        return _whole(module, trouble)
    implied = module.keys.keys() - slots.keys()
    used, left = recipes(frozenset(slots))
    alone = {"alpha": "there is nothing for it to scale"} if used and left == {"alpha"} else {}
    if left and not alone:
        known = left <= set(SLOTS.values())
        fault = "a part is missing" if known else "no known algorithm has such tensors"
        shown = [slot.removeprefix("?")[:40] for slot in sorted(slots)[:MAX_SLOTS_SHOWN]]
        more = ", ..." * (len(slots) > MAX_SLOTS_SHOWN)
        return _whole(module, f"{fault} (the layer has {', '.join(shown)}{more})")
    for recipe in used if check_shapes else ():
        algorithm = recipe.make(slots)
        parameter = target.parameter(algorithm.parameter)
        if parameter is None:
            return _whole(module, f"the module has no {algorithm.parameter}")
        shape = target.parameters[parameter]
        if misfit := algorithm.misfit(shape):
            if not isinstance(misfit, Flaw):
                contents.misfits += [UnusedKey(key, misfit) for key in module.keys.values()]
            return _whole(module, misfit)
        count = len(recipe.used & module.keys.keys()) + (0 if module.layers else len(implied))
        module.layers.append(Layer(target, parameter, algorithm, count))
        for companion in algorithm.companions(shape):
            if name := target.parameter(companion.parameter):
                module.layers.append(Layer(target, name, companion, 0))
    return alone


def _whole(module: Module, reason: str) -> Mapping[str, str]:
    """The reason for every slot of a module."""
    return dict.fromkeys({**module.slots, **module.keys}, reason)


def _trouble(slots: Mapping[str, Tensor]) -> str | None:
    """What is wrong with a module's tensors, regardless of their algorithm; None if nothing is."""
    for slot, tensor in slots.items():
        if slot in REFUSED:
            return REFUSED[slot]
        if slot in ONE_NUMBER and tensor.numel() != 1:
            return f"{slot} is not one number"
        if 0 in tensor.shape:
            return "a tensor is empty"
        if not tensor.dtype.is_floating_point and (slot not in NOT_FLOATING or tensor.is_complex()):
            dtype = str(tensor.dtype).removeprefix("torch.")
            return f"{slot} is {dtype}, not a floating point number"
    return None


def refuse_misfits(contents: Contents, *, used: bool) -> None:
    """Refuses a file of which nothing can be used, and one whose larger part has other shapes than the model.

    Raises: LoraIncompatible; LoraUnsupported if the file has modules of this model, and none can be applied.
    """
    header, unused = contents.header, contents.unused
    if used and 2 * len(contents.misfits) <= len(header.tensors):
        return
    bound = [u for u in unused if u.reason != UNKNOWN_MODULE and "has no" not in u.reason]
    misfit = next(
        (u for u in contents.misfits if used or len(contents.misfits) == len(bound)), None
    )
    if bound and not misfit:
        raise LoraUnsupported(
            f"none of the file's {len(unused)} tensors can be applied "
            f"({bound[0].key[:MAX_SHOWN]}: {bound[0].reason})",
            "docs/formats.md lists the algorithms that are read.",
        )
    family, first = identify(header), misfit or unused[0]
    made_for = f"the file was made for {family}" if family else "the file is for an unknown model"
    if misfit:
        made_for = "the file was made for a model with layers of other widths"
    fits = (
        f"{len(unused)} of its tensors do not fit"
        if used
        else f"none of its {len(unused)} tensors fits"
    )
    raise LoraIncompatible(
        f"{made_for}, and {fits} this model ({first.key[:MAX_SHOWN]}: {first.reason})",
        HINT,
    )
