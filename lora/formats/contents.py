"""The one reader of adapter files: their tensors grouped by module, and checked.

The engine, the tools and the library's check read every file through `read_contents`. Each tensor of the file
ends up in a module, among the words that it teaches, or among the unused ones with its reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from lora.errors import LoraIncompatible, LoraUnsupported
from lora.formats.algorithms import Algorithm, recipes
from lora.formats.alphas import Alphas
from lora.formats.embeddings import is_embedding
from lora.formats.families import CROSS_ATTENTION_WIDTHS, cross_attention_width, identify
from lora.formats.header import Header
from lora.formats.names.keys import ONE_NUMBER, REFUSED, SLOTS, KeyMap, Target
from lora.formats.tensors import read_runs

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
    """The tensors that a file has for one module of the model."""

    target: Target
    stem: str
    """The module's name in the file."""
    keys: dict[str, str] = field(default_factory=dict)
    """Slot of `keys.SLOTS` -> key."""
    slots: dict[str, Tensor] = field(default_factory=dict)
    """Slot -> tensor, with those that a PEFT config adds."""
    layers: list[Layer] = field(default_factory=list)
    """What the tensors do to the module's parameters; empty if shapes were not checked."""


@dataclass(eq=False)
class Contents:
    """A whole adapter file."""

    header: Header
    alphas: Alphas
    modules: dict[Target, Module] = field(default_factory=dict)
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

    Raises: LoraCorrupt if the file is not whole, or holds NaN or infinity; LoraUnsupported if it is a model.
    """
    contents = Contents(header, Alphas.of(header.metadata, config))
    words = _group_keys(contents, key_map)
    runs = read_runs(path, header, mapped=mapped)
    tensors = {name: tensor for run in runs for name, tensor in run.tensors()}
    contents.words = {key: tensors[key] for key in words}
    for module in list(contents.modules.values()):
        module.slots = {slot: tensors[key] for slot, key in module.keys.items()}
        contents.alphas.complete(module.slots, module.target.component, module.stem)
        if reasons := _check(contents, module, check_shapes=check_shapes):
            _drop(contents, module, reasons)
    return contents


def _group_keys(contents: Contents, key_map: KeyMap) -> list[str]:
    """Finds the module of each key, before any tensor is read. Returns the keys of words."""
    words: list[str] = []
    modules, adapter = contents.modules, False
    for key in contents.header.tensors:
        match = key_map.match(key)
        if match is None and is_embedding(key):
            words.append(key)
            continue
        if match is None:
            missing = key_map.missing_component(key)
            reason = f"this model has no {missing}" if missing else UNKNOWN_MODULE
            contents.unused.append(UnusedKey(key, reason))
            continue
        adapter = adapter or key[len(match.stem) + 1 :] not in ("weight", "bias")
        module = modules.get(match.target)
        if module is None:
            module = modules[match.target] = Module(match.target, match.stem)
        twin = module.keys.setdefault(match.slot, key)
        if twin is not key:
            contents.unused.append(UnusedKey(key, f"says the same as {twin[:MAX_SHOWN]}"))
    if modules and not adapter:
        raise LoraUnsupported(
            "the file holds a model's own weights, and none of an adapter",
            "Extract a LoRA from it first.",
        )
    return words


def _drop(contents: Contents, module: Module, reasons: Mapping[str, str]) -> None:
    """Lists slots as unused, and takes the module out if none is left."""
    for slot, reason in reasons.items():
        del module.slots[slot]
        if slot in module.keys:
            contents.unused.append(UnusedKey(module.keys.pop(slot), reason))
    if not module.slots:
        del contents.modules[module.target]


def _check(contents: Contents, module: Module, *, check_shapes: bool) -> Mapping[str, str]:
    """Makes the module's layers, or notes that it does not fit. Returns a reason for each slot that cannot
    be used.
    """
    slots = module.slots
    if trouble := _trouble(slots):
        return dict.fromkeys(slots, trouble)
    used, left = recipes(frozenset(slots))
    alone = {"alpha": "there is nothing for it to scale"} if used and left == {"alpha"} else {}
    if left and not alone:
        known = left <= set(SLOTS.values())
        fault = "a part is missing" if known else "no known algorithm has such tensors"
        shown = [slot.removeprefix("?")[:40] for slot in sorted(slots)[:MAX_SLOTS_SHOWN]]
        more = ", ..." * (len(slots) > MAX_SLOTS_SHOWN)
        return dict.fromkeys(slots, f"{fault} (the layer has {', '.join(shown)}{more})")
    target = module.target
    for recipe in used if check_shapes else ():
        algorithm = recipe.make(slots)
        parameter = target.parameter(algorithm.parameter)
        if parameter is None:
            return dict.fromkeys(slots, f"the module has no {algorithm.parameter}")
        shape = target.parameters[parameter]
        if misfit := algorithm.misfit(shape):
            if (
                "the layer" in misfit or "the parameter" in misfit
            ):  # else the file alone is at fault
                contents.misfits += [UnusedKey(key, misfit) for key in module.keys.values()]
            return dict.fromkeys(slots, misfit)
        count = len(recipe.used & module.keys.keys())
        module.layers.append(Layer(target, parameter, algorithm, count))
        for companion in algorithm.companions(shape):
            if name := target.parameter(companion.parameter):
                module.layers.append(Layer(target, name, companion, 0))
    return alone


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


HINT = "Choose a LoRA that was made for this model."


def refuse_other_models(contents: Contents, key_map: KeyMap | None, *, used: bool) -> None:
    """Refuses a file of which nothing can be used, and one whose cross attention is not the model's:
    some layers of another family's file may fit by chance. Without `key_map` the latter is not checked.

    Raises: LoraIncompatible; LoraUnsupported if the file has modules of this model, and none can be applied.
    """
    header, unused = contents.header, contents.unused
    width, ours = cross_attention_width(header), key_map and _cross_attention_of(key_map)
    if width and ours and width != ours:
        # Metadata may name a family whose width this is not: the demo's LoRAs are SDXL's in all but size.
        family = CROSS_ATTENTION_WIDTHS.get(width)
        made_for = f"{family}, whose" if family else "a model whose"
        raise LoraIncompatible(
            f"the file was made for {made_for} cross attention reads {width} values per token, "
            f"and this model's reads {ours}",
            HINT,
        )
    if used:
        return
    bound = [u for u in unused if u.reason != UNKNOWN_MODULE and "has no" not in u.reason]
    misfit = next((u for u in contents.misfits if len(contents.misfits) == len(bound)), None)
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
    raise LoraIncompatible(
        f"{made_for}, and none of its {len(unused)} tensors fits this model "
        f"({first.key[:MAX_SHOWN]}: {first.reason})",
        HINT,
    )


def _cross_attention_of(key_map: KeyMap) -> int | None:
    widths = {t.parameters["weight"][1] for t in key_map.targets if t.path.endswith(".attn2.to_k")}
    return widths.pop() if len(widths) == 1 else None
