"""For tests of formats: reads a file with every key accounted for, and compares what it does to a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lora.engine.engine import LoraEngine
from lora.formats.adapter import LoraFile, load
from lora.formats.algorithms import Algorithm, recipes
from lora.formats.names.slots import Shape
from tests.adapters import randn, write

NOT_VARIED = ("alpha", "neumann_terms", "bias_size")
"""Fields that are checked before `misfit`, or say nothing of a shape."""


@dataclass(frozen=True)
class Taken:
    """A part, and the slots that belong to it alone."""

    part: Algorithm
    used: frozenset[str]


def parts_of(slots: Mapping[str, Tensor]) -> list[Taken]:
    """The parts that one layer's tensors make up."""
    found, _ = recipes(frozenset(slots))
    return [Taken(recipe.make(slots), frozenset(recipe.used)) for recipe in found]


def bind(
    engine: LoraEngine,
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: str | None = None,
    metadata: dict[str, str] | None = None,
) -> LoraFile:
    """The file as the engine sees it; the used and the unused keys are the whole of it."""
    path = write(folder / "adapter.safetensors", dict(tensors), metadata)
    file = load(path, engine.key_map, sha256="a", config=config)
    assert file.keys + len(file.unused) == len(tensors)
    assert {one.key for one in file.unused} <= tensors.keys()
    return file


def snapshot(components: Mapping[str, nn.Module]) -> dict[tuple[str, str], Tensor]:
    """Every parameter's values, by component and path."""
    return {
        (component, path): value.detach().clone()
        for component, root in components.items()
        for path, value in root.named_parameters(remove_duplicate=False)
    }


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())


def assert_delta(part: Algorithm, weight: Tensor, merged: Tensor, limit: float = 1e-6) -> None:
    """`merged` is W' in float64; the part's delta must be W' - W, in float32, and W untouched."""
    before = weight.clone()
    assert part.misfit(tuple(weight.shape)) is None
    delta = part.delta(weight)
    assert delta.dtype == torch.float32
    assert relative_error(delta, merged - weight.double()) < limit
    assert torch.equal(weight, before)


def assert_misfits_are_told(part: Algorithm, shape: Shape) -> None:
    """Whatever a file holds, `misfit` says why it does not fit or `delta` works; neither raises."""
    assert part.misfit(shape) is None
    assert part.misfit(tuple(n + 7 for n in shape))
    others = {(5,), (1,), shape[:1], shape[::-1], (*shape, 1), (*shape[:2], 3, 3), (*shape[:2], 5)}
    for other in others:
        _told_or_works(part, other)
    bad_shapes: list[Shape] = [(), (1,), (7,), (3, 7), (2, 3, 5), (2, 3, 5, 7), (2, 3, 5, 7, 2)]
    for field in fields(part):
        value = getattr(part, field.name)
        if isinstance(value, Tensor) and field.name not in NOT_VARIED:
            bad = [torch.ones(s).to(value.dtype) for s in bad_shapes]
            for tensor in (*bad, value[..., None], value.flatten(), value.movedim(0, -1)):
                _told_or_works(replace(part, **{field.name: tensor}), shape)


def _told_or_works(part: Algorithm, shape: Shape) -> None:
    sentence = part.misfit(shape)
    if sentence is None:
        assert part.delta(randn(*shape)).shape == shape
    else:
        assert len(sentence.split()) > 2
