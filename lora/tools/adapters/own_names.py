"""Finds an adapter's modules by its own names and shapes, where no model is at hand."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping

from lora.errors import LoraUnsupported
from lora.formats.embeddings import BUNDLE, ENCODERS, is_embedding
from lora.formats.families import identify
from lora.formats.header import Header
from lora.formats.names.keys import COMPONENTS, MAX_KEY, PEFT_PREFIX, KeyMap, Shape, slot_of

Slots = Mapping[str, Shape]
"""Slot -> the shape of its tensor."""

TRANSFORMERS = ("Flux", "Qwen-Image", "SD 3", "Wan")
"""The families whose drawing component is a transformer."""


def split_key(key: str) -> tuple[str, str] | None:
    """(module's name in the file, slot), by the longest known suffix; None if the key has none."""
    if len(key) > MAX_KEY:
        return None
    for dot in re.finditer(r"\.", key):
        slot = slot_of(key[dot.end() :])
        if not slot.startswith("?"):
            return key[: dot.start()], slot
    return None


def component_of(stem: str, main: str) -> tuple[str, str]:
    """(component, path) of a module's name. `main`: the component of names without a prefix."""
    for component in sorted(COMPONENTS, key=lambda name: not name.startswith("text_encoder")):
        for prefix in COMPONENTS[component].all:
            if stem.startswith(prefix):
                path = stem.removeprefix(prefix)
                text = component.startswith("text_encoder")
                return (component, path.removeprefix("text_model.")) if text else (main, path)
    return main, stem.removeprefix(PEFT_PREFIX)


def main_component(header: Header) -> str:
    """The component that draws, or writes, in the model which a file is for."""
    family = identify(header)
    if family == "language model":
        return "model"
    named = any(key.startswith("transformer.") for key in header.tensors)
    return "transformer" if named or family in TRANSFORMERS else "unet"


def own_key_map(header: Header) -> KeyMap:
    """A map of the modules that the file itself names, in the shapes that its tensors need.

    Every tensor that fits some model has a place in it; the rest is unused. A module's path is its name in
    the file without the component's prefix.
    Raises: LoraUnsupported if two of its names could mean one module.
    """
    main = main_component(header)
    components: dict[str, dict[str, dict[str, Shape]]] = {main: {}}
    for (component, path), slots in _by_module(header, main).items():
        components.setdefault(component, {})[path] = _parameters(slots)
    for component, width in _embedding_widths(header):
        modules = components.setdefault(component, {})
        modules.setdefault("embeddings.token_embedding", {"weight": (1, width)})
    try:
        return KeyMap({component: modules for component, modules in components.items() if modules})
    except ValueError as error:
        raise LoraUnsupported("two names in the file could mean the same module") from error


def _by_module(header: Header, main: str) -> dict[tuple[str, str], dict[str, Shape]]:
    modules: dict[tuple[str, str], dict[str, Shape]] = {}
    for key, info in header.tensors.items():
        parts = None if is_embedding(key) else split_key(key)
        if parts:
            modules.setdefault(component_of(parts[0], main), {})[parts[1]] = info.shape
    return modules


def _embedding_widths(header: Header) -> Iterator[tuple[str, int]]:
    for key, info in header.tensors.items():
        if is_embedding(key) and info.shape:
            kind = key.rpartition(".")[2] if key.startswith(BUNDLE) else key
            yield ENCODERS.get(kind, "text_encoder"), info.shape[-1]


# --- the shape of the layer that slots are for --------------------------------------------------


def _low_rank(slots: Slots) -> Shape:
    down = slots["lora_down"]
    kernel = slots["lora_mid"][2:] if "lora_mid" in slots else down[2:]
    return (slots["lora_up"][0], down[1], *kernel)


def _hadamard(slots: Slots) -> Shape:
    a, b = slots["hada_w1_a"], slots["hada_w1_b"]
    if "hada_t1" in slots:
        return (a[-1], b[-1], *slots["hada_t1"][2:])
    return (a[0], *b[1:])


def _kronecker(slots: Slots) -> Shape:
    first, second = _factor(slots, "lokr_w1", ""), _factor(slots, "lokr_w2", "lokr_t2")
    return (first[0] * second[0], first[1] * second[1], *second[2:])


def _factor(slots: Slots, name: str, core: str) -> Shape:
    if name in slots:
        return slots[name]
    a, b = slots[f"{name}_a"], slots[f"{name}_b"]
    return (a[1], b[1], *slots[core][2:]) if core in slots else (a[0], *b[1:])


def _glora(slots: Slots) -> Shape:
    a1, b1, b2 = slots["a1"], slots["b1"], slots["b2"]
    if a1[0] < a1[1]:  # the older layout has the factors of each pair swapped
        a1, b1, b2 = slots["a2"], b2, b1
    return (b1[0], a1[0], *slots.get("bm", b2)[2:])


def _rotated(slots: Slots) -> Shape:
    return (math.prod(slots["oft_blocks"][-3:-1]), 1)


def _rotated_input(slots: Slots) -> Shape:
    count, numbers = slots["oft_r"][:2]
    side = (1 + math.isqrt(1 + 8 * numbers)) // 2  # numbers = side * (side - 1) / 2
    return (1, count * side)


def _scaled(factors: Shape) -> Shape:
    """IA3's factors belong to the outputs or to the inputs: a square weight fits both."""
    return (math.prod(factors),) * 2


SHAPES: Mapping[str, Callable[[Slots], Shape]] = {
    "lora_down": _low_rank,
    "hada_w1_a": _hadamard,
    "lokr_w1": _kronecker,
    "lokr_w1_a": _kronecker,
    "b1": _glora,
    "oft_blocks": _rotated,
    "oft_r": _rotated_input,
    "diff": lambda slots: slots["diff"],
    "ia3_l": lambda slots: _scaled(slots["ia3_l"]),
    "on_input": lambda slots: _scaled(slots["weight"]),
    "weight": lambda slots: slots["weight"],
}
"""A slot that shows the algorithm -> the weight's shape by its tensors; the first that is there counts."""


def _parameters(slots: Slots) -> dict[str, Shape]:
    """The shapes of the module's parameters, as far as the adapter's tensors show them."""
    shapes: dict[str, Shape] = {}
    for slot, shape_by in SHAPES.items():
        if slot in slots:
            try:
                shapes["weight"] = shape_by(slots)
            except (KeyError, IndexError, ValueError):
                # A tensor or an axis is missing: the reader says which.
                shapes["weight"] = ()
            break
    for slot, name in (("diff_b", "bias"), ("bias", "bias"), ("lora_up_bias", "bias")):
        if slot in slots:
            shapes[name] = slots[slot]
    if "diff_m" in slots:
        shapes["modulation"] = slots["diff_m"]
    return shapes or {"weight": ()}
