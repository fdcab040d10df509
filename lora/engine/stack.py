"""What a request asks for: adapters, how strongly each, where, and when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lora.engine.modes import Mode
from lora.formats.adapter import LoraFile
from lora.formats.names.keys import Target

__all__ = ["LoraUse", "Mode", "Stack"]


@dataclass(frozen=True)
class LoraUse:
    """One adapter of a stack, and how strongly: 1 is as trained, 0 nothing, negative the reverse."""

    file: LoraFile
    scale: float = 1.0
    components: Mapping[str, float] = field(default_factory=dict)
    """Component -> a further factor; 1 for one that is not named."""
    blocks: Mapping[str, float] = field(default_factory=dict)
    """`Target.block` -> a further factor, for the component that draws; 1 for one that is not named.

    `BASE` is also the text encoders' block, as web UIs have it.
    """
    start: float = 0.0
    """When it begins, as a fraction of the denoising. Text encoders do not denoise: there it always is."""
    end: float = 1.0

    def scale_of(self, target: Target) -> float:
        """The factor of one layer."""
        factor = self.components.get(target.component, 1.0) * self.blocks.get(target.block, 1.0)
        return self.scale * factor

    @property
    def ranged(self) -> bool:
        """Whether it is there for a part of the denoising only."""
        return self.start > 0.0 or self.end < 1.0

    def holds(self, fraction: float) -> bool:
        """Whether it is there at a moment of the denoising."""
        return self.start <= fraction and (fraction < self.end or self.end >= 1.0)

    def without(self, component: str) -> LoraUse:
        """The same, and nothing for one component."""
        return LoraUse(self.file, self.scale, {**self.components, component: 0.0}, self.blocks)

    @property
    def strengths(self) -> tuple[object, ...]:
        """Everything but the file, as a key."""
        return (
            self.scale,
            tuple(sorted(self.components.items())),
            tuple(sorted(self.blocks.items())),
        )


Stack = Sequence[LoraUse]
