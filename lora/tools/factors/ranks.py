"""Chooses how many singular values of a layer's change are kept: by number, energy, size, or a file's bytes.

The energy of a matrix D is ||D||_F^2, the sum of its squared singular values. The rules are those of
sd-scripts' `resize_lora.py` (sv_fro as `energy`, sv_ratio as `ratio`) and LyCORIS' `extract_locon.py`
(`threshold`), without their off-by-one error: the smallest rank that fulfils the rule is chosen.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora.errors import ToolError

RULES = ("rank", "energy", "threshold", "ratio")


@dataclass(frozen=True)
class RankPolicy:
    """The rule for the rank of every layer: at most one of the first four fields; the last two are bounds.

    Raises: ToolError if no field is set, if there are two rules, or if a number is out of range.
    """

    rank: int | None = None
    """The same number for every layer."""
    energy: float | None = None
    """The smallest number that keeps this share of ||D||_F^2: 0 < energy <= 1."""
    threshold: float | None = None
    """The singular values that are at least this large."""
    ratio: float | None = None
    """The singular values that are at least this share of the largest: 0 < ratio <= 1."""
    max_rank: int | None = None
    """The limit for one layer."""
    max_bytes: int | None = None
    """The limit for the whole file; see `spend`."""

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        rules = [name for name in RULES if name in given]
        if len(rules) > 1:
            raise ToolError(f"{' and '.join(rules)} cannot choose the rank together", "Choose one.")
        if not given:
            hint = f"Give one of {', '.join(RULES)}."
            raise ToolError("no rule for the rank is given", hint)
        for name in ("rank", "max_rank", "max_bytes"):
            if given.get(name, 1) < 1:
                raise ToolError(f"{name} is {given[name]}", "It must be at least 1.")
        for name in ("energy", "ratio"):
            if not 0 < given.get(name, 1) <= 1:
                raise ToolError(f"{name} is {given[name]}", "It must be over 0 and at most 1.")
        if not 0 < given.get("threshold", 1) < float("inf"):
            raise ToolError(f"threshold is {given['threshold']}", "It must be over 0.")

    @property
    def has_rule(self) -> bool:
        """Whether it limits the rank of each layer, besides the budget."""
        return any(getattr(self, name) is not None for name in (*RULES, "max_rank"))

    @property
    def known(self) -> int | None:
        """The rank, if it does not depend on the singular values; else None."""
        if self.energy is not None or self.threshold is not None or self.ratio is not None:
            return None
        numbers = [n for n in (self.rank, self.max_rank) if n is not None]
        return min(numbers) if numbers else None

    def settled(self, values: Tensor, total: float) -> bool:
        """Whether these values already decide what `choose` returns."""
        limit = self.known or self.max_rank
        if limit is not None and len(values) >= limit:
            return True
        if self.known is not None or not len(values):
            return False
        if self.energy is not None:
            return bool(values.double().square().sum() >= self.energy * total)
        least = self._least(values)
        return least is not None and bool(values[-1] < least)

    def _least(self, values: Tensor) -> float | None:
        """The smallest singular value that is kept, if the rule compares values."""
        return self.threshold if self.ratio is None else self.ratio * float(values[0])


def choose(values: Tensor, total: float, policy: RankPolicy) -> int:
    """The rank for a layer with these singular values, [n], descending; `total` is ||D||_F^2.

    At least 1, so that no rule drops a layer silently, unless all values are zero; at most n. `max_bytes` is
    not applied here, but to all layers together, by `spend`.
    """
    if not len(values) or total <= 0 or float(values[0]) <= 0:
        return 0
    if policy.energy is not None:
        kept = values.double().square().cumsum(0)
        # At energy 1 the two sums mean the same number, but may differ by a rounding.
        rank = int(torch.searchsorted(kept, min(policy.energy * total, float(kept[-1])))) + 1
    elif (least := policy._least(values)) is not None:
        rank = int((values >= least).sum())
    else:
        rank = policy.known or len(values)
    return max(1, min(rank, len(values), policy.max_rank or rank))


@dataclass(frozen=True, eq=False)
class Spectrum:
    """What `spend` needs to know of a layer."""

    values: Tensor
    """[n]: its singular values, descending."""
    bytes_per_rank: int
    """The bytes in the file for one more rank."""
    least: int = 0
    """The smallest rank that is allowed."""


def spend(spectra: Sequence[Spectrum], max_bytes: int) -> list[int]:
    """The ranks of all layers (perhaps the least) that keep the most energy within a number of bytes.

    Greedy by energy per byte. Since singular values descend, the next one of a layer is never worth more than
    its last, so the greedy choice is the best for the bytes that it takes. A layer whose next rank does not
    fit into the remaining bytes gets no more; the others go on. Of equal values that of the earlier layer
    wins. Raises: ToolError if the bytes do not hold the least ranks.
    """
    ranks = [spectrum.least for spectrum in spectra]
    needed = sum(spectrum.least * spectrum.bytes_per_rank for spectrum in spectra)
    left = max_bytes - needed
    if needed and left < 0:
        why = f"{max_bytes} bytes are left for factors, and the smallest ranks need {needed}"
        raise ToolError(why, "Allow more.")
    gains = [(s.values.double().square() / max(1, s.bytes_per_rank)).tolist() for s in spectra]
    heap = [(-gain[ranks[i]], i) for i, gain in enumerate(gains) if ranks[i] < len(gain)]
    heapq.heapify(heap)
    while heap:
        gain, index = heapq.heappop(heap)
        if gain == 0 or spectra[index].bytes_per_rank > left:
            continue
        left -= spectra[index].bytes_per_rank
        ranks[index] += 1
        if ranks[index] < len(gains[index]):
            heapq.heappush(heap, (-gains[index][ranks[index]], index))
    return ranks
