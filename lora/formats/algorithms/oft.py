"""OFT and BOFT: the outputs of a layer rotated in blocks (arXiv 2306.07280, 2311.06243).

kohya and LyCORIS: with Q = B - B^T, shrunk so that norm(Q) <= alpha * out, and R = (I + Q)(I - Q)^-1, each
block of output rows is multiplied by R^T, then every row by `rescale` (LyCORIS' `DiagOFTModule`,
sd-scripts' `OFTModule`). BOFT has m such stages, between which the rows are shuffled as in a butterfly, and
which multiply by R in place of R^T (LyCORIS' `ButterflyOFTModule`).

ComfyUI's training node has LyCORIS' form, with norm(Q) <= alpha (`comfy/weight_adapter/oft.py`).

PEFT's and OneTrainer's OFT turns the inputs: see `peft_oft`.
"""

from __future__ import annotations

from dataclasses import dataclass

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
