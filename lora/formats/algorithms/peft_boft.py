"""PEFT's BOFT: a layer's inputs rotated in blocks, and its outputs scaled (arXiv 2311.06243).

W' = s * (W M1^T M2^T ...) with S = (R - R^T) / 2 and Q = (I - S)(I + S)^-1 for each block, as PEFT's
`BOFTLayer.cayley_batch` and `Linear.get_delta_weight` compute it. Each stage M is P Q P^T, where P sorts the
half blocks within every 2^stage blocks: those of even numbers first. LyCORIS' BOFT is another method: see
`oft`.
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
    """Stages of rotations of inputs, and factors of outputs."""

    name: ClassVar[str] = "boft"

    boft_r: Tensor
    """[m, n, b, b], m stages, with n * b = in * kh * kw."""
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
        if ours[0] > 1 and (ours[2] % 2 or ours[1] % 2 ** (ours[0] - 1)):
            return Flaw(f"boft_R {list(ours)} is no butterfly")
        if len(shape) < 2 or ours[1] * ours[2] != math.prod(shape[1:]):
            return f"boft_R {list(ours)} does not make up the inputs of the layer {list(shape)}"
        if self.boft_s.numel() != shape[0]:
            return f"boft_s {list(self.boft_s.shape)} does not fit the layer {list(shape)}"
        return None

    def delta(self, weight: Tensor) -> Tensor:
        """s * (W M1^T M2^T ...) - W."""
        base = placed(weight, weight).flatten(1)
        blocks = placed(self.boft_r, weight)
        skew = 0.5 * (blocks - blocks.transpose(2, 3))
        identity = torch.eye(skew.shape[-1], device=skew.device)
        # (I - S)(I + S)^-1: the two commute, so one solve is enough.
        turns = torch.linalg.solve(identity + skew, identity - skew)
        turned = base
        for stage, turn in enumerate(turns):
            turned = _turned(turned, turn, stage)
        turned = turned * placed(self.boft_s, weight).reshape(-1, 1)
        return (turned - base).reshape(weight.shape)


def _turned(rows: Tensor, turn: Tensor, stage: int) -> Tensor:
    """[out, in] times (P Q P^T)^T: the half blocks are put out of the order of P, turned, and put back."""
    count, size, _ = turn.shape
    halves = (-1, count >> stage, 2, 1 << stage, size // 2)
    if stage:
        rows = rows.reshape(halves).transpose(2, 3)
    turned = torch.einsum("onb,ncb->onc", rows.reshape(-1, count, size), turn)
    if stage:
        back = (-1, count >> stage, 1 << stage, 2, size // 2)
        turned = turned.reshape(back).transpose(2, 3)
    return turned.reshape(-1, count * size)
