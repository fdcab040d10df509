"""Layers cut to the rank that a policy chooses, and what that costs each of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora.errors import ToolError
from lora.tools import OnProgress, ignore_progress
from lora.tools.adapters.parts import Adapter, Part, rank_metadata
from lora.tools.factors.lowrank import Product, decompose, squared_norm
from lora.tools.factors.ranks import RankPolicy, Spectrum, choose, spend
from lora.tools.factors.svd import Factors, energy, svd_by_policy

BUDGET_RANK = 128
"""How many singular values of a whole matrix a budget chooses among, unless the policy's `max_rank` says it:
finding all of them takes as long as a full decomposition.
"""


@dataclass(frozen=True)
class LayerChange:
    """What became of one layer's change, D."""

    name: str
    before: int | None
    """The rank that it had; None where it was no product."""
    rank: int
    energy: float
    """||D||_F^2."""
    kept: float
    """The share of it that the rank keeps: 1 - (dropped singular values squared) / ||D||_F^2."""
    error: float
    """||D - D'||_F^2, D' what the numbers that are stored give, as they were rounded."""

    @property
    def relative_error(self) -> float:
        """||D - D'||_F / ||D||_F."""
        return math.sqrt(self.error / self.energy) if self.energy else 0.0


@dataclass(frozen=True)
class Report:
    """What a tool did to an adapter."""

    changes: tuple[LayerChange, ...]
    """The layers that were approximated; all others are as they were, number by number."""
    layers: int
    """How many modules the result has."""
    unused: tuple[tuple[str, str], ...] = ()
    """(key, reason) of the tensors that were left out, as was allowed."""

    @property
    def energy(self) -> float:
        """||D||_F^2 over the layers that were approximated."""
        return math.fsum(change.energy for change in self.changes)

    @property
    def relative_error(self) -> float:
        """||D - D'||_F / ||D||_F over them, after rounding."""
        error = math.fsum(change.error for change in self.changes)
        return math.sqrt(error / self.energy) if self.energy else 0.0


@dataclass(frozen=True)
class Layer:
    """A layer that is to be cut."""

    name: str
    before: int | None
    """The rank that it has; None where it is no product."""
    dtype: torch.dtype
    """Of the result."""


def report_of(result: Adapter, changes: Sequence[LayerChange], inputs: Sequence[Adapter]) -> Report:
    """What is told of a result."""
    unused = tuple((one.key, one.reason) for adapter in inputs for one in adapter.unused)
    return Report(tuple(changes), len(result.parts), unused)


