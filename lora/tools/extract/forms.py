"""Which form a parameter's change takes in the file: told from its name and shape alone."""

from __future__ import annotations

import math

from lora.formats.names.keys import MODULATIONS, Shape
from lora.tools.extract.options import Conv, ExtractOptions

EMBEDDINGS = frozenset(
    {
        "token_embedding",
        "position_embedding",
        "embed_tokens",
        "embed_positions",
        "shared",
        "wte",
        "wpe",
    }
)
"""Modules whose weight is a table of rows, not a matrix that anything is multiplied by."""


def slot_of_difference(parameter: str) -> str | None:
    """Where a parameter's difference is stored; None if no adapter changes a parameter of that name."""
    if parameter in MODULATIONS:
        return "diff_m"
    return {"weight": "diff", "bias": "diff_b"}.get(parameter)


def takes_factors(name: str, shape: Shape, options: ExtractOptions) -> bool:
    """Whether a parameter's change is to be approximated: a linear layer's weight or a convolution's,
    and none so small that factors of the rank asked for would be larger than the change itself. Where the
    naming has no differences, the small ones too; never a table of rows, whose factors PEFT calls otherwise.
    """
    module, _, parameter = name.rpartition(".")
    if options.diff_only or parameter != "weight" or len(shape) < 2:
        return False
    if module.rpartition(".")[2] in EMBEDDINGS:
        return False
    if not options.holds_differences:
        return True
    if math.prod(shape) <= options.small:
        return False
    return numbers_of(shape, options.policy.known or 1, options) < math.prod(shape)


def slots_of_factors(shape: Shape, options: ExtractOptions) -> tuple[str, ...]:
    """The slots that `extract_layer` fills for a parameter that takes factors."""
    mid = ("lora_mid",) if is_tucker(shape, options) else ()
    return ("lora_up", "lora_down", *mid, "alpha")


def bytes_per_rank(shape: Shape, options: ExtractOptions) -> int:
    """What one more rank of a layer takes in the file; a Tucker core's share is that of a flat layer's."""
    return (shape[0] + math.prod(shape[1:])) * options.dtype.itemsize


def is_tucker(shape: Shape, options: ExtractOptions) -> bool:
    """Whether a layer gets a core between its factors."""
    return options.conv is Conv.TUCKER and len(shape) == 4 and math.prod(shape[2:]) > 1


def numbers_of(shape: Shape, rank: int, options: ExtractOptions) -> int:
    """How many numbers a layer's factors have."""
    if is_tucker(shape, options):
        rank = min(rank, *shape[:2])
        return rank * (shape[0] + shape[1] + rank * math.prod(shape[2:]))
    return rank * (shape[0] + math.prod(shape[1:]))
