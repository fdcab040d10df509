"""torch.compile: another LoRA runs the graphs that are there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora.engine.engine import LoraEngine
from lora.engine.stack import LoraUse, Mode, Stack
from lora.formats.adapter import LoraFile
from lora.formats.names.keys import KeyMap
from tests.adapters import randn
from tests.lora.small import bind
from tests.state import unchanged


class Net(nn.Module):
    """Two linear layers and a convolution, in one graph."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        x = self.conv(image).flatten(2).transpose(1, 2)
        return self.second(torch.nn.functional.silu(self.first(x)))


def net() -> Net:
    root = Net()
    for index, parameter in enumerate(root.parameters()):
        parameter.data = 0.3 * randn(*parameter.shape, seed=50 + index)
    return root.eval()


def lora(key_map: KeyMap, rank: int, seed: int = 0, layers: str = "conv first second") -> LoraFile:
    tensors = {}
    for index, name in enumerate(layers.split()):
        down = (rank, 4, 3, 3) if name == "conv" else (rank, 8)
        tensors[f"unet.{name}.lora_A.weight"] = randn(*down, seed=seed + 2 * index)
        up = (8, rank, 1, 1) if name == "conv" else (8, rank)
        tensors[f"unet.{name}.lora_B.weight"] = randn(*up, seed=seed + 2 * index + 1)
    return bind(tensors, key_map)


def loha(key_map: KeyMap, seed: int) -> LoraFile:
    shapes = {"hada_w1_a": (8, 2), "hada_w1_b": (2, 8), "hada_w2_a": (8, 2), "hada_w2_b": (2, 8)}
    return bind(
        {f"unet.first.{n}": randn(*s, seed=seed + i) for i, (n, s) in enumerate(shapes.items())},
        key_map,
    )


@dataclass
class Compiled:
    """A compiled net, and how often the compiler was asked for a graph."""

    root: Net
    engine: LoraEngine
    graphs: int = 0
    call: Callable[..., Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.call = torch.compile(self.root, backend=self._compile, fullgraph=True)

    def _compile(self, graph: torch.fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward

    @torch.no_grad()
    def check(self, stack: Stack, mode: Mode) -> int:
        """The output is a fresh engine's; how many graphs it took."""
        before, image = self.graphs, randn(2, 4, 4, 4, seed=9)
        with unchanged(self.root), self.engine.applied(stack, mode):
            result = self.call(image)
        twin = net()
        with LoraEngine({"unet": twin}).applied(stack, mode):
            torch.testing.assert_close(result, twin(image), rtol=1e-4, atol=1e-4)
        return self.graphs - before


@pytest.fixture
def compiled() -> Iterator[Compiled]:
    torch.compiler.reset()
    root = net()
    yield Compiled(root, LoraEngine({"unet": root}))
    torch.compiler.reset()


def test_merged_stacks_share_the_graph_without_a_lora(compiled: Compiled) -> None:
    names = compiled.engine.key_map
    assert compiled.check([], Mode.MERGED) == 1
    stacks = [
        [LoraUse(lora(names, 2))],
        [LoraUse(lora(names, 4, seed=20), 0.5)],
        [LoraUse(loha(names, seed=40))],
        [LoraUse(lora(names, 2, layers="second")), LoraUse(loha(names, seed=60), -1.0)],
        [],
    ]
    assert [compiled.check(stack, Mode.MERGED) for stack in stacks * 2] == [0] * 10


def test_dynamic_stacks_share_a_graph_per_rank(compiled: Compiled) -> None:
    names = compiled.engine.key_map
    one, other = lora(names, 2), lora(names, 2, seed=20)
    assert compiled.check([LoraUse(one)], Mode.DYNAMIC) == 1
    assert compiled.check([LoraUse(one, 0.5)], Mode.DYNAMIC) == 0  # another scale
    assert compiled.check([LoraUse(other)], Mode.DYNAMIC) == 0  # another adapter of this rank
    assert compiled.check([LoraUse(other, -3.0)], Mode.DYNAMIC) == 0
    for rank in (4, 6, 8):
        # From the third rank on the compiler takes the rank for a variable, and may need none.
        assert compiled.check([LoraUse(lora(names, rank))], Mode.DYNAMIC) <= 1
        assert compiled.check([LoraUse(lora(names, rank, seed=30), 2.0)], Mode.DYNAMIC) == 0
    assert compiled.check([LoraUse(one, 0.1)], Mode.DYNAMIC) == 0


def test_dynamic_stacks_of_several_adapters_share_a_graph_per_sum_of_ranks(
    compiled: Compiled,
) -> None:
    names = compiled.engine.key_map
    a, b, c = (lora(names, rank, seed=10 * rank) for rank in (2, 4, 6))
    assert compiled.check([LoraUse(c)], Mode.DYNAMIC) == 1
    assert compiled.check([LoraUse(a), LoraUse(b, 0.5)], Mode.DYNAMIC) <= 1
    assert compiled.check([LoraUse(b, 2.0), LoraUse(a, 0.5)], Mode.DYNAMIC) == 0
    assert compiled.check([LoraUse(a), LoraUse(b)], Mode.DYNAMIC) == 0
    assert compiled.check([LoraUse(c, 0.7)], Mode.DYNAMIC) == 0


def test_modes_and_the_bare_model_alternate_without_new_graphs(compiled: Compiled) -> None:
    stack = [LoraUse(lora(compiled.engine.key_map, 2))]
    sequence = [([], Mode.DYNAMIC), (stack, Mode.DYNAMIC), (stack, Mode.MERGED)]
    assert [compiled.check(*each) for each in sequence] == [1, 1, 0]
    assert [compiled.check(*each) for each in sequence * 2] == [0] * 6


def test_a_range_of_steps_alternates_between_two_graphs(compiled: Compiled) -> None:
    image, stack = randn(2, 4, 4, 4), [LoraUse(lora(compiled.engine.key_map, 2), start=0.5)]
    with torch.no_grad(), compiled.engine.applied(stack) as block:
        results = []
        for fraction in (0.0, 0.6, 0.2, 0.9):
            block.at(fraction)
            results.append(compiled.call(image))
    assert compiled.graphs == 2
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])
    assert not torch.allclose(results[0], results[1])


