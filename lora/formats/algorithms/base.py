"""What the engine asks of an algorithm, and how a module's tensors are told apart into algorithms."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Set
from dataclasses import MISSING, dataclass, fields
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from lora.formats.names.keys import Shape


class LowRank(NamedTuple):
    """A change of the form scaling * up @ down, for a layer that can add it to its own output."""

    down: Tensor
    """[rank, in] for a linear layer, [rank, in, kh, kw] for a convolution."""
    up: Tensor
    """[out, rank]."""
    scaling: float


BORROWED = {"borrowed": True}
"""Metadata of a field that an algorithm reads and leaves to the one that owns it: an alpha, a rank."""


@dataclass(frozen=True, eq=False)
class Algorithm(ABC):
    """One layer's part of an adapter: its tensors in named fields, and what they do to a parameter."""

    name: ClassVar[str]
    parameter: ClassVar[str] = "weight"
    """Which parameter of the module it changes."""

    @property
    def rank(self) -> int | None:
        """The inner dimension of the factors; None where there are none."""
        return None

    @abstractmethod
    def misfit(self, shape: Shape) -> str | None:
        """Why this part cannot belong to a parameter of this shape; None if it can."""

    @abstractmethod
    def delta(self, weight: Tensor) -> Tensor:
        """W' - W at scale 1: float32, the parameter's shape, on its device.

        `weight` is the original parameter, [out, in(, kh, kw)] for a weight; it is not changed.
        """

    def companions(self, shape: Shape) -> tuple[Algorithm, ...]:
        """What it also does to other parameters of the module, where that has them; `shape` is its own's."""
        return ()

    @property
    def is_low_rank(self) -> bool:
        """Whether the change is a product of two factors, whatever the weight is."""
        return False

    def low_rank(self) -> LowRank | None:
        """The change as two factors; None where `is_low_rank` is False."""
        return None


def slots_of(algorithm: type[Algorithm], there: Set[str]) -> tuple[tuple[str, ...], frozenset[str]]:
    """Which of the slots that are there an algorithm reads, and which of them become its own.

    Nothing, if one that it needs is missing, or only an alpha would be its own.
    """
    every = fields(algorithm)
    if any(one.name not in there for one in every if one.default is MISSING):
        return (), frozenset()
    reads = [one for one in every if one.name in there]
    used = frozenset(one.name for one in reads if one.metadata != BORROWED)
    return tuple(one.name for one in reads), used if used - {"alpha"} else frozenset()


def scaling(alpha: Tensor | None, rank: int) -> float:
    """alpha / rank; 1 where alpha is missing or 0 (kohya's and LyCORIS' own rule)."""
    value = float(alpha) if alpha is not None else 0.0
    return value / rank if value else 1.0


def placed(tensor: Tensor, weight: Tensor) -> Tensor:
    """The tensor in float32 on the weight's device."""
    return tensor.to(weight.device, torch.float32)


def tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """core [i, j, kh, kw], a [i, out], b [j, in] -> [out, in, kh, kw]."""
    return torch.einsum("ijhw,io,jn->onhw", core, a, b)
