"""The shape of the layer that an adapter's tensors are for, by their own shapes. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from lora.formats.names.slots import Shape

Slots = Mapping[str, Shape]
"""Slot -> the shape of its tensor."""


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
    factors = ("dora_log_multiplier", "dora_multiplier", "dora_scale")
    outputs = next((math.prod(slots[name]) for name in factors if name in slots), 1)
    return (outputs, count * side)


def _of_butterfly(slots: Slots) -> Shape:
    return (math.prod(slots["boft_s"]), math.prod(slots["boft_r"][1:3]))


def _of_block(block: Shape) -> Shape:
    return (block[0] * block[1], block[1]) if len(block) == 3 else block[::-1]


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
    "boft_r": _of_butterfly,
    "hra_u": lambda slots: (1, slots["hra_u"][0]),
    "randlora_lambda": lambda slots: (slots["randlora_gamma"][1],) * 2,
    "miss_block": lambda slots: _of_block(slots["miss_block"]),
    "ada_a": lambda slots: (slots["ada_b"][0], slots["ada_a"][1]),
    "diff": lambda slots: slots["diff"],
    "ia3_l": lambda slots: _scaled(slots["ia3_l"]),
    "on_input": lambda slots: _scaled(slots["weight"]),
    "weight": lambda slots: slots["weight"],
}
"""A slot that shows the algorithm -> the weight's shape by its tensors; the first that is there counts."""


def parameters_by(slots: Slots) -> dict[str, Shape]:
    """The shapes of a module's parameters, as far as its tensors in an adapter show them."""
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


_OUTPUTS_ALONE = frozenset({"oft_blocks", "on_input", "ia3_l", "miss_block"})
"""The slots that say nothing of the inputs."""


def inputs_by(slots: Slots) -> int | None:
    """How many inputs a layer has by its tensors in an adapter; None if they do not show it."""
    shared = slots.get("oft_r", ())[:1] == (1,)  # one block for all inputs
    if shared or _OUTPUTS_ALONE & slots.keys():
        return None
    shape = slots.get("lora_down") or parameters_by(slots).get("weight", ())
    return shape[1] if len(shape) >= 2 else None
