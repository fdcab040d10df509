"""Cuts layers to the rank that a policy chooses, and measures the error of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora.errors import ToolError
from lora.tools import OnProgress, ignore_progress
from lora.tools.adapters.parts import Adapter, Part, rank_metadata
from lora.tools.factors.lowrank import Product, decompose, squared_norm
from lora.tools.factors.ranks import RankPolicy, Spectrum, choose, spend
from lora.tools.factors.svd import Factors, energy, svd_by_policy
from lora.tools.writing import ROOM_PER_TENSOR

BUDGET_RANK = 128
"""How many singular values of a whole matrix a budget in bytes chooses from, if the policy has no rule:
computing all of them takes as long as a full decomposition.
"""


def relative_error(errors: Iterable[float], energies: Iterable[float]) -> float:
    """||D - D'||_F / ||D||_F over changes D with these ||D - D'||_F^2 and ||D||_F^2."""
    energy = math.fsum(energies)
    return math.sqrt(math.fsum(errors) / energy) if energy else 0.0


@dataclass(frozen=True)
class LayerChange:
    """How the change of one layer, D, was approximated."""

    name: str
    before: int | None
    """The rank that it had; None if it was no product."""
    rank: int
    energy: float
    """||D||_F^2."""
    kept: float
    """The share of it that the rank keeps: 1 - (dropped singular values squared) / ||D||_F^2."""
    error: float
    """||D - D'||_F^2, where D' is what the stored numbers give."""

    @property
    def relative_error(self) -> float:
        """||D - D'||_F / ||D||_F."""
        return relative_error([self.error], [self.energy])


@dataclass(frozen=True)
class Report:
    """What a tool did to an adapter."""

    changes: tuple[LayerChange, ...]
    """The layers that were approximated; the numbers of all others are unchanged."""
    modules: int
    """How many the result has."""
    unused: tuple[tuple[str, str], ...] = ()
    """(key, reason) of the tensors that were left out, as was allowed."""

    @property
    def relative_error(self) -> float:
        """||D - D'||_F / ||D||_F over the layers that were approximated."""
        return relative_error((c.error for c in self.changes), (c.energy for c in self.changes))


@dataclass(frozen=True)
class CutLayer:
    """A layer that is to be cut."""

    name: str
    before: int | None
    """The rank that it has; None if it is no product."""
    dtype: torch.dtype
    """Of the result."""


def report_of(result: Adapter, changes: Sequence[LayerChange], inputs: Sequence[Adapter]) -> Report:
    """The report on a result."""
    unused = tuple((one.key, one.reason) for adapter in inputs for one in adapter.unused)
    return Report(tuple(changes), len(result.parts), unused)


@dataclass(frozen=True, eq=False)
class Cut:
    """A layer whose singular values are known, before its rank is chosen."""

    layer: CutLayer
    factors: Factors
    kernel: tuple[int, ...]
    """The axes of the layer's weight after the outputs."""
    missed: float = 0.0
    """The energy of the layer's change that is not in `factors`, and is orthogonal to them."""

    @classmethod
    def of_product(cls, layer: CutLayer, product: Product) -> Cut:
        """Of a change that is a product already; the decomposition is exact."""
        return cls(layer, decompose(product), product.kernel)

    @classmethod
    def of_matrix(
        cls, layer: CutLayer, matrix: Tensor, kernel: tuple[int, ...], policy: RankPolicy, seed: int
    ) -> Cut:
        """Of a whole matrix, [out, in * kh * kw]: as many singular values as the policy may choose."""
        if not policy.has_rule:
            policy = replace(policy, max_rank=BUDGET_RANK)
        factors = svd_by_policy(matrix, policy, seed)
        up, down = factors.balanced()
        return cls(layer, factors, kernel, energy(torch.addmm(matrix, up, down, alpha=-1)))

    def at(self, rank: int) -> tuple[dict[str, Tensor], LayerChange]:
        """The tensors at a rank (0: none), and their error as stored.

        ||D - D'||^2 is the sum of ||D - D_r||^2, known from the dropped singular values, and of the rounding
        ||D_r - D'||^2, which is measured. The two are orthogonal up to the product of two roundings, because
        D - D_r is orthogonal to every matrix with the columns or the rows of D_r.
        """
        dropped = float(self.factors.s[rank:].double().square().sum()) + self.missed
        error, slots = dropped, dict[str, Tensor]()
        if rank:
            kept = Product(*self.factors.cut(rank).balanced(), self.kernel)
            slots = kept.slots(self.layer.dtype)
            up, down = slots["lora_up"].float(), slots["lora_down"].float()
            stored = Product(up.flatten(1), down.flatten(1), self.kernel)
            error += squared_norm([(kept, 1.0), (stored, -1.0)])
        total = self.factors.total
        share = 1 - dropped / total if total else 1.0
        name, before = self.layer.name, self.layer.before
        return slots, LayerChange(name, before, rank, total, share, error)


