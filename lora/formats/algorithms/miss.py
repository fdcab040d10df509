"""MiSS: one small block, repeated along a weight's inputs (arXiv 2409.15371; PEFT's `miss`).

W'[o, i] = W[o, i] + B[i mod r, o mod n], as PEFT's `MissLinear.get_delta_weight_miss` adds it: n is how many
outputs there are, or `mini_r` where PEFT's `init_weights` is "mini". Where it is "bat", each row of tiles of
r x r has its own B: T' = T + T B + B (`MissLinear.get_delta_weight`); the tensor's three axes show it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lora.formats.algorithms.base import Algorithm, placed
from lora.formats.names.slots import Shape


@dataclass(frozen=True, eq=False)
class MiSS(Algorithm):
    """PEFT's shared blocks, for linear layers."""

    name: ClassVar[str] = "miss"

    miss_block: Tensor
    """[r, out], [r, n] or, for "bat", [out / r, r, r]."""

    @property
    def rank(self) -> int | None:
        """The rows of a block."""
        return self.miss_block.shape[-2] if self.miss_block.dim() >= 2 else None

    def misfit(self, shape: Shape) -> str | None:
        """See `Algorithm.misfit`."""
        ours = tuple(self.miss_block.shape)
        fits = len(shape) == 2 and len(ours) in (2, 3)
        if fits and len(ours) == 2:
            fits = shape[0] % ours[1] == 0 and ours[0] <= shape[1]
        elif fits:
            fits = ours[1] == ours[2] and ours[0] * ours[1] == shape[0] and shape[1] % ours[1] == 0
        return None if fits else f"miss_block {list(ours)} does not fit the layer {list(shape)}"

    @property
    def needs_weight(self) -> bool:
        """Whether it is "bat"."""
        return self.miss_block.dim() == 3

    def delta(self, weight: Tensor) -> Tensor:
        """The repeated block, or T B + B for each tile."""
        block = placed(self.miss_block, weight)
        outputs, inputs = weight.shape
        if block.dim() == 2:
            rows = torch.arange(inputs, device=block.device) % block.shape[0]
            columns = torch.arange(outputs, device=block.device) % block.shape[1]
            return block.t()[columns[:, None], rows]
        size = block.shape[-1]
        tiles = placed(weight, weight).reshape(outputs // size, size, inputs // size, size)
        change = torch.einsum("aick,akj->aicj", tiles, block) + block[:, :, None]
        return change.reshape(weight.shape)
