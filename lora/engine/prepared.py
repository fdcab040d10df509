"""What a stack needs to be applied: plans, factors and merged weights, kept for the next time.

One `Prepared` serves every strength of the same adapters in one mode. Another strength costs no plan and no
factors, only the numbers themselves. Merged values are kept for the strengths that come back: those of a
slider on its way are not.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

from lora.engine.dynamic import AdaptedForward, DeviceFactors, ScaledFactors, make_factors, scaled
from lora.engine.plan import Plan, PlannedLayer
from lora.engine.stack import Stack
from lora.formats.algorithms import LowRank

VARIANTS = 4
"""How many plans, and how many strengths, of the same adapters are kept."""

PASSING = 16
"""How many strengths back one counts as coming again."""


class Ready(NamedTuple):
    """A module, the replacement for its `forward`, and what this is to add."""

    module: nn.Module
    forward: AdaptedForward
    added: ScaledFactors


@dataclass(frozen=True)
class Merged:
    """A weight's merged values, and what they were made from."""

    values: Tensor
    generation: int
    """Of the originals."""
    content: Hashable
    """The layers with their scales."""

    @property
    def size(self) -> int:
        """The bytes of the values."""
        return self.values.numel() * self.values.element_size()


MergedWeights = dict[nn.Parameter, Merged]


class Placed(NamedTuple):
    """A plan, and its dynamic modules with their factors."""

    plan: Plan
    modules: list[tuple[nn.Module, AdaptedForward, DeviceFactors, tuple[PlannedLayer, ...]]]


def scales_of(stack: Stack) -> Hashable:
    """A stack's strengths, without its adapters."""
    return tuple(use.all_scales for use in stack)


@dataclass
class Prepared:
    """Plans, factors and merged weights of the stacks that have the same adapters in the same order."""

    file_bytes: int
    """The bytes of the parsed files, which the plans keep in memory."""
    _placed: OrderedDict[Hashable, Placed] = field(default_factory=OrderedDict)
    """By which scales are 0."""
    _factors: dict[tuple[nn.Module, tuple[int, ...]], DeviceFactors] = field(default_factory=dict)
    """By module and the indices of the uses that change it: a use with scale 0 does not."""
    _factor_bytes: int = 0
    _ready: OrderedDict[Hashable, list[Ready]] = field(default_factory=OrderedDict)
    _merged: OrderedDict[Hashable, MergedWeights] = field(default_factory=OrderedDict)
    _passed: deque[Hashable] = field(default_factory=lambda: deque(maxlen=PASSING))

    @property
    def size(self) -> int:
        """The bytes of everything."""
        weights = (one for weights in self._merged.values() for one in weights.values())
        return self.file_bytes + self._factor_bytes + sum(one.size for one in weights)

    def place(
        self,
        stack: Stack,
        make: Callable[[], Plan],
        forward_of: Callable[[nn.Module], AdaptedForward],
    ) -> Placed:
        """The plan for this stack with its factors: the kept one while it holds, else a new one by `make`.

        Raises: LoraIncompatible if a factor overflows; what `make` raises.
        """
        key = tuple(use.zeros for use in stack)
        kept = self._placed.get(key)
        if kept is not None and not kept.plan.is_stale():
            self._placed.move_to_end(key)
            return kept
        plan = make()
        wanted = {(d.module, tuple(p.use for p in d.layers)): d for d in plan.dynamic}
        missing = {key: d for key, d in wanted.items() if key not in self._factors}
        made = make_factors(
            [(d.module, str(d.target), [_low_rank(p) for p in d.layers]) for d in missing.values()]
        )
        self._factors.update(zip(missing, made, strict=True))
        self._factor_bytes = sum(factors.size for factors in self._factors.values())
        modules = [
            (module, forward_of(module), self._factors[module, uses], d.layers)
            for (module, uses), d in wanted.items()
        ]
        if (
            kept is not None
        ):  # parameters were replaced: nothing that was made for the old ones holds
            self._merged.clear()
        self._ready.clear()
        placed = self._placed[key] = Placed(plan, modules)
        _trim(self._placed)
        return placed

    def ready(self, placed: Placed, stack: Stack) -> list[Ready]:
        """The modules of `placed` with what is added to each at the stack's strengths.

        Raises: LoraIncompatible if a scale overflows.
        """
        key = scales_of(stack)
        kept = self._ready.get(key)
        if kept is None:
            scales = [
                (factors, [planned.scale_in(stack) for planned in layers])
                for _, _, factors, layers in placed.modules
            ]
            kept = [
                Ready(module, forward, added)
                for (module, forward, _, _), added in zip(
                    placed.modules, scaled(scales), strict=True
                )
            ]
            self._ready[key] = kept
            _trim(self._ready)
        self._ready.move_to_end(key)
        return kept

    def merged(self, stack: Stack) -> MergedWeights:
        """The merged weights at the stack's strengths, as far as they are kept."""
        return self._merged.get(scales_of(stack), {})

    def returns(self, stack: Stack) -> bool:
        """Whether its merged weights are worth keeping: strengths that are kept or came lately, or the first.

        Notes that they came.
        """
        key = scales_of(stack)
        if key in self._merged or key in self._passed or not self._merged:
            return True
        self._passed.append(key)
        return False

    def keep(self, stack: Stack, weights: MergedWeights, budget: int) -> None:
        """Keeps merged weights; other strengths of the same adapters make room for them.

        `budget`: the most bytes of everything; where even these alone do not fit, nothing is kept.
        """
        key = scales_of(stack)
        self._merged.pop(key, None)
        needed = sum(one.size for one in weights.values())
        while self._merged and (len(self._merged) >= VARIANTS or self.size + needed > budget):
            self._merged.popitem(last=False)
        if self.size + needed <= budget:
            self._merged[key] = weights

    def drop(self) -> None:
        """Forgets all merged weights."""
        self._merged.clear()


def _trim(entries: OrderedDict[Hashable, Placed] | OrderedDict[Hashable, list[Ready]]) -> None:
    while len(entries) > VARIANTS:
        entries.popitem(last=False)


def bytes_of(weights: Iterable[nn.Parameter]) -> int:
    """The bytes of weights."""
    return sum(weight.numel() * weight.element_size() for weight in weights)


def _low_rank(planned: PlannedLayer) -> LowRank:
    algorithm = planned.layer.algorithm
    factors = algorithm.low_rank()
    if factors is None:
        raise TypeError(f"{algorithm.name} has no factors")
    return factors
