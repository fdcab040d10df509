"""LoRA (arXiv 2106.09685), LoCon for convolutions, and its Tucker form with `lora_mid`.

W' = W + alpha / rank * (up @ down + sparse), as kohya's `LoRAModule.forward` and LyCORIS' `LoConModule`
compute it; the sparse rest is what LyCORIS' `extract_locon --use_sparse_bias` writes. rs-LoRA (arXiv
2312.03732) is the same with another alpha: LyCORIS stores alpha * sqrt(rank), and for PEFT
`lora.formats.alphas` makes it so from the config.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lora.formats.algorithms.base import BORROWED, Algorithm, Flaw, LowRank, placed, scaling, tucker
from lora.formats.names.slots import Shape


@dataclass(frozen=True, eq=False)
class LoRA(Algorithm):
    """A product of two thin matrices, for linear layers and convolutions alike."""

    name: ClassVar[str] = "lora"

    lora_up: Tensor
    """[out, rank] or [out, rank, 1, 1]."""
    lora_down: Tensor
    """[rank, in], [rank, in, 1, 1] or [rank, in, kh, kw]."""
    lora_mid: Tensor | None = None
    """[rank, rank, kh, kw]; then lora_down is [rank, in, 1, 1]."""
    bias_indices: Tensor | None = None
    """[2, n]: rows and columns, in the weight as [out, in * kh * kw], of `bias_values`."""
    bias_values: Tensor | None = None
    """[n]."""
    bias_size: Tensor | None = None
    """[2]: out, in * kh * kw."""
    alpha: Tensor | None = None

    @property
    def rank(self) -> int:
        """Rows of lora_down."""
        return self.lora_down.shape[0]

    def misfit(self, shape: Shape) -> str | None:
        """See `Algorithm.misfit`; 1x1-shaped factors on a linear layer are accepted."""
        up, down = tuple(self.lora_up.shape), tuple(self.lora_down.shape)
        if len(up) < 2 or len(down) < 2 or math.prod(up[1:]) != down[0]:
            return Flaw(f"lora_up {list(up)} and lora_down {list(down)} do not fit together")
        if self.lora_mid is not None:
            rank, kernel = down[0], shape[2:]
            if len(shape) != 4 or tuple(self.lora_mid.shape) != (rank, rank, *kernel):
                return f"lora_mid {list(self.lora_mid.shape)} does not fit the layer {list(shape)}"
            down = (*down[:2], *kernel) if math.prod(down[2:]) == 1 else ()
        sides = (up[0], *down[1:2])
        if sides != shape[:2] or math.prod(down[2:]) != math.prod(shape[2:]):
            return f"factors {list(up)} and {list(self.lora_down.shape)} do not fit the layer {list(shape)}"
        return self._sparse_misfit(shape)

    def _sparse_misfit(self, shape: Shape) -> str | None:
        if self.bias_indices is None and self.bias_values is None and self.bias_size is None:
            return None
        if self.bias_indices is None or self.bias_values is None:
            return Flaw("of bias_indices and bias_values only one is there")
        rows, columns = shape[0], math.prod(shape[1:])
        count = self.bias_values.numel()
        if tuple(self.bias_indices.shape) != (2, count) or self.bias_values.dim() != 1:
            return Flaw("bias_indices are not two rows, one column for each of bias_values")
        # LyCORIS stores them as int16, which wraps around above 32,767.
        indices = self.bias_indices.long()
        outside = (indices[0] >= rows) | (indices[1] >= columns) | (indices < 0).any(0)
        return "bias_indices lie outside of the layer" if bool(outside.any()) else None

    @property
    def is_low_rank(self) -> bool:
        """True, unless there is a sparse rest."""
        return self.bias_values is None

    def low_rank(self) -> LowRank | None:
        """The factors as they are; a Tucker core is multiplied into the down factor."""
        if not self.is_low_rank:
            return None
        down = self.lora_down
        if self.lora_mid is not None:
            flat = down.flatten(1).float()
            down = torch.einsum("mnhw,ni->mihw", self.lora_mid.float(), flat)
        return LowRank(down, self.lora_up.flatten(1), scaling(self.alpha, self.rank))

    @property
    def needs_weight(self) -> bool:
        """False."""
        return False

    def delta(self, weight: Tensor) -> Tensor:
        """scaling * (up @ down + sparse)."""
        up = placed(self.lora_up, weight).flatten(1)
        down = placed(self.lora_down, weight)
        if self.lora_mid is None:
            total = up @ down.flatten(1)
        else:
            total = tucker(placed(self.lora_mid, weight), up.t(), down.flatten(1)).flatten(1)
        if self.bias_values is not None and self.bias_indices is not None:
            rows, columns = self.bias_indices.to(weight.device, torch.long)
            total.index_put_((rows, columns), placed(self.bias_values, weight), accumulate=True)
        return total.mul_(scaling(self.alpha, self.rank)).reshape(weight.shape)


@dataclass(frozen=True, eq=False)
class LoRABias(Algorithm):
    """The bias of PEFT's `lora_B` (`lora_bias=True`): bias' = bias + alpha / rank * lora_B.bias."""

    name: ClassVar[str] = "lora"
    parameter: ClassVar[str] = "bias"

    lora_up_bias: Tensor
    """[out]."""
    lora_down: Tensor = field(metadata=BORROWED)
    alpha: Tensor | None = field(default=None, metadata=BORROWED)

    def misfit(self, shape: Shape) -> str | None:
        """See `Algorithm.misfit`."""
        fits = tuple(self.lora_up_bias.shape) == shape
        return None if fits else f"{list(self.lora_up_bias.shape)} is not the bias {list(shape)}"

    @property
    def needs_weight(self) -> bool:
        """False."""
        return False

    def delta(self, weight: Tensor) -> Tensor:
        """scaling * lora_B.bias."""
        return placed(self.lora_up_bias, weight) * scaling(self.alpha, self.lora_down.shape[0])
