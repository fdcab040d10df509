"""Changes that are products of two thin matrices: cut to a rank, and compared, without ever being formed.

D = up @ down with up = Q1 R1 and down^T = Q2 R2 (QR), so D = Q1 (R1 R2^T) Q2^T, and the SVD of the small core
in the middle is that of D: exact, at the cost of r^2 (out + in) instead of out * in * min(out, in).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora.errors import ToolError
from lora.formats.algorithms.lora import LoRA
from lora.tools.adapters.parts import Part
from lora.tools.factors.svd import Factors

FACTOR_SLOTS = frozenset({"lora_up", "lora_down", "lora_mid", "alpha"})


@dataclass(frozen=True, eq=False)
class Product:
    """up @ down: a layer's whole change, scaling and all."""

    up: Tensor
    """[out, r], float32."""
    down: Tensor
    """[r, in * kh * kw], float32."""
    kernel: tuple[int, ...]
    """The axes of the layer's weight behind the outputs: (in,) or (in, kh, kw)."""

    @property
    def rank(self) -> int:
        """The inner dimension."""
        return self.up.shape[1]

    def slots(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """As the tensors of a layer, with alpha = rank. Raises: ToolError if a number overflows the dtype."""
        ones = (1,) * (len(self.kernel) - 1)
        up = self.up.reshape(*self.up.shape, *ones).to(dtype).contiguous()
        down = self.down.reshape(self.rank, *self.kernel).to(dtype).contiguous()
        if not all(math.isfinite(float(t.sum(dtype=torch.float64))) for t in (up, down)):
            name = str(dtype).removeprefix("torch.")
            raise ToolError(f"a factor overflows {name}", "Choose bf16 or fp32.")
        return {"lora_up": up, "lora_down": down, "alpha": torch.tensor(float(self.rank))}


def product_of(part: Part, scale: float = 1.0) -> Product:
    """The change of a part's LoRA: scale * alpha / rank * up @ down, the factor's root in each of the two.
    A Tucker core goes into the down factor, so the product is flat.

    Raises: ToolError if the factors do not fit together.
    """
    slots = part.slots
    lora = LoRA(**{slot: slots[slot] for slot in FACTOR_SLOTS if slot in slots})
    low = lora.low_rank() if _fits(lora) else None
    if low is None:
        raise ToolError(f"the factors of {part.name} do not fit together")
    factor = scale * low.scaling
    root = math.sqrt(abs(factor))
    up = low.up.flatten(1).float() * math.copysign(root, factor)
    down = low.down.float() * root
    return Product(up, down.flatten(1), tuple(low.down.shape[1:]))


def _fits(lora: LoRA) -> bool:
    up, down, mid = lora.lora_up, lora.lora_down, lora.lora_mid
    if up.dim() < 2 or down.dim() < 2 or up[0].numel() != down.shape[0]:
        return False
    return mid is None or (
        mid.dim() == 4 and mid.shape[0] == mid.shape[1] == down.shape[0] == down[:, 0].numel()
    )


def side_by_side(products: Sequence[Product]) -> Product:
    """Their sum, exactly: the factors concatenated along the rank."""
    up = torch.cat([one.up for one in products], dim=1)
    return Product(up, torch.cat([one.down for one in products]), products[0].kernel)


def decompose(product: Product) -> Factors:
    """The singular value decomposition of the product, whole: as many values as its factors can have."""
    left, right = torch.linalg.qr(product.up), torch.linalg.qr(product.down.t())
    core = left.R.double() @ right.R.t().double()
    u, s, v = torch.linalg.svd(core, full_matrices=False)
    up, down = left.Q @ u.float(), v.float() @ right.Q.t()
    return Factors(up, s.float(), down, float(s.square().sum()))


def squared_norm(products: Sequence[tuple[Product, float]]) -> float:
    """||sum of sign * product||_F^2, from the factors' Gram matrices in float64; below about 1e-14 of the
    products' own norms it is rounding.
    """
    up = torch.cat([one.up.double() * sign for one, sign in products], dim=1)
    down = torch.cat([one.down.double() for one, _ in products])
    return max(0.0, float(((up.t() @ up) * (down @ down.t())).sum()))