@dataclass(frozen=True, eq=False)
class ModuleToCut:
    """One module of an adapter that is being rewritten."""

    part: Part
    """What stays, and the module's names."""
    decompose: Callable[[], Cut] | None = None
    """Decomposes the change that is cut; None if nothing is."""
    least: int = 0
    """The smallest rank that is allowed."""
    uncut: Part | None = None
    """The part unchanged, taken if the chosen rank is not below its own."""

    def at(self, cut: Cut, rank: int) -> tuple[Part | None, LayerChange | None]:
        """The part at a rank, None if nothing is left of it; and how its change was approximated."""
        rank = max(rank, self.least)
        if self.uncut is not None and cut.layer.before is not None and rank >= cut.layer.before:
            return self.uncut, None
        slots, change = cut.at(rank)
        slots |= self.part.slots
        return (replace(self.part, slots=slots) if slots else None), change


def cut_modules(
    adapter: Adapter,
    modules: Sequence[ModuleToCut],
    policy: RankPolicy | None,
    on_progress: OnProgress = ignore_progress,
) -> tuple[Adapter, list[LayerChange]]:
    """The adapter with these modules, each at the rank that the policy chooses, and how each was
    approximated. A module of which nothing is left is only in that list.

    One layer is in memory at a time, so with a budget in bytes each is decomposed twice. Raises: ToolError if
    the budget does not hold what is not cut, or if a factor overflows its dtype.
    """
    thin = [module for module in modules if module.decompose]
    budget = policy is not None and policy.max_bytes is not None
    total = len(modules) + (len(thin) if budget else 0)
    ranks: Iterator[int] | None = None
    if policy is not None and policy.max_bytes is not None and thin:
        spectra = []
        for done, module in enumerate(thin):
            on_progress(done, total, module.part.name)
            spectra.append(_spectrum(module, policy))
        left = policy.max_bytes - _bytes_beside(adapter, modules, policy.max_bytes)
        ranks = iter(spend(spectra, left))
    parts: list[Part] = []
    changes: list[LayerChange] = []
    for done, module in enumerate(modules, total - len(modules)):
        on_progress(done, total, module.part.name)
        part: Part | None = module.part if module.part.slots else None
        if module.decompose and policy is not None:
            cut = module.decompose()
            rank = next(ranks) if ranks else choose(cut.factors.s, cut.factors.total, policy)
            part, change = module.at(cut, rank)
            changes += [change] if change else []
        parts += [part] if part else []
    on_progress(total, total, "")
    metadata = {**adapter.metadata, **rank_metadata((part.rank, part.alpha) for part in parts)}
    return replace(adapter, parts=tuple(parts), metadata=metadata), changes


def _spectrum(module: ModuleToCut, policy: RankPolicy) -> Spectrum:
    if module.decompose is None:
        raise ValueError("the module is not to be cut")
    cut = module.decompose()
    rank = choose(cut.factors.s, cut.factors.total, policy)
    numbers = len(cut.factors.up) + cut.factors.down.shape[1]
    return Spectrum(cut.factors.s[:rank], numbers * cut.layer.dtype.itemsize, module.least)


HEADER = 4096
"""A generous number of bytes for a header besides the tensors' entries and long metadata."""


def _bytes_beside(adapter: Adapter, modules: Sequence[ModuleToCut], limit: int) -> int:
    """The bytes of a file besides its factors: header, metadata, and the tensors that stay.

    Raises: ToolError if they reach the limit.
    """
    kept = [tensor for module in modules for tensor in module.part.slots.values()]
    kept += adapter.words.values()
    cut = sum(module.decompose is not None for module in modules)
    count = sum(tensor.nbytes for tensor in kept) + 4 * cut
    count += sum(len(key) + 2 * len(value) for key, value in adapter.metadata.items())
    count += (3 * cut + len(kept)) * ROOM_PER_TENSOR + HEADER
    if count >= limit:
        raise ToolError(
            f"{limit} bytes do not hold what cannot be made smaller ({count} bytes)", "Allow more."
        )
    return count
