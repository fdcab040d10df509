"""Decides what an extraction does with each tensor of two models: by names and shapes, before any is read;
and the ranks, by the singular values, if the size of the file is given.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from lora.errors import ToolError
from lora.formats.names.keys import Target
from lora.formats.names.naming import Namer, Naming, trouble
from lora.formats.names.slots import Shape
from lora.tools.extract.layer import Pair, spectrum_of
from lora.tools.extract.options import (
    ExtractOptions,
    bytes_per_rank,
    slot_of_difference,
    slots_of_factors,
    takes_factors,
)
from lora.tools.extract.report import LeftOut
from lora.tools.factors.ranks import RankPolicy, Spectrum, spend
from lora.tools.models.checkpoints import Checkpoint, Place
from lora.tools.writing import ROOM, ROOM_PER_TENSOR

LEAST_IN_COMMON = 0.5
"""Two models with a smaller share of tensors in common are not of the same kind."""

FIRST_LIMIT = 4
"""The first try per layer: this many times the rank that the budget gives if all layers have the same."""

LEAST_LIMIT = 48
"""At least this many singular values are computed; fewer would hardly take less time."""

ALPHA_BYTES = 4
"""In the file, for the alpha of each layer."""

Limits = Mapping[str, int]
"""Name of a parameter -> how many of its singular values are computed."""


@dataclass(frozen=True)
class Planned:
    """One parameter that both models have in one shape."""

    place: Place
    shape: Shape
    slots: Mapping[str, str]
    """Slot -> key of all tensors that may be written for it."""
    reason: str | None = None
    """Why it cannot be stored if it has changed."""
    low_rank: bool = False
    """Whether it becomes factors."""

    @property
    def name(self) -> str:
        """Component, module and parameter, joined by dots."""
        return str(self.place)


Measure = Callable[[Sequence[Planned], Limits], dict[str, list[float]]]
"""Computes the singular values of the parameters that changed, by name."""


@dataclass(frozen=True)
class ExtractPlan:
    """What is done with all tensors."""

    options: ExtractOptions
    """With a naming."""
    exact: tuple[Planned, ...]
    thin: tuple[Planned, ...]
    """Those that become factors."""
    left_out: tuple[LeftOut, ...]
    """Tensors that are not compared, each with its reason."""

    @property
    def names(self) -> list[str]:
        """Every key that may be written."""
        return [key for parameter in (*self.exact, *self.thin) for key in parameter.slots.values()]


def plan_extraction(source: Checkpoint, target: Checkpoint, options: ExtractOptions) -> ExtractPlan:
    """Raises: ToolError if the two are not two states of one model."""
    options = replace(options, naming=options.naming or _usual_naming(source))
    left_out = list(_apart(source, target, options))
    common = [
        place
        for place, stored in source.parameters.items()
        if place in target.parameters
        and target.parameters[place].shape == stored.shape
        and _chosen(place, options)
    ]
    _refuse_mismatch(source, target, common, options)
    names = _Names(source, options)
    planned = [names.planned(place, source.parameters[place].shape) for place in common]
    return ExtractPlan(
        options,
        tuple(parameter for parameter in planned if not parameter.low_rank),
        tuple(parameter for parameter in planned if parameter.low_rank),
        tuple(left_out),
    )


def _usual_naming(source: Checkpoint) -> Naming:
    own = any(place.component.startswith("transformer") for place in source.parameters)
    return Naming.ORIGINAL if own else Naming.KOHYA


def _chosen(place: Place, options: ExtractOptions) -> bool:
    return options.components is None or place.component in options.components


def _apart(source: Checkpoint, target: Checkpoint, options: ExtractOptions) -> Iterator[LeftOut]:
    """Every tensor that the two models do not have in common, with the reason."""
    for place, stored in source.parameters.items():
        other = target.parameters.get(place)
        if not _chosen(place, options):
            yield LeftOut(str(place), f"{place.component} was not chosen")
        elif other is None:
            yield LeftOut(str(place), "only the source model has it")
        elif other.shape != stored.shape:
            shapes = f"{list(stored.shape)} in the source, {list(other.shape)} in the target"
            yield LeftOut(str(place), f"its shape is {shapes}")
    for place in target.parameters:
        if place not in source.parameters:
            why = "" if _chosen(place, options) else f"{place.component} was not chosen"
            yield LeftOut(str(place), why or "only the target model has it")
    for name in dict.fromkeys(raw.name for raw in (*source.others, *target.others)):
        yield LeftOut(name, "it is no parameter of the model")


def _refuse_mismatch(
    source: Checkpoint, target: Checkpoint, common: list[Place], options: ExtractOptions
) -> None:
    there = {place.component for model in (source, target) for place in model.parameters}
    if unknown := sorted((options.components or frozenset()) - there):
        hint = f"There are {', '.join(sorted(there))}."
        raise ToolError(f"neither model has a component {unknown[0][:40]!r}", hint)
    smaller = min(
        sum(_chosen(place, options) for place in model.parameters) for model in (source, target)
    )
    if not common:
        hint = "Give two states of one model, and components that both have."
        raise ToolError(f"{source.path} and {target.path} have no tensor in common", hint)
    if len(common) < LEAST_IN_COMMON * smaller:
        raise ToolError(
            f"{source.path} and {target.path} are two different models: only {len(common)} of "
            f"{smaller} tensors have one name and one shape in both"
        )


class _Names:
    """The keys of each parameter's tensors in the file.

    A naming with a config needs the whole adapter and is written at the end; until then the file is in
    `original`.
    """

    def __init__(self, source: Checkpoint, options: ExtractOptions) -> None:
        key_map = source.key_map()
        self._options, self._naming = options, options.naming or Naming.KOHYA
        self._targets = {(target.component, target.path): target for target in key_map.targets}
        self._wanted = Namer(self._naming, key_map)
        streamed = Naming.ORIGINAL if self._naming.has_config else self._naming
        self._namer = Namer(streamed, key_map)

    def planned(self, place: Place, shape: Shape) -> Planned:
        """What is done with a parameter."""
        target = self._targets.get((place.component, place.path))
        if target is None:
            return Planned(place, shape, {}, f"no adapter changes a {place.component}")
        slots = self._slots(place, shape)
        why = self._wanted.trouble(target) or trouble(self._naming, slots)
        if not slots:
            why = f"no adapter changes a parameter called {place.parameter}"
        if why:
            return Planned(place, shape, {}, why)
        factors = "lora_up" in slots
        return Planned(place, shape, self._keys(target, slots, place), low_rank=factors)

    def _slots(self, place: Place, shape: Shape) -> tuple[str, ...]:
        if takes_factors(str(place), shape, self._options):
            return slots_of_factors(shape, self._options)
        whole = slot_of_difference(place.parameter)
        return (whole,) if whole else ()

    def _keys(self, target: Target, slots: tuple[str, ...], place: Place) -> dict[str, str]:
        """Slot -> key; with that of the difference if the factors may turn out larger than it."""
        whole = slot_of_difference(place.parameter)
        budget = self._options.policy.max_bytes is not None
        if whole and not budget and not trouble(self._naming, [whole]):
            slots = tuple(dict.fromkeys((*slots, whole)))
        keys = {slot: self._namer.key(target, slot) for slot in slots}
        return {slot: key for slot, key in keys.items() if key is not None}


def ranks_within(
    layers: Sequence[Planned], budget: int, options: ExtractOptions, measure: Measure
) -> dict[str, int]:
    """Name -> rank for the layers that changed, so that their factors take at most `budget` bytes.

    If the policy has no rule of its own, a layer that needs all the singular values that were computed is
    measured again for twice as many, so that the limit does not decide.
    """
    per_rank = {parameter.name: bytes_per_rank(parameter.shape, options) for parameter in layers}
    most = {parameter.name: most_ranks(parameter.shape) for parameter in layers}
    first = max(LEAST_LIMIT, FIRST_LIMIT * budget // max(1, sum(per_rank.values())))
    limits = {name: min(first, rank) for name, rank in most.items()}
    values = measure(layers, limits)
    while True:
        spectra = [
            Spectrum(torch.tensor(values[name], dtype=torch.float64), per_rank[name])
            for name in values
        ]
        ranks = dict(zip(values, spend(spectra, budget - ALPHA_BYTES * len(values)), strict=True))
        used_up = {name for name in values if ranks[name] == len(values[name]) < most[name]}
        if not used_up or options.policy.has_rule:
            return ranks
        limits |= {name: 2 * limits[name] for name in used_up}
        values |= measure([parameter for parameter in layers if parameter.name in used_up], limits)


def values_of(pair: Pair, limit: int, options: ExtractOptions) -> list[float]:
    """The singular values that a layer may keep: at most `limit` if the policy has no rule of its own."""
    policy = options.policy
    policy = replace(policy, max_bytes=None) if policy.has_rule else RankPolicy(limit)
    return spectrum_of(pair, policy, options)[: most_ranks(pair.shape)]


def budget_for_factors(
    names: Sequence[str], metadata: Mapping[str, str], exact: int, options: ExtractOptions
) -> int:
    """The bytes of the file that are left for factors, besides the header and the exact tensors.

    Raises: ToolError if none are left.
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


def most_ranks(shape: Shape) -> int:
    """The largest rank at which the factors of a layer are smaller than its change."""
    columns = math.prod(shape[1:])
    return max(1, (shape[0] * columns - 1) // (shape[0] + columns))
