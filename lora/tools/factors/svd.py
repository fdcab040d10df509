"""The largest singular values and vectors of a matrix, without the others; and of a convolution, with a core.

This is the range finder of Halko, Martinsson and Tropp (arXiv 0909.4061, algorithm 4.4). It starts with a few
more random columns than are wanted. Each turn multiplies them by the matrix or its transpose and makes them
orthonormal again, which draws them towards the largest singular vectors. The turns end when one more captures
almost no energy. If that does not happen soon, or if many singular values are wanted, the whole decomposition
is computed.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from lora.tools.factors.ranks import RankPolicy, choose

OVERSAMPLING = 16
"""Extra columns: without them the last wanted values converge slowly."""

FIRST_BLOCK = 32
"""How many values are computed first where the policy decides by the values; then twice as many, and so on.
"""

MIN_TURNS, MAX_TURNS = 3, 24
"""Products with the matrix. At least three, because the first gains may be small by chance."""

GAIN, ROUNDING = 2e-3, 2e-8
"""A turn ends the search if it captures less than GAIN of the remaining energy plus ROUNDING of all energy,
which float32 cannot distinguish from nothing.

Measured at rank 32: a difference of two bfloat16 layers of SDXL with a planted rank of 24 takes 4 to 6 turns,
and its error is within 1.0035 of the best; white noise of 640 x 640 to 2880 x 320 takes 8 to 10 turns, 1.005
(at a GAIN of 3e-3: 1.007). A ROUNDING of 2e-7 missed a second group of singular values, a thousandth of the
first: 1.011.
"""

SHORT = 512
"""How many numbers are summed in float32."""

SMALL, SHARE = 160, 4
"""A matrix is decomposed whole if its smaller side is at most SMALL, or less than SHARE times the columns."""


@dataclass(frozen=True, eq=False)
class Factors:
    """up @ diag(s) @ down: an approximation of rank r, float32."""

    up: Tensor
    """[out, r], orthonormal columns; where the singular value is 0, the column may be 0."""
    s: Tensor
    """[r], descending."""
    down: Tensor
    """[r, in], orthonormal rows."""
    total: float
    """||D||_F^2 of the whole matrix, summed in float64."""

    @property
    def residual(self) -> float:
        """||D - up diag(s) down||_F^2 = ||D||_F^2 - sum s^2; less than 1e-6 of the total is rounding."""
        return max(0.0, self.total - float(self.s.double().square().sum()))

    @property
    def rank(self) -> int:
        """How many singular values there are."""
        return len(self.s)

    def cut(self, rank: int) -> Factors:
        """The first `rank` of them."""
        return Factors(self.up[:, :rank], self.s[:rank], self.down[:rank], self.total)

    def balanced(self) -> tuple[Tensor, Tensor]:
        """(up, down), [out, r] and [r, in], whose product is the approximation. Each gets sqrt(s), so that
        both stay in the range in which half precision has all of its digits.
        """
        root = self.s.sqrt()
        return self.up * root, root[:, None] * self.down


def energy(tensor: Tensor) -> float:
    """||D||_F^2 of a float32 tensor: short sums in float32, added up in float64.

    It takes a sixth of the time of a sum in float64, and is equal to at least six digits.
    """
    flat = tensor.reshape(-1)
    even = len(flat) // SHORT * SHORT
    norms = torch.linalg.vector_norm(flat[:even].reshape(-1, SHORT), dim=1)
    return float(norms.double().square().sum() + flat[even:].double().square().sum())


def truncated_svd(matrix: Tensor, rank: int, seed: int = 0) -> Factors:
    """The `rank` largest singular values and vectors of a float32 matrix [out, in], or all that it has.

    The error is at most 1.01 times that of the best matrix of that rank. The same seed gives the same
    numbers. The matrix must be finite, and is not changed.
    """
    total, wanted = energy(matrix), min(rank, *matrix.shape)
    search = None
    if not _whole(matrix, wanted):
        search = _search(matrix, wanted, _start(matrix, wanted, seed), total)
    return (search.factors if search else _exact(matrix, total)).cut(wanted)


def svd_by_policy(matrix: Tensor, policy: RankPolicy, seed: int = 0) -> Factors:
    """As `truncated_svd`, with as many singular values as the policy chooses for this matrix.

    Where the values decide, twice as many are computed each time until more could not change the choice.
    """
    if policy.known is not None:
        factors = truncated_svd(matrix, policy.known, seed)
        return factors.cut(choose(factors.s, factors.total, policy))
    total, wanted = energy(matrix), min(FIRST_BLOCK, *matrix.shape)
    start = _start(matrix, wanted, seed)
    while not _whole(matrix, wanted):
        search = _search(matrix, wanted, start, total)
        if search is None:
            break
        factors = search.factors.cut(wanted)
        if policy.settled(factors.s, total):
            return factors.cut(choose(factors.s, total, policy))
        wanted *= 2
        start = torch.cat([search.basis, _start(matrix, wanted, seed + wanted)], dim=1)
        start = start[:, : wanted + OVERSAMPLING]
    factors = _exact(matrix, total)
    return factors.cut(choose(factors.s, total, policy))


def layer_seed(seed: int, name: str) -> int:
    """A seed of the layer's own, which does not depend on the layers before it."""
    return seed + zlib.crc32(name.encode())