class Block(nn.Module):
    """What a UNet repeats: compiled each by itself, as diffusers' `compile_repeated_blocks` does."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.second(self.first(x)))


class Tower(nn.Module):
    """More blocks than the compiler makes graphs for one function (8)."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(12))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def tower_lora(key_map: KeyMap, rank: int, seed: int) -> LoraFile:
    tensors = {}
    for index in range(12):
        for name in ("first", "second"):
            seed += 2
            stem = f"unet.blocks.{index}.{name}"
            tensors[f"{stem}.lora_A.weight"] = randn(rank, 8, seed=seed)
            tensors[f"{stem}.lora_B.weight"] = 0.1 * randn(8, rank, seed=seed + 1)
    return bind(tensors, key_map)


@pytest.mark.parametrize("mode", [Mode.DYNAMIC, Mode.MERGED])
@torch.no_grad()
def test_blocks_that_are_compiled_each_share_their_graphs(mode: Mode) -> None:
    torch.compiler.reset()
    root, graphs = Tower().eval(), 0

    def compiler(graph: torch.fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    for block in root.blocks:
        block.compile(backend=compiler, fullgraph=True)
    engine, x = LoraEngine({"unet": root}), randn(2, 3, 8)

    def drawn(*files: LoraFile) -> int:
        """How many graphs one call with these adapters took; the output is the uncompiled model's."""
        before = graphs
        stack = [LoraUse(file, 0.7) for file in files]
        with unchanged(root), engine.applied(stack, mode):
            result = root(x)
            with torch.compiler.set_stance("force_eager"):
                torch.testing.assert_close(result, root(x), rtol=1e-4, atol=1e-4)
        return graphs - before

    one, other, wide = (
        tower_lora(engine.key_map, rank, seed) for rank, seed in ((2, 0), (2, 100), (5, 200))
    )
    assert drawn() == 1
    first = drawn(one)
    assert first <= 1
    assert drawn(other) == 0
    assert drawn(wide) <= 1
    assert drawn(one, other) <= 1
    assert [drawn(*files) for files in ((), (one,), (wide,), (other, one))] == [0] * 4
    torch.compiler.reset()
