"""What a caller asks for: which adapters, how strongly, in which parts of the model, and when.

A `LoraUse` holds all of this. Its adapter is a reference in a request, a path on a command line, and a parsed
file in the engine. Imports without torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from lora.engine.modes import Mode

if TYPE_CHECKING:
    from lora.formats.adapter import LoraFile
    from lora.formats.names.keys import Target

__all__ = ["LoraUse", "Mode", "Stack"]

Lora = TypeVar("Lora")
Other = TypeVar("Other")


@dataclass(frozen=True)
class LoraUse(Generic[Lora]):
    """One adapter of a stack and its scale: 1 is as trained, 0 has no effect, negative is the reverse."""

    lora: Lora
    """The adapter: a `LoraFile` for the engine, a `Reference` in a request, a path for the tools."""
    scale: float = 1.0
    components: Mapping[str, float] = field(default_factory=dict)
    """Component -> a further factor; 1 for one that is not named."""
    blocks: Mapping[str, float] = field(default_factory=dict)
    """`Target.block` -> a further factor, for the component that draws; 1 for one that is not named.

    `BASE` is also the text encoders' block, as web UIs have it.
    """
    start: float = 0.0
    """When it begins, as a fraction of the denoising. In text encoders it always applies."""
    end: float = 1.0
    """When it ends, as a fraction of the denoising."""

    def of(self, lora: Other) -> LoraUse[Other]:
        """The same scales and range for another form of the adapter, such as the file behind a reference."""
        use: Any = replace(self, lora=lora)  # type: ignore[arg-type]
        return use

    def scale_of(self, target: Target) -> float:
        """The scale of one layer: scale x its component's factor x its block's factor."""
        factor = self.components.get(target.component, 1.0) * self.blocks.get(target.block, 1.0)
        return self.scale * factor

    @property
    def factors(self) -> tuple[float, ...]:
        """Every number that multiplies the adapter's change."""
        return (self.scale, *self.components.values(), *self.blocks.values())

    @property
    def ranged(self) -> bool:
        """Whether it applies during a part of the denoising only."""
        return self.start > 0.0 or self.end < 1.0

    def holds(self, fraction: float) -> bool:
        """Whether it applies at this fraction of the denoising."""
        return self.start <= fraction and (fraction < self.end or self.end >= 1.0)

    def without(self, component: str) -> LoraUse[Lora]:
        """The same, with a factor of 0 for one component."""
        return replace(self, components={**self.components, component: 0.0})

    @property
    def all_scales(self) -> tuple[object, ...]:
        """Scale and factors as a dictionary key, without the adapter and without start and end."""
        return (
            self.scale,
            tuple(sorted(self.components.items())),
            tuple(sorted(self.blocks.items())),
        )

    @property
    def zeros(self) -> tuple[object, ...]:
        """Which of its numbers are 0, as a dictionary key: what decides which modules it changes."""
        factors = *self.components.items(), *self.blocks.items()
        return not self.scale, frozenset(name for name, factor in factors if not factor)


Stack = Sequence[LoraUse["LoraFile"]]
"""The adapters that are applied together. Their order does not matter: every change is taken from the
original weight, and the changes add up."""
