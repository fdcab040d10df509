"""OFT and BOFT: the outputs of a layer rotated in blocks (arXiv 2306.07280, 2311.06243; PEFT's on inputs).

kohya and LyCORIS: with Q = B - B^T, shrunk so that norm(Q) <= alpha * out, and R = (I + Q)(I - Q)^-1, each
block of output rows is multiplied by R^T, then every row by `rescale` (LyCORIS' `DiagOFTModule`,
sd-scripts' `OFTModule`). BOFT has m such stages, between which the rows are shuffled as in a butterfly, and
which multiply by R in place of R^T (LyCORIS' `ButterflyOFTModule`).

ComfyUI's training node has LyCORIS' form, with norm(Q) <= alpha (`comfy/weight_adapter/oft.py`).

PEFT rotates the inputs, W' = W R^T, and stores the upper triangle of Q. Its R is the Cayley transform's
Neumann series of a few terms, as `OFTRotationModule._cayley_batch` computes it, unless its config says
otherwise. OneTrainer's `OFTModule` does the same for linear layers, and multiplies a convolution by R in
place of R^T; its scaled form divides the stored numbers by 2 sqrt(b - 1), b the size of a block.
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
class OFT(Algorithm):
    """Rotations of blocks of output rows: one stage for OFT, several for BOFT."""

    oft_blocks: Tensor
    """[n, b, b] with n * b = out (OFT), or [m, n, b, b], m stages (BOFT)."""
    rescale: Tensor | None = None
    """[out, 1, ...]."""
    alpha: Tensor | None = None
    """The constraint on norm(Q), per output; 0 for none."""
    constraint: Tensor | None = None
    """The same for all outputs together, as ComfyUI has it."""

    @property
    def name(self) -> str:  # type: ignore[override]
        """`boft` where there are stages."""
        return "boft" if self.oft_blocks.dim() == 4 else "oft"

    @property
    def rank(self) -> int:
        """The size of a block."""
        return self.oft_blocks.shape[-1]

    def misfit(self, shape: Shape) -> str | None:
        """See `Algorithm.misfit`."""
        blocks = tuple(self.oft_blocks.shape)
        if len(shape) < 2:
            return f"oft_blocks {list(blocks)} do not fit the layer {list(shape)}"
        rows = shape[0]
        if len(blocks) not in (3, 4) or blocks[-1] != blocks[-2]:
            return Flaw(f"oft_blocks {list(blocks)} are no square blocks")
        if blocks[-3] * blocks[-2] != rows:
            return f"oft_blocks {list(blocks)} do not make up the {rows} rows of the layer"
        if len(blocks) == 4 and (blocks[-1] % 2 or rows % (2 ** blocks[0] * (blocks[-1] // 2))):
            return f"oft_blocks {list(blocks)} are no butterfly over {rows} rows"
        if self.rescale is not None and self.rescale.numel() != rows:
            return f"rescale {list(self.rescale.shape)} does not fit the {rows} rows of the layer"
        return None

    def delta(self, weight: Tensor) -> Tensor:
        """The rotated weight less the weight."""
        base = placed(weight, weight)
        rotation = self._rotation(weight)
        rows = base.flatten(1)
        if rotation.dim() == 3:
            rows = torch.einsum("knm,kni->kmi", rotation, rows.reshape(*rotation.shape[:2], -1))
        else:
            for stage, blocks in enumerate(rotation):
                rows = _butterfly(rows, blocks, stage)
        rotated = rows.reshape(base.shape)
        if self.rescale is not None:
            rotated = rotated * placed(self.rescale, weight).reshape(-1, *[1] * (base.dim() - 1))
        return rotated - base

    def _rotation(self, weight: Tensor) -> Tensor:
        blocks = placed(self.oft_blocks, weight)
        skew = blocks - blocks.transpose(-1, -2)
        limit = float(self.alpha) * weight.shape[0] if self.alpha is not None else 0.0
        limit = limit if self.constraint is None else float(self.constraint)
        norm = float(torch.linalg.vector_norm(skew)) + 1e-8
        if limit > 0 and norm > limit:
            skew = skew * (limit / norm)
        identity = torch.eye(skew.shape[-1], device=skew.device)
        # (I + Q)(I - Q)^-1: the two commute, so one solve is enough.
        return torch.linalg.solve(identity - skew, identity + skew)


def _butterfly(rows: Tensor, blocks: Tensor, stage: int) -> Tensor:
    """One stage of BOFT on [out, columns]: stage i turns pairs of rows that lie 2^i half blocks apart."""
    count, size, _ = blocks.shape
    stride = 2**stage * (size // 2)
    columns = rows.shape[1]
    shuffled = rows.reshape(-1, 2, stride, columns).transpose(1, 2).reshape(count, size, columns)
    turned = torch.bmm(blocks, shuffled)
    return turned.reshape(-1, stride, 2, columns).transpose(1, 2).reshape(rows.shape)


def block_size(oft_r: Tensor) -> int:
    """b, of [n, b (b - 1) / 2]."""
    return (1 + math.isqrt(1 + 8 * oft_r.shape[-1])) // 2


@dataclass(frozen=True, eq=False)
class PeftOFT(Algorithm):
    """PEFT's OFT: rotations of blocks of inputs."""

    name: ClassVar[str] = "oft"

    oft_r: Tensor
    """[n, b (b - 1) / 2]: the upper triangle of each block's Q; one block may serve for all inputs."""
    neumann_terms: Tensor | None = None
    """How many terms of the series; 0 for the exact transform (I - Q)(I + Q)^-1; PEFT's default is 5."""

    @property
    def rank(self) -> int:
        """The size of a block."""
        return block_size(self.oft_r)

    def misfit(self, shape: Shape) -> str | None:
        """See `Algorithm.misfit`."""
        triangles, size = tuple(self.oft_r.shape), self.rank if self.oft_r.dim() == 2 else 0
        inputs = math.prod(shape[1:])
        if len(triangles) != 2 or size * (size - 1) // 2 != triangles[1]:
            return Flaw(f"oft_R {list(triangles)} holds no upper triangles")
        if triangles[0] * size != inputs and (triangles[0] != 1 or inputs % size):
            return f"oft_R {list(triangles)} does not make up the {inputs} inputs of the layer"
        return None

    def delta(self, weight: Tensor) -> Tensor:
        """W R^T - W."""
        base = placed(weight, weight).flatten(1)
        size = self.rank
        blocks = base.reshape(base.shape[0], -1, size).transpose(0, 1)
        rotation = self._rotation(weight).expand(blocks.shape[0], size, size)
        turned = torch.bmm(blocks, rotation.transpose(1, 2)).transpose(0, 1).reshape(base.shape)
        return (turned - base).reshape(weight.shape)

    def _rotation(self, weight: Tensor) -> Tensor:
        values, size = placed(self.oft_r, weight), self.rank
        rows, columns = torch.triu_indices(size, size, 1, device=values.device)
        skew = values.new_zeros(values.shape[0], size, size)
        skew[:, rows, columns] = values
        skew = skew - skew.transpose(1, 2)
        identity = torch.eye(size, device=values.device).expand_as(skew)
        terms = 5 if self.neumann_terms is None else int(self.neumann_terms)
        if terms == 0:
            return torch.linalg.solve(identity + skew, identity - skew)
        # I + 2 Q + 2 Q^2 + ... + Q^n; PEFT counts the last power once, and stops at 3 at the earliest.
        total, power, last = identity.clone(), identity, 1 if terms == 2 else max(3, terms - 1)
        for exponent in range(1, last + 1 if terms > 1 else 1):
            power = torch.bmm(power, skew)
            total.add_(power, alpha=1.0 if exponent == last > 1 else 2.0)
        return total
