"""LoRA (arXiv 2106.09685), LoCon for convolutions, and its Tucker form with `lora_mid`.

W' = W + alpha / rank * up @ down, as kohya's `LoRAModule.forward` and LyCORIS' `LoConModule` compute it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lora.algorithms.base import Algorithm, LowRank, scaling
from lora.keys import Shape


@dataclass(frozen=True)
class LoRA(Algorithm):
    """A product of two thin matrices, for linear layers and convolutions alike."""

    name: ClassVar[str] = "lora"

    lora_up: Tensor
    """[out, rank] or [out, rank, 1, 1]."""
    lora_down: Tensor
    """[rank, in], [rank, in, 1, 1] or [rank, in, kh, kw]."""
    lora_mid: Tensor | None = None
    """[rank, rank, kh, kw]; then lora_down is [rank, in, 1, 1]."""
    alpha: Tensor | None = None

    @property
    def rank(self) -> int:
        """Rows of lora_down."""
        return self.lora_down.shape[0]

    def misfit(self, shape: Shape) -> str | None:
        """See `Algorithm.misfit`; 1x1-shaped factors on a linear layer are accepted."""
        up, down = tuple(self.lora_up.shape), tuple(self.lora_down.shape)
        if len(up) < 2 or len(down) < 2 or math.prod(up[1:]) != down[0]:
            return f"lora_up {list(up)} and lora_down {list(down)} do not fit together"
        if self.lora_mid is not None:
            if tuple(self.lora_mid.shape) != (down[0], down[0], *shape[2:]) or len(shape) != 4:
                return f"lora_mid {list(self.lora_mid.shape)} does not fit the layer {list(shape)}"
            down = (*down[:2], *shape[2:])
        if up[0] != shape[0] or math.prod(down[1:]) != math.prod(shape[1:]) or down[1] != shape[1]:
            return f"factors {list(up)} and {list(down)} do not fit the layer {list(shape)}"
        return None

    def low_rank(self) -> LowRank:
        """The factors as they stand; a Tucker core goes into the down factor."""
        down = self.lora_down
        if self.lora_mid is not None:
            flat = down.flatten(1).float()
            down = torch.einsum("mnhw,ni->mihw", self.lora_mid.float(), flat)
        return LowRank(down, self.lora_up.flatten(1), scaling(self.alpha, self.rank))

    def delta(self, weight: Tensor) -> Tensor:
        """scaling * up @ down."""
        parts = self.low_rank()
        up = parts.up.to(weight.device, torch.float32)
        down = parts.down.to(weight.device, torch.float32).flatten(1)
        return (up @ down).mul_(parts.scaling).reshape(weight.shape)
