"""Scales per block of SDXL's UNet, in the forms that users know from web UIs.

These are the 12 values of the LoRA block weight extension for SDXL, one for each block that has attention
and BASE for the rest; its 20 values, one for every block; or names. Text encoders belong to BASE.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

EVERY = (
    "BASE",
    *(f"IN{n:02}" for n in range(9)),
    "MID",
    *(f"OUT{n:02}" for n in range(9)),
)
WITH_ATTENTION = (
    "BASE",
    *(f"IN{n:02}" for n in (4, 5, 7, 8)),
    "MID",
    *(f"OUT{n:02}" for n in range(6)),
)
GROUPS: Mapping[str, tuple[str, ...]] = {
    "IN": tuple(name for name in EVERY if name.startswith("IN")),
    "OUT": tuple(name for name in EVERY if name.startswith("OUT")),
    "M00": ("MID",),
}
MAX_SCALE = 10


def parse_blocks(value: object) -> dict[str, float]:
    """Block -> factor; a block that is not named has the factor 1.

    `value`: a list of 12 or 20 numbers, the same as text with commas, or an object of names (`IN04`, `MID`,
    `OUT01`, `BASE`; `IN` and `OUT` for all blocks of a side, which single names override).
    Raises: ValueError with a sentence.
    """
    if isinstance(value, str):
        try:
            value = [float(number) for number in value.split(",")]
        except ValueError:
            raise ValueError("the text is not numbers with commas") from None
    if isinstance(value, Mapping):
        return _named(value)
    if isinstance(value, Sequence):
        names = {len(WITH_ATTENTION): WITH_ATTENTION, len(EVERY): EVERY}.get(len(value))
        if names is None:
            raise ValueError(f"{len(value)} values are neither 12 nor 20")
        return {name: _factor(factor) for name, factor in zip(names, value, strict=True)}
    raise ValueError("is neither a list, a text nor an object")


def _named(value: Mapping[object, object]) -> dict[str, float]:
    factors: dict[str, float] = {}
    for groups in (True, False):  # the single names last: they override
        for name, factor in value.items():
            if (str(name) in GROUPS) is groups:
                blocks = GROUPS.get(str(name), (str(name),))
                if not set(blocks) <= set(EVERY):
                    shown = repr(name) if re.fullmatch(r"\w{1,20}", str(name)) else "a name"
                    raise ValueError(f"{shown} is no block (BASE, IN00-IN08, MID, OUT00-OUT08)")
                factors.update(dict.fromkeys(blocks, _factor(factor)))
    return factors


def _factor(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError("a block's value is not a number")
    if not -MAX_SCALE <= value <= MAX_SCALE:
        raise ValueError(f"a block's value is not between {-MAX_SCALE} and {MAX_SCALE}")
    return float(value)