def _whole(matrix: Tensor, wanted: int) -> bool:
    """Whether computing all singular values takes less time than searching the wanted ones."""
    side = min(matrix.shape)
    return side <= SMALL or (wanted + OVERSAMPLING) * SHARE > side


def _start(matrix: Tensor, wanted: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(matrix.shape[1], wanted + OVERSAMPLING, generator=generator)


@dataclass(frozen=True, eq=False)
class _Search:
    factors: Factors
    basis: Tensor
    """[in, k]: where a search for more values starts."""


def _search(matrix: Tensor, wanted: int, start: Tensor, total: float) -> _Search | None:
    """Repeats turns until the energy of the `wanted` largest values no longer grows; None if that fails."""
    here, there = matrix, matrix.t()
    basis, captured = torch.linalg.qr(start).Q, 0.0
    for turn in range(MAX_TURNS):
        image = here @ basis
        squares, turned = _gram(image)
        before, captured = captured, float(squares[:wanted].sum())
        enough = GAIN * max(0.0, total - captured) + ROUNDING * total
        if turn >= MIN_TURNS - 1 and captured - before <= enough:
            return _result(image, basis, turned, total, flipped=turn % 2 == 1)
        basis = torch.linalg.qr(image).Q
        here, there = there, here
    return None


def _gram(image: Tensor) -> tuple[Tensor, Tensor]:
    """The squared singular values of [rows, k], descending, and the right vectors [k, k], in float64.

    By the Gram matrix: squaring halves the digits of float64, and float32 has no more than these.
    """
    wide = image.double()
    squares, vectors = torch.linalg.eigh(wide.t() @ wide)
    return squares.flip(0).clamp_(min=0), vectors.flip(1)


def _result(
    image: Tensor, basis: Tensor, turned: Tensor, total: float, *, flipped: bool
) -> _Search:
    """The singular vectors. image @ basis^T is the matrix on the subspace, or its transpose if `flipped`."""
    turn = turned.float()
    scaled = image @ turn
    s = torch.linalg.vector_norm(scaled, dim=0)
    up, down = scaled / s.clamp(min=torch.finfo(torch.float32).tiny), (basis @ turn).t()
    if flipped:
        return _Search(Factors(down.t(), s, up.t(), total), torch.linalg.qr(image).Q)
    return _Search(Factors(up, s, down, total), basis)


def _exact(matrix: Tensor, total: float) -> Factors:
    up, s, down = torch.linalg.svd(matrix, full_matrices=False)
    return Factors(up, s, down, total)


@dataclass(frozen=True, eq=False)
class TuckerFactors:
    """A convolution as a small core between two thin matrices, float32: the form that LyCORIS calls
    `lora_mid`.

    D[o, i, h, w] = sum up[o, m] core[m, n, h, w] down[n, i].
    """

    up: Tensor
    """[out, r], orthonormal columns."""
    core: Tensor
    """[r, r, kh, kw]."""
    down: Tensor
    """[r, in], orthonormal rows."""
    total: float
    """||D||_F^2 of the whole change."""

    @property
    def residual(self) -> float:
        """||D - D'||_F^2; all of the energy of D' is in the core."""
        return max(0.0, self.total - energy(self.core))

    def balanced(self) -> tuple[Tensor, Tensor, Tensor]:
        """(up, core, down) with norms of the same order."""
        size = energy(self.core) ** (1 / 6)
        if not size:
            return self.up, self.core, self.down
        return self.up * size, self.core / size**2, self.down * size


def tucker_svd(weight: Tensor, rank: int, seed: int = 0) -> TuckerFactors:
    """Factors of a float32 [out, in, kh, kw] with `rank` columns on both sides, or as many as it has.

    The sequentially truncated higher-order SVD (Vannieuwenhoven, Vandebril, Meerbergen 2012), and one sweep
    of higher-order orthogonal iteration (De Lathauwer, De Moor, Vandewalle 2000). The error is at most
    sqrt(2) times that of the best factors.
    """
    rank = min(rank, *weight.shape[:2])
    down = _inputs(weight, rank, seed)
    up = _outputs(weight, down, rank, seed)
    down = _inputs(torch.einsum("oihw,om->mihw", weight, up), rank, seed)
    up = _outputs(weight, down, rank, seed)
    core = torch.einsum("oihw,om,ni->mnhw", weight, up, down)
    return TuckerFactors(up, core, down, energy(weight))


def _inputs(weight: Tensor, rank: int, seed: int) -> Tensor:
    """The leading directions of the inputs: [r, in]."""
    matrix = weight.movedim(1, 0).flatten(1)
    return truncated_svd(matrix, rank, seed).up.t()


def _outputs(weight: Tensor, down: Tensor, rank: int, seed: int) -> Tensor:
    """The leading directions of the outputs, for the inputs in `down`: [out, r]."""
    matrix = torch.einsum("oihw,ni->onhw", weight, down).flatten(1)
    return truncated_svd(matrix, rank, seed).up
