"""What an extraction does with each tensor of two models: decided by names and shapes, before any is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from lora.errors import ToolError
from lora.formats.names.keys import Shape, Target
from lora.formats.names.naming import Namer, Naming, trouble
from lora.tools.extract.forms import slot_of_difference, slots_of_factors, takes_factors
from lora.tools.extract.options import ExtractOptions
from lora.tools.extract.report import LeftOut
from lora.tools.models.checkpoints import Checkpoint, Place

LEAST_IN_COMMON = 0.5
"""Two models of which fewer tensors fit each other are not of one kind."""


@dataclass(frozen=True)
class Planned:
    """One parameter that both models have in one shape."""

    place: Place
    shape: Shape
    slots: Mapping[str, str]
    """Slot -> key, of all that may be written for it."""
    reason: str | None = None
    """Why it cannot be stored, should it have changed."""
    low_rank: bool = False
    """Whether it is to become factors."""


@dataclass(frozen=True)
class Plan:
    """The whole of it."""

    options: ExtractOptions
    """With the naming chosen."""
    exact: tuple[Planned, ...]
    thin: tuple[Planned, ...]
    """Those that are to become factors."""
    left_out: tuple[LeftOut, ...]
    """What is in one model alone, or in another shape."""

    @property
    def names(self) -> list[str]:
        """Every key that may be written."""
        return [key for one in (*self.exact, *self.thin) for key in one.slots.values()]


def plan_extraction(source: Checkpoint, target: Checkpoint, options: ExtractOptions) -> Plan:
    """Raises: ToolError if the two are no two states of one model."""
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
    return Plan(
        options,
        tuple(one for one in planned if not one.low_rank),
        tuple(one for one in planned if one.low_rank),
        tuple(left_out),
    )


def _usual_naming(source: Checkpoint) -> Naming:
    own = any(place.component.startswith("transformer") for place in source.parameters)
    return Naming.ORIGINAL if own else Naming.KOHYA


def _chosen(place: Place, options: ExtractOptions) -> bool:
    return options.components is None or place.component in options.components


def _apart(source: Checkpoint, target: Checkpoint, options: ExtractOptions) -> Iterator[LeftOut]:
    """Every tensor of both that is not in common, with its reason."""
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
            yield LeftOut(str(place), "only the target model has it")
    for name in dict.fromkeys(raw.name for raw in (*source.others, *target.others)):
        yield LeftOut(name, "it is no parameter of the model")


def _refuse_mismatch(
    source: Checkpoint, target: Checkpoint, common: list[Place], options: ExtractOptions
) -> None:
    there = {place.component for model in (source, target) for place in model.parameters}
    if unknown := sorted((options.components or frozenset()) - there):
        raise ToolError(
            f"neither model has a component {unknown[0][:40]!r}",
            f"There are {', '.join(sorted(there))}.",
        )
    smaller = min(
        sum(_chosen(place, options) for place in model.parameters) for model in (source, target)
    )
    if not common:
        raise ToolError(
            f"{source.path.name} and {target.path.name} have no tensor in common",
            "Give two states of one model, and components that both have.",
        )
    if len(common) < LEAST_IN_COMMON * smaller:
        raise ToolError(
            f"{source.path.name} and {target.path.name} are two different models: only {len(common)} of "
            f"{smaller} tensors have one name and one shape in both"
        )


class _Names:
    """What the file will call each parameter's tensors.

    Namings with a config are written from the whole adapter in the end; until then it has the original's.
    """

    def __init__(self, source: Checkpoint, options: ExtractOptions) -> None:
        key_map = source.key_map()
        self._options, self._naming = options, options.naming or Naming.KOHYA
        self._targets = {(target.component, target.path): target for target in key_map.targets}
        self._wanted = Namer(self._naming, key_map)
        streamed = Naming.ORIGINAL if self._naming.has_config else self._naming
        self._namer = Namer(streamed, key_map)

    def planned(self, place: Place, shape: Shape) -> Planned:
        """What becomes of a parameter."""
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
        """With the difference's key where factors may come out larger than that."""
        whole = slot_of_difference(place.parameter)
        budget = self._options.policy.max_bytes is not None
        if whole and not budget and not trouble(self._naming, [whole]):
            slots = tuple(dict.fromkeys((*slots, whole)))
        keys = {slot: self._namer.key(target, slot) for slot in slots}
        return {slot: key for slot, key in keys.items() if key is not None}
