"""The interface of an algorithm, and how the slots of a module are assigned to algorithms."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Set
from dataclasses import MISSING, dataclass, fields
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from lora.formats.names.slots import Shape


class LowRank(NamedTuple):
    """A change of the form scaling * up @ down, which a layer can add to its output."""

    down: Tensor
    """[rank, in] for a linear layer, [rank, in, kh, kw] for a convolution."""
    up: Tensor
    """[out, rank]."""
    scaling: float


class Flaw(str):
    """A reason that lies in the file alone: its tensors are no layer of any model that we apply."""

    __slots__ = ()


BORROWED = {"borrowed": True}
"""Metadata of a field that an algorithm only reads, since another algorithm uses it: an alpha, a rank."""


@dataclass(frozen=True, eq=False)
class Algorithm(ABC):
    """The tensors of one layer of an adapter in named fields, and what they do to a parameter."""

    name: ClassVar[str]
    parameter: ClassVar[str] = "weight"
    """The parameter of the module that it changes."""

    @property
    def rank(self) -> int | None:
        """The inner dimension of the factors; None where there are none."""
        return None

    @abstractmethod
    def misfit(self, shape: Shape) -> str | None:
        """Why it cannot belong to a parameter of this shape; None if it can. A `Flaw` is no parameter's."""

    @abstractmethod
    def delta(self, weight: Tensor) -> Tensor:
        """W' - W at scale 1: float32, the parameter's shape, on its device.

        `weight` is the original parameter, [out, in(, kh, kw)] for a weight; it is not changed.
        """

    def companions(self, shape: Shape) -> tuple[Algorithm, ...]:
        """Its changes of the module's other parameters, if there are any. `shape`: its own parameter's."""
        return ()

    @property
    def needs_weight(self) -> bool:
        """Whether the change depends on the weight: True, unless an algorithm says that it does not."""
        return True

    @property
    def is_low_rank(self) -> bool:
        """Whether the change is a product of two factors that do not depend on the weight."""
        return False

    def low_rank(self) -> LowRank | None:
        """The change as two factors; None where `is_low_rank` is False."""
        return None


def slots_of(algorithm: type[Algorithm], there: Set[str]) -> tuple[tuple[str, ...], frozenset[str]]:
    """The slots that an algorithm reads, of those that are there, and the ones that no other may use then.

    The latter is empty if a required slot is missing, or if only an alpha would be used.
    """
    slots = fields(algorithm)
    if any(slot.name not in there for slot in slots if slot.default is MISSING):
        return (), frozenset()
    reads = [slot for slot in slots if slot.name in there]
    used = frozenset(slot.name for slot in reads if slot.metadata != BORROWED)
    return tuple(slot.name for slot in reads), used if used - {"alpha"} else frozenset()


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
