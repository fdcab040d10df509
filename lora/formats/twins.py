"""Several sets of tensors for one module: under two names, or of two adapters. They are never mixed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from lora.errors import LoraUnsupported
from lora.formats.algorithms import recipes
from lora.formats.alphas import RANKED
from lora.formats.names.keys import Target

MAX_SHOWN = 200

AGAIN = " again"
"""What stands behind the adapter's name of a module's second set under the same name."""


class TensorSet(Protocol):
    """One set of tensors for a module: see `contents.Module`."""

    target: Target
    stem: str
    adapter: str
    slots: dict[str, Tensor]


def repeated(sets: Iterable[TensorSet]) -> Iterator[tuple[TensorSet, str]]:
    """The sets that are not to be used, each with the reason: a set that says what another says already, and
    all sets of a module of which one is no whole set.

    Raises: LoraUnsupported if two whole sets say different things: the file holds two LoRAs.
    """
    by_target: dict[Target, list[TensorSet]] = defaultdict(list)
    for one in sets:
        by_target[one.target].append(one)
    for first, *others in by_target.values():
        different = [other for other in others if not _same(first.slots, other.slots)]
        for other in others:
            if other not in different:
                yield other, f"says the same as {_shown(first)}"
        if not different:
            continue
        if all(_is_whole(one.slots) for one in (first, *different)):
            raise LoraUnsupported(
                f"the file holds two LoRAs for the same layers ({_shown(first)} and {_shown(different[0])})",
                "Which of them is meant is not known: keep one of them in the file.",
            )
        for one in (first, *different):
            yield one, f"the file has other tensors for this layer, too, as {_shown(different[0])}"


def _shown(one: TensorSet) -> str:
    adapter = one.adapter.replace(AGAIN, "")[:MAX_SHOWN]
    name = f" of the adapter {adapter!r}" if adapter else ""
    return f"{one.stem[:MAX_SHOWN]}{name}"


def _is_whole(slots: Mapping[str, Tensor]) -> bool:
    used, left = recipes(frozenset(slots))
    return bool(used) and left <= {"alpha"}


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two sets have the same numbers, as far as the coarser of their types can tell."""
    one, other = _scaled(one), _scaled(other)
    if one.keys() != other.keys():
        return False
    return all(_close(tensor, other[slot]) for slot, tensor in one.items())


def _scaled(slots: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The set without an alpha that says no more than its absence: the rank."""
    rank = next((slots[s].shape[0] for s in RANKED if s in slots and slots[s].dim()), 0)
    alpha = slots.get("alpha")
    plain = alpha is not None and alpha.numel() == 1 and float(alpha) in (0, rank)
    return {slot: t for slot, t in slots.items() if slot != "alpha"} if plain else slots


def _close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    steps = [torch.finfo(t.dtype).eps if t.is_floating_point() else 0.0 for t in (one, other)]
    return torch.allclose(one.double(), other.double(), rtol=max(steps), atol=1e-8 * max(steps))
