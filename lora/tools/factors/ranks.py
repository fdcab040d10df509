"""How many singular values of a layer's change are kept: by number, by energy, by size, or by a file's bytes.

The energy of a matrix D is ||D||_F^2, the sum of its squared singular values. The rules are those of
sd-scripts' `resize_lora.py` (sv_fro as `energy`, sv_ratio as `ratio`) and LyCORIS' `extract_locon.py`
(`threshold`), without their off-by-one: the smallest rank that fulfils the rule.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lora.errors import ToolError

RULES = ("rank", "energy", "threshold", "ratio")


@dataclass(frozen=True)
class RankPolicy:
    """The rule for every layer's rank; at most one of the first four, and the last two as bounds on top.

    Raises: ToolError if it says nothing, says two things, or a number is out of its range.
    """

    rank: int | None = None
    """This many."""
    energy: float | None = None
    """As few as keep this share of ||D||_F^2: 0 < energy <= 1."""
    threshold: float | None = None
    """Those singular values that are at least this."""
    ratio: float | None = None
    """Those that are at least this share of the largest: 0 < ratio <= 1."""
    max_rank: int | None = None
    """Never more than this in one layer."""
    max_bytes: int | None = None
    """The whole file's size; see `spend`."""

    def __post_init__(self) -> None:
        given = {
            f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None
        }
        rules = [name for name in RULES if name in given]
        if len(rules) > 1:
            raise ToolError(f"{' and '.join(rules)} cannot choose the rank together", "Choose one.")
        if not given:
            raise ToolError(
                "nothing says how the rank is chosen", f"Give one of {', '.join(RULES)}."
            )
        for name in ("rank", "max_rank", "max_bytes"):
            if given.get(name, 1) < 1:
                raise ToolError(f"{name} is {given[name]}", "It is at least 1.")
        for name in ("energy", "ratio"):
            if not 0 < given.get(name, 1) <= 1:
                raise ToolError(f"{name} is {given[name]}", "It is a share: over 0, at most 1.")
        if not 0 < given.get("threshold", 1) < float("inf"):
            raise ToolError(f"threshold is {given['threshold']}", "It is over 0.")

    @property
    def known(self) -> int | None:
        """The rank that is chosen whatever the singular values are; None if they decide."""
        if self.energy is not None or self.threshold is not None or self.ratio is not None:
            return None
        numbers = [n for n in (self.rank, self.max_rank) if n is not None]
        return min(numbers) if numbers else None

    def settled(self, values: Tensor, total: float) -> bool:
        """Whether `choose` would choose the same if it saw more, smaller values."""
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
        """The smallest singular value that is kept, where the rule is of that kind."""
        return self.threshold if self.ratio is None else self.ratio * float(values[0])


def choose(values: Tensor, total: float, policy: RankPolicy) -> int:
    """The rank for a layer with these singular values, [n], falling; `total` is ||D||_F^2.

    At least 1, so that no rule drops a layer in silence, unless all is zero; at most n. `max_bytes` is
    not looked at here: it is spent over all layers at once.
    """
    if not len(values) or total <= 0 or float(values[0]) <= 0:
        return 0
    if policy.energy is not None:
        kept = values.double().square().cumsum(0)
        # At energy 1 the two sums are the same number, and may miss each other by a rounding.
        rank = int(torch.searchsorted(kept, min(policy.energy * total, float(kept[-1])))) + 1
    elif (least := policy._least(values)) is not None:
        rank = int((values >= least).sum())
    else:
        rank = policy.known or len(values)
    return max(1, min(rank, len(values), policy.max_rank or rank))


@dataclass(frozen=True, eq=False)
class Spectrum:
    """What `spend` has to know of a layer."""

    values: Tensor
    """[n]: its singular values, falling."""
    bytes_per_rank: int
    """What one more rank takes in the file."""


def spend(spectra: Sequence[Spectrum], max_bytes: int) -> list[int]:
    """Ranks for all layers that keep the most energy within a number of bytes; 0 for what gets nothing.

    Greedy by energy per byte. Singular values fall, so a layer's next one is never worth more than its
    last, and the greedy choice is the best one for the bytes that it takes. A layer whose next rank does
    not fit into what is left is done; the others go on. Equal values go to the earlier layer.
    """
    ranks, left = [0] * len(spectra), max_bytes
    gains = [
        (one.values.double().square() / max(1, one.bytes_per_rank)).tolist() for one in spectra
    ]
    heap = [(-gain[0], index) for index, gain in enumerate(gains) if gain]
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
