"""What the engine asks of an algorithm."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import ClassVar, TypeVar

from torch import Tensor

from lora.keys import Shape


@dataclass(frozen=True)
class LowRank:
    """A change of the form scaling * up @ down, for a layer that can add it to its own output."""

    down: Tensor
    """[rank, in] for a linear layer, [rank, in, kh, kw] for a convolution."""
    up: Tensor
    """[out, rank]."""
    scaling: float


@dataclass(frozen=True)
class Algorithm(ABC):
    """One layer's part of an adapter: its tensors in named fields, and what they do to the weight."""

    name: ClassVar[str]

    @property
    @abstractmethod
    def rank(self) -> int:
        """The inner dimension of the factors."""

    @abstractmethod
    def misfit(self, shape: Shape) -> str | None:
        """Why this part cannot belong to a weight of this shape; None if it can."""

    @abstractmethod
    def delta(self, weight: Tensor) -> Tensor:
        """The change of the weight at scale 1: float32, the weight's shape, on its device."""

    def low_rank(self) -> LowRank | None:
        """The same change as two factors, where it has that form."""
        return None


AnyAlgorithm = TypeVar("AnyAlgorithm", bound=Algorithm)


def takes(algorithm: type[Algorithm], slots: Mapping[str, Tensor]) -> bool:
    """Whether these slots are all that the algorithm needs and none that it does not know."""
    every = {f.name for f in fields(algorithm)}
    needed = {f.name for f in fields(algorithm) if f.default is MISSING}
    return needed <= slots.keys() <= every


def scaling(alpha: Tensor | None, rank: int) -> float:
    """alpha / rank; 1 where alpha is missing or 0 (kohya's and LyCORIS' own rule)."""
    value = float(alpha) if alpha is not None else 0.0
    return value / rank if value else 1.0
