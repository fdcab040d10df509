"""The layers' ranks where a file's size is given: their singular values first, then the bytes are spent."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from lora.errors import ToolError
from lora.formats.names.keys import Shape
from lora.tools.extract.forms import bytes_per_rank
from lora.tools.extract.layer import Pair, spectrum_of
from lora.tools.extract.options import ExtractOptions
from lora.tools.extract.plan import Planned
from lora.tools.factors.ranks import RankPolicy, Spectrum, spend
from lora.tools.writing import ROOM, ROOM_PER_TENSOR

FIRST_LIMIT = 4
"""So many times the rank that every layer could have alike are looked for in a layer at first."""

LEAST_LIMIT = 48
"""Or this many, if that is more: a search costs little less for fewer."""

ALPHA_BYTES = 4

Limits = Mapping[str, int]
"""Name of a parameter -> how many of its singular values are looked for."""

Measure = Callable[[Sequence[Planned], Limits], dict[str, list[float]]]
"""Gives the singular values of those parameters that changed, by name."""


def ranks_within(
    layers: Sequence[Planned], budget: int, options: ExtractOptions, measure: Measure
) -> dict[str, int]:
    """Name -> rank for the layers that changed, so that their factors take at most `budget` bytes.

    Where the policy has no rule of its own, a layer that uses up all the values that were looked for is
    looked at again for twice as many, so that no bound of ours decides.
    """
    limits = _first_limits(layers, budget, options)
    shapes = {str(one.place): one.shape for one in layers}
    found = measure(layers, limits)
    while True:
        spectra = [
            Spectrum(
                torch.tensor(values, dtype=torch.float64), bytes_per_rank(shapes[name], options)
            )
            for name, values in found.items()
        ]
        ranks = dict(zip(found, spend(spectra, budget - ALPHA_BYTES * len(found)), strict=True))
        more = {name for name in found if _used_up(found[name], ranks[name], shapes[name], options)}
        if not more:
            return ranks
        limits |= {name: 2 * limits[name] for name in more}
        found |= measure([one for one in layers if str(one.place) in more], limits)


def values_of(pair: Pair, limit: int, options: ExtractOptions) -> list[float]:
    """The singular values that a layer may keep; `limit` counts where the policy has no rule of its own."""
    policy = replace(options.policy, max_bytes=None) if _has_rule(options) else RankPolicy(limit)
    return spectrum_of(pair, policy, options)[: most_ranks(pair.shape)]


def budget_for_factors(
    names: Sequence[str], metadata: Mapping[str, str], exact: int, options: ExtractOptions
) -> int:
    """What is left of the file's bytes for factors, behind the header and the exact tensors.

    Raises: ToolError if that is nothing.
    """
    header = ROOM + sum(len(json.dumps(name)) + ROOM_PER_TENSOR for name in names)
    header += len(json.dumps(metadata)) + 32
    whole = options.policy.max_bytes or 0
    if whole <= header + exact:
        raise ToolError(
            f"{whole} bytes do not hold the file's header ({header}) and its exact tensors ({exact})",
            "Allow more, or choose fewer components.",
        )
    return whole - header - exact


def _first_limits(
    layers: Sequence[Planned], budget: int, options: ExtractOptions
) -> dict[str, int]:
    together = sum(bytes_per_rank(one.shape, options) for one in layers)
    first = max(LEAST_LIMIT, FIRST_LIMIT * budget // max(1, together))
    return {str(one.place): min(first, most_ranks(one.shape)) for one in layers}


def most_ranks(shape: Shape) -> int:
    """The largest rank at which a layer's factors are smaller than its change."""
    columns = math.prod(shape[1:])
    return max(1, (shape[0] * columns - 1) // (shape[0] + columns))


def _has_rule(options: ExtractOptions) -> bool:
    """Whether the policy bounds each layer's rank whatever the budget is."""
    policy = options.policy
    return any(
        value is not None
        for value in (policy.rank, policy.energy, policy.threshold, policy.ratio, policy.max_rank)
    )


def _used_up(values: Sequence[float], rank: int, shape: Shape, options: ExtractOptions) -> bool:
    return not _has_rule(options) and rank == len(values) < most_ranks(shape)
