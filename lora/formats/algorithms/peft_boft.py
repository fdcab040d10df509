"""PEFT's BOFT: a layer's inputs rotated in blocks, and its outputs scaled (arXiv 2311.06243).

W' = s * (W Q^T) with S = (R - R^T) / 2 and Q = (I - S)(I + S)^-1 for each block, as PEFT's
`BOFTLayer.cayley_batch` and `Linear.get_delta_weight` compute it. PEFT has more than one stage only where its
CUDA extension was compiled; those are not read. LyCORIS' BOFT is another method: see `oft`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lora.formats.algorithms.base import Algorithm, Flaw, placed
from lora.formats.names.slots import Shape


@dataclass(frozen=True, eq=False)
class PeftBOFT(Algorithm):
    """One stage of rotations of inputs, and factors of outputs."""

    name: ClassVar[str] = "boft"

    boft_r: Tensor
    """[1, n, b, b] with n * b = in * kh * kw."""
    boft_s: Tensor
    """[out, 1], or [1, out] for a convolution."""

    @property
    def rank(self) -> int:
        """The size of a block."""
        return self.boft_r.shape[-1]

    def misfit(self, shape: Shape) -> str | None:
        """See `Algorithm.misfit`."""
        ours = tuple(self.boft_r.shape)
        if len(ours) != 4 or ours[2] != ours[3]:
            return Flaw(f"boft_R {list(ours)} holds no square blocks")
        if ours[0] != 1:
            return Flaw(f"boft_R {list(ours)} has several butterfly stages, which are not read")
        if len(shape) < 2 or ours[1] * ours[2] != math.prod(shape[1:]):
            return f"boft_R {list(ours)} does not make up the inputs of the layer {list(shape)}"
        if self.boft_s.numel() != shape[0]:
            return f"boft_s {list(self.boft_s.shape)} does not fit the layer {list(shape)}"
        return None

    def delta(self, weight: Tensor) -> Tensor:
        """s * (W Q^T) - W."""
        base = placed(weight, weight).flatten(1)
        blocks = placed(self.boft_r, weight)[0]
        skew = 0.5 * (blocks - blocks.transpose(1, 2))
        identity = torch.eye(skew.shape[-1], device=skew.device)
        # (I - S)(I + S)^-1: the two commute, so one solve is enough.
        turn = torch.linalg.solve(identity + skew, identity - skew)
        rows = base.reshape(base.shape[0], *turn.shape[:2])
        turned = torch.einsum("onb,ncb->onc", rows, turn).reshape(base.shape)
        turned = turned * placed(self.boft_s, weight).reshape(-1, 1)
        return (turned - base).reshape(weight.shape)
