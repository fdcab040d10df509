"""AdaLoRA: a singular value decomposition whose ranks were given out in training (arXiv 2303.10512; PEFT's).

W' = W + alpha / (init_r + 1e-5) * B (E * A), as PEFT's `SVDLinear.get_delta_weight` computes it. `init_r` is
the rank before any was taken away, which only the config knows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lora.formats.algorithms.base import Algorithm, Flaw, LowRank, placed
from lora.formats.names.slots import Shape


@dataclass(frozen=True, eq=False)
class AdaLoRA(Algorithm):
    """Singular vectors and values."""

    name: ClassVar[str] = "adalora"

    ada_a: Tensor
    """[rank, in]."""
    ada_b: Tensor
    """[out, rank]."""
    ada_e: Tensor
    """[rank, 1]."""
    ada_scaling: Tensor | None = None
    """One number, by PEFT's config."""

    @property
    def rank(self) -> int:
        """Rows of `lora_A`."""
        return self.ada_a.shape[0]

    def misfit(self, shape: Shape) -> str | None:
        """See `Algorithm.misfit`."""
        a, b = tuple(self.ada_a.shape), tuple(self.ada_b.shape)
        if (len(a), len(b)) != (2, 2) or b[1] != a[0] or self.ada_e.numel() != a[0]:
            return Flaw(f"lora_A {list(a)}, lora_B {list(b)} and lora_E do not fit together")
        if (b[0], a[1]) != shape:
            return f"factors {list(b)} and {list(a)} do not fit the layer {list(shape)}"
        return None

    @property
    def is_low_rank(self) -> bool:
        """True."""
        return True

    def low_rank(self) -> LowRank:
        """The singular values are multiplied into the down factor."""
        down = self.ada_a.float() * self.ada_e.float().reshape(-1, 1)
        scaling = 1.0 if self.ada_scaling is None else float(self.ada_scaling)
        return LowRank(down, self.ada_b, scaling)

    @property
    def needs_weight(self) -> bool:
        """False."""
        return False

    def delta(self, weight: Tensor) -> Tensor:
        """scaling * B (E * A)."""
        factors = self.low_rank()
        return (placed(factors.up, weight) @ placed(factors.down, weight)).mul_(factors.scaling)
