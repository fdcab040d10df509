"""The largest singular values and vectors of a matrix, without the others.

The range finder of Halko, Martinsson and Tropp (arXiv 0909.4061, algorithm 4.4): a random start of a few more
columns than are wanted, then turns of multiplying by the matrix or its transpose and making the columns
orthonormal again, which draw them to the largest singular vectors. How many turns a matrix needs is not
guessed: they go on until one more captures no energy worth the name, and if that does not come soon, or many
singular values are wanted, the whole decomposition is made.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora.tools.factors.ranks import RankPolicy, choose

OVERSAMPLING = 16
"""Columns beyond the wanted ones: the last wanted values converge as the ratio to the first unwanted."""

FIRST_BLOCK = 32
"""How many values are looked for at first where the policy decides by the values; then twice as many."""

MIN_TURNS, MAX_TURNS = 3, 24
"""Products with the matrix. Three at least: a gain that is small by chance at the start must not end it."""

GAIN, ROUNDING = 2e-3, 2e-8
"""A turn that captures less than this share of what is left ends the search; beside it, the share of all
that float32 cannot tell from nothing.

Measured at rank 32: a difference of two bfloat16 layers of SDXL with a planted rank of 24 takes 4 to 6 turns
and is within 1.0035 of the best error; white noise of 640 x 640 to 2880 x 320 takes 8 to 10, and 1.005 (at
a GAIN of 3e-3: 1.007). With a ROUNDING of 2e-7 a second tier of singular values, a thousandth of the first,
was missed: 1.011.
"""

SHORT = 512
"""Numbers that are added up in float32."""

SMALL, SHARE = 160, 4
"""The smaller side of a matrix that is decomposed whole, and the part of that side from which on it is."""


@dataclass(frozen=True, eq=False)
class Factors:
    """up @ diag(s) @ down: the best approximation of rank r that was found, float32."""

    up: Tensor
    """[out, r], orthonormal columns; those of singular values that are 0 may be 0."""
    s: Tensor
    """[r], falling."""
    down: Tensor
    """[r, in], orthonormal rows."""
    total: float
    """||D||_F^2 of the whole matrix, summed in float64."""

    @property
    def residual(self) -> float:
        """||D - up diag(s) down||_F^2 = ||D||_F^2 - sum s^2; below 1e-6 of the total it is rounding."""
        return max(0.0, self.total - float(self.s.double().square().sum()))

    @property
    def rank(self) -> int:
        """How many singular values there are."""
        return len(self.s)

    def cut(self, rank: int) -> Factors:
        """The first `rank` of them."""
        return Factors(self.up[:, :rank], self.s[:rank], self.down[:rank], self.total)

    def balanced(self) -> tuple[Tensor, Tensor]:
        """(up, down), [out, r] and [r, in], whose product is the approximation: sqrt(s) in each.

        So that both stay in the range where half precision has all of its digits.
        """
        root = self.s.sqrt()
        return self.up * root, root[:, None] * self.down


def energy(tensor: Tensor) -> float:
    """||D||_F^2 of a float32 tensor: short sums in float32, and their sum in float64.

    A sixth of the time of a sum in float64, and the same to six digits at worst.
    """
    flat = tensor.reshape(-1)
    even = len(flat) // SHORT * SHORT
    norms = torch.linalg.vector_norm(flat[:even].reshape(-1, SHORT), dim=1)
    return float(norms.double().square().sum() + flat[even:].double().square().sum())


def truncated_svd(matrix: Tensor, rank: int, seed: int = 0) -> Factors:
    """The `rank` largest singular values and vectors of a float32 matrix [out, in], or all it has.

    Its error is at most 1.01 times the smallest that any matrix of that rank has. The same seed gives the
    same numbers. The matrix is not changed, and must be finite.
    """
    total, wanted = energy(matrix), min(rank, *matrix.shape)
    found = (
        None
        if _whole(matrix, wanted)
        else _search(matrix, wanted, _start(matrix, wanted, seed), total)
    )
    return (found.factors if found else _exact(matrix, total)).cut(wanted)


def svd_by_policy(matrix: Tensor, policy: RankPolicy, seed: int = 0) -> Factors:
    """As `truncated_svd`, as many singular values as the policy chooses for this matrix.

    Where the values decide, they are found in blocks, each twice the last one, until the choice is settled.
    """
    if policy.known is not None:
        found = truncated_svd(matrix, policy.known, seed)
        return found.cut(choose(found.s, found.total, policy))
    total, wanted = energy(matrix), min(FIRST_BLOCK, *matrix.shape)
    start = _start(matrix, wanted, seed)
    while not _whole(matrix, wanted):
        search = _search(matrix, wanted, start, total)
        if search is None:
            break
        found = search.factors.cut(wanted)
        if policy.settled(found.s, total):
            return found.cut(choose(found.s, total, policy))
        wanted *= 2
        start = torch.cat([search.basis, _start(matrix, wanted, seed + wanted)], dim=1)
        start = start[:, : wanted + OVERSAMPLING]
    found = _exact(matrix, total)
    return found.cut(choose(found.s, total, policy))


def _whole(matrix: Tensor, wanted: int) -> bool:
    """Whether all singular values come sooner than the wanted ones alone."""
    side = min(matrix.shape)
    return side <= SMALL or (wanted + OVERSAMPLING) * SHARE > side


def _start(matrix: Tensor, wanted: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(matrix.shape[1], wanted + OVERSAMPLING, generator=generator)


@dataclass(frozen=True, eq=False)
class _Found:
    factors: Factors
    basis: Tensor
    """[in, k]: where a search for more begins."""


def _search(matrix: Tensor, wanted: int, start: Tensor, total: float) -> _Found | None:
    """Turns until the energy of the `wanted` largest values stands still; None if it does not."""
    here, there = matrix, matrix.t()
    basis, captured = torch.linalg.qr(start).Q, 0.0
    for turn in range(MAX_TURNS):
        image = here @ basis
        squares, turned = _gram(image)
        before, captured = captured, float(squares[:wanted].sum())
        enough = GAIN * max(0.0, total - captured) + ROUNDING * total
        if turn >= MIN_TURNS - 1 and captured - before <= enough:
            return _found(image, basis, turned, total, flipped=turn % 2 == 1)
        basis = torch.linalg.qr(image).Q
        here, there = there, here
    return None


def _gram(image: Tensor) -> tuple[Tensor, Tensor]:
    """The squared singular values of [rows, k], falling, and the right vectors [k, k]: both float64.

    By its Gram matrix: squaring costs half of float64's digits, and float32 has no more to begin with.
    """
    wide = image.double()
    squares, vectors = torch.linalg.eigh(wide.t() @ wide)
    return squares.flip(0).clamp_(min=0), vectors.flip(1)


def _found(image: Tensor, basis: Tensor, turned: Tensor, total: float, *, flipped: bool) -> _Found:
    """matrix = image @ basis^T on the subspace; `flipped`: it is the transpose that is so."""
    factors = _turned(image, basis, turned, total)
    if not flipped:
        return _Found(factors, basis)
    swapped = Factors(factors.down.t(), factors.s, factors.up.t(), total)
    return _Found(swapped, torch.linalg.qr(image).Q)


def _turned(image: Tensor, basis: Tensor, turned: Tensor, total: float) -> Factors:
    """The singular vectors, from columns that span them."""
    turn = turned.float()
    scaled = image @ turn
    s = torch.linalg.vector_norm(scaled, dim=0)
    up = scaled / s.clamp(min=torch.finfo(torch.float32).tiny)
    return Factors(up, s, (basis @ turn).t(), total)


def _exact(matrix: Tensor, total: float) -> Factors:
    """All singular values."""
    up, s, down = torch.linalg.svd(matrix, full_matrices=False)
    return Factors(up, s, down, total)