@dataclass(frozen=True, eq=False)
class Cut:
    """A layer on its way to a smaller rank."""

    layer: Layer
    factors: Factors
    kernel: tuple[int, ...]
    """The axes of the layer's weight behind the outputs."""
    missed: float = 0.0
    """The energy of the layer's change that is not in `factors`; it is orthogonal to them."""

    @classmethod
    def of_product(cls, layer: Layer, product: Product) -> Cut:
        """Of a change that is a product already: its decomposition is exact."""
        return cls(layer, decompose(product), product.kernel)

    @classmethod
    def of_matrix(
        cls, layer: Layer, matrix: Tensor, kernel: tuple[int, ...], policy: RankPolicy, seed: int
    ) -> Cut:
        """Of a whole matrix, [out, in * kh * kw]: as many singular values as the policy may choose."""
        if policy.max_bytes is not None and policy.max_rank is None:
            policy = replace(policy, max_rank=BUDGET_RANK)
        factors = svd_by_policy(matrix, policy, seed)
        up, down = factors.balanced()
        return cls(layer, factors, kernel, energy(torch.addmm(matrix, up, down, alpha=-1)))

    def at(self, rank: int) -> tuple[dict[str, Tensor], LayerChange]:
        """Its tensors at a rank, 0 for none, and the error that they have as stored.

        ||D - D'||^2 is ||D - D_r||^2, from the dropped singular values, plus ||D_r - D'||^2, the rounding,
        measured: they are orthogonal up to the product of two roundings, as D - D_r is to whatever has D_r's
        columns or its rows.
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
class Module:
    """One module of an adapter, on its way into another."""

    part: Part
    """What of it stays, and its names."""
    decompose: Callable[[], Cut] | None = None
    """What of it is to become factors of a chosen rank."""
    least: int = 0
    """The rank that it needs at least."""
    uncut: Part | None = None
    """The whole of it as it was, for a rank that it has already."""

    def at(self, cut: Cut, rank: int) -> tuple[Part | None, LayerChange | None]:
        """The part at a rank, None if nothing is left of it, and what that did to it."""
        rank = max(rank, self.least)
        if self.uncut is not None and cut.layer.before is not None and rank >= cut.layer.before:
            return self.uncut, None
        slots, change = cut.at(rank)
        slots |= self.part.slots
        return (replace(self.part, slots=slots) if slots else None), change


def cut_modules(
    adapter: Adapter,
    modules: Sequence[Module],
    policy: RankPolicy | None,
    on_progress: OnProgress = ignore_progress,
) -> tuple[Adapter, list[LayerChange]]:
    """The adapter with these modules, each at the rank that the policy chooses for it, and what that did to
    each of them. A module that nothing is left of is told, and not in it.

    One layer is in memory at a time: with a budget in bytes, each is decomposed twice. Raises: ToolError if
    the budget does not even hold what is not cut, or a factor overflows its dtype.
    """
    thin = [one for one in modules if one.decompose]
    budget = policy is not None and policy.max_bytes is not None
    total = len(modules) + (len(thin) if budget else 0)
    ranks: Iterator[int] | None = None
    if policy is not None and policy.max_bytes is not None and thin:
        spectra = []
        for done, one in enumerate(thin):
            on_progress(done, total, one.part.name)
            spectra.append(_spectrum(one, policy))
        left = policy.max_bytes - _bytes_beside(adapter, modules, policy.max_bytes)
        ranks = iter(spend(spectra, left))
    parts: list[Part] = []
    changes: list[LayerChange] = []
    for done, one in enumerate(modules, total - len(modules)):
        on_progress(done, total, one.part.name)
        part: Part | None = one.part if one.part.slots else None
        if one.decompose and policy is not None:
            cut = one.decompose()
            rank = next(ranks) if ranks else choose(cut.factors.s, cut.factors.total, policy)
            part, change = one.at(cut, rank)
            changes += [change] if change else []
        parts += [part] if part else []
    on_progress(total, total, "")
    metadata = {**adapter.metadata, **rank_metadata(parts)}
    return replace(adapter, parts=tuple(parts), metadata=metadata), changes


def _spectrum(module: Module, policy: RankPolicy) -> Spectrum:
    if module.decompose is None:
        raise ValueError("the module is not to be cut")
    cut = module.decompose()
    rank = choose(cut.factors.s, cut.factors.total, policy)
    numbers = len(cut.factors.up) + cut.factors.down.shape[1]
    return Spectrum(cut.factors.s[:rank], numbers * cut.layer.dtype.itemsize)


HEADER_PER_TENSOR, HEADER = 200, 4096
"""Bytes that a tensor's entry in a file takes, generously, and the rest of a header without long metadata."""


def _bytes_beside(adapter: Adapter, modules: Sequence[Module], limit: int) -> int:
    """What the file takes beside the factors: headers, metadata, and the tensors that stay.

    Raises: ToolError if that is the limit or more.
    """
    kept = [tensor for one in modules for tensor in one.part.slots.values()]
    kept += adapter.words.values()
    cut = sum(one.decompose is not None for one in modules)
    bytes_of_tensors = sum(tensor.nbytes for tensor in kept) + 4 * cut
    text = sum(len(key) + 2 * len(value) for key, value in adapter.metadata.items())
    found = bytes_of_tensors + (3 * cut + len(kept)) * HEADER_PER_TENSOR + HEADER + text
    if found >= limit:
        raise ToolError(
            f"{limit} bytes do not hold what cannot be made smaller ({found} bytes)", "Allow more."
        )
    return found
