"""Changes that are products of two thin matrices: decomposed, measured and compared without forming them.

D = up @ down with up = Q1 R1 and down^T = Q2 R2 (QR), so D = Q1 (R1 R2^T) Q2^T, and the SVD of the small core
R1 R2^T gives that of D: exactly, at a cost of r^2 (out + in) instead of out * in * min(out, in).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora.errors import ToolError
from lora.formats.algorithms import Algorithm
from lora.formats.algorithms.base import scaling
from lora.formats.algorithms.full import BiasDifference, ModulationDifference, WeightDifference
from lora.formats.algorithms.loha import LoHa
from lora.formats.algorithms.lokr import LoKr
from lora.formats.algorithms.lora import LoRA, LoRABias
from lora.formats.names.slots import Shape
from lora.tools import dtype_name
from lora.tools.adapters.parts import Part
from lora.tools.factors.svd import Factors

FACTOR_SLOTS = frozenset({"lora_up", "lora_down", "lora_mid", "alpha"})

MAX_NUMBERS = 1 << 28
"""The most numbers of a matrix that is formed: thin factors of megabytes can have a product of terabytes."""


@dataclass(frozen=True, eq=False)
class Product:
    """up @ down: the whole change of a layer, its scaling included."""

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
        """The tensors of a layer, with alpha = rank. Raises: ToolError if a number overflows the dtype."""
        ones = (1,) * (len(self.kernel) - 1)
        up = self.up.reshape(*self.up.shape, *ones).to(dtype).contiguous()
        down = self.down.reshape(self.rank, *self.kernel).to(dtype).contiguous()
        if not all(math.isfinite(float(t.sum(dtype=torch.float64))) for t in (up, down)):
            raise ToolError(f"a factor overflows {dtype_name(dtype)}", "Choose bf16 or fp32.")
        return {"lora_up": up, "lora_down": down, "alpha": torch.tensor(float(self.rank))}


def product_of(part: Part, scale: float = 1.0) -> Product:
    """The change of a part's LoRA, scale * alpha / rank * up @ down; both factors get the root of the
    scaling. A Tucker core is multiplied into the down factor.

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
    """The exact sum: the factors are concatenated along the rank."""
    up = torch.cat([product.up for product in products], dim=1)
    return Product(up, torch.cat([product.down for product in products]), products[0].kernel)


def decompose(product: Product) -> Factors:
    """The whole singular value decomposition of the product: as many values as its factors can have."""
    left, right = torch.linalg.qr(product.up), torch.linalg.qr(product.down.t())
    core = left.R.double() @ right.R.t().double()
    u, s, v = torch.linalg.svd(core, full_matrices=False)
    up, down = left.Q @ u.float(), v.float() @ right.Q.t()
    return Factors(up, s.float(), down, float(s.square().sum()))


def squared_norm(products: Sequence[tuple[Product, float]]) -> float:
    """||sum of sign * product||_F^2; less than about 1e-14 of the products' own norms is rounding."""
    up = torch.cat([product.up.double() * sign for product, sign in products], dim=1)
    return _squared(up, torch.cat([product.down.double() for product, _ in products]))


def _squared(up: Tensor, down: Tensor) -> float:
    """||up @ down||_F^2 of float64 matrices, from their Gram matrices."""
    # The trace of a product of two symmetric matrices is the sum of their elementwise product.
    return max(0.0, float(((up.t() @ up) * (down @ down.t())).sum()))


@torch.no_grad()
def delta_norm(algorithm: Algorithm, shape: Shape) -> float | None:
    """The Frobenius norm of the delta at scale 1, in float64. None if the delta depends on the model's
    weight, or if a matrix would have to be formed that is larger than any layer.

    `shape` is that of the parameter, which `algorithm` fits (`Algorithm.misfit`). A product up @ down has the
    norm scaling * sqrt(trace((down down^T) (up^T up))), a Kronecker product the product of its factors'
    norms. Only for LoHa and for a LoRA's sparse rest a matrix of the layer's size is formed.
    """
    plain = isinstance(algorithm, LoRA) and algorithm.lora_mid is None and algorithm.is_low_rank
    if not plain and math.prod(shape) > MAX_NUMBERS:
        return None
    if isinstance(algorithm, LoRA) and (factors := algorithm.low_rank()):
        return abs(factors.scaling) * _product_norm(factors.up, factors.down)
    if isinstance(algorithm, LoKr):
        return _kronecker_norm(algorithm)
    whole = (LoRA, LoRABias, LoHa, WeightDifference, BiasDifference, ModulationDifference)
    if isinstance(algorithm, whole):
        return float(algorithm.delta(torch.zeros(shape)).double().norm())
    return None


def _product_norm(up: Tensor, down: Tensor) -> float:
    """||up @ down||_F of up [out, rank] and down [rank, ...]."""
    return math.sqrt(_squared(up.flatten(1).double(), down.flatten(1).double()))


def _kronecker_norm(lokr: LoKr) -> float:
    first = _factor_norm(lokr.lokr_w1, lokr.lokr_w1_a, lokr.lokr_w1_b, None)
    second = _factor_norm(lokr.lokr_w2, lokr.lokr_w2_a, lokr.lokr_w2_b, lokr.lokr_t2)
    factor = 1.0 if lokr.rank is None else scaling(lokr.alpha, lokr.rank)
    return abs(factor) * first * second


def _factor_norm(
    whole: Tensor | None, a: Tensor | None, b: Tensor | None, core: Tensor | None
) -> float:
    if whole is not None:
        return float(whole.double().norm())
    if a is None or b is None:
        raise ValueError("a factor is missing")
    if core is None:
        return _product_norm(a, b)
    inner = torch.einsum("ijhw,jn->inhw", core.double(), b.double())
    return _product_norm(a.t(), inner)
