"""Rows: one forward, a stack per row; each row as if it were alone, and no trace afterwards."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from lora.engine.engine import EngineBusy, LoraEngine
from lora.engine.row_layer import ROOM
from lora.engine.rows import Rows
from lora.engine.stack import LoraUse, Mode, Stack
from lora.errors import LoraIncompatible, LoraUnsupported
from tests.adapters import randn
from tests.lora.small import DTYPES, NAMES, Small, adapter, bind, poisoned, small

LOW_RANK = ("lora", "locon", "tucker")
CLOSE = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def inputs(rows: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """A different one for each row."""
    return {
        name: randn(rows, *shape[1:], seed=7 + index).to(dtype)
        for index, (name, shape) in enumerate(Small.INPUTS.items())
    }


@torch.no_grad()
def run(root: nn.Module, given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: root.get_submodule(name)(x).float() for name, x in given.items()}


def one_by_one(root: nn.Module, stacks: Sequence[Stack], dtype: torch.dtype) -> dict[str, Tensor]:
    """What the engine's dynamic mode makes of each row alone."""
    engine, given = LoraEngine({"unet": root}), inputs(len(stacks), dtype)
    rows = []
    for row, stack in enumerate(stacks):
        with engine.applied(stack, Mode.DYNAMIC):
            rows.append(run(root, {name: x[row : row + 1] for name, x in given.items()}))
    return {name: torch.cat([each[name] for each in rows]) for name in given}


def same_as_alone(root: nn.Module, rows: Rows, stacks: Sequence[Stack], dtype: torch.dtype) -> bool:
    rows.use(stacks)
    made = run(root, inputs(len(stacks), dtype))
    alone = one_by_one(copy.deepcopy(_bare(root)), stacks, dtype)
    return all(
        torch.allclose(made[n], alone[n], atol=CLOSE[dtype], rtol=CLOSE[dtype]) for n in alone
    )


def _bare(root: nn.Module) -> nn.Module:
    bare = small(next(root.parameters()).dtype)
    bare.load_state_dict(root.state_dict())
    return bare


def is_untouched(root: nn.Module) -> bool:
    fresh = small(next(root.parameters()).dtype).state_dict()
    values = root.state_dict()
    return all(torch.equal(values[name], fresh[name]) for name in fresh) and not any(
        "forward" in module.__dict__ for module in root.modules()
    )


def mixed() -> list[Stack]:
    lora, other = adapter("lora"), adapter("lora", 1)
    return [
        [],
        [LoraUse(lora)],
        [LoraUse(other, -0.5)],
        [LoraUse(lora, 0.25), LoraUse(other, 2.0), LoraUse(adapter("locon"))],
        [LoraUse(lora, 0.0)],
        [LoraUse(adapter("tucker"), 1.5), LoraUse(lora, components={"unet": 0.5})],
        [LoraUse(lora), LoraUse(lora, 0.5)],
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_row_is_what_it_would_be_alone(dtype: torch.dtype) -> None:
    root = small(dtype)
    rows = Rows(LoraEngine({"unet": root}))
    with rows.opened():
        assert same_as_alone(root, rows, mixed(), dtype)
        assert same_as_alone(root, rows, mixed()[3:5], dtype)
        assert same_as_alone(root, rows, mixed()[::-1], dtype)
    assert is_untouched(root)


def test_without_adapters_no_forward_is_replaced() -> None:
    root = small()
    rows = Rows(LoraEngine({"unet": root}))
    with rows.opened():
        rows.use([[], [LoraUse(adapter("lora"))]])
        assert "forward" in root.linear.__dict__ and "forward" not in root.conv.__dict__
        rows.use([[], [LoraUse(adapter("lora"), 0.0)]])
        assert is_untouched(root)
        rows.use([[LoraUse(adapter("locon"))]])
        assert "forward" in root.conv.__dict__ and "forward" not in root.linear.__dict__


def test_a_batch_costs_two_products_however_many_adapters_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = small()
    rows = Rows(LoraEngine({"unet": root}))
    calls: list[str] = []
    linear = nn.functional.linear

    def counted(*given: Tensor) -> Tensor:
        calls.append("linear")
        return linear(*given)

    with rows.opened():
        rows.use([[LoraUse(adapter("lora", seed), 1.0 + seed)] for seed in range(6)])
        monkeypatch.setattr("torch.nn.functional.linear", counted)
        with torch.no_grad():
            root.linear(inputs(6, torch.float32)["linear"])
    assert calls == ["linear", "linear"]  # the layer's own, and `down`


def test_an_adapter_that_arrives_moves_no_other_and_one_that_leaves_makes_room() -> None:
    root = small()
    rows = Rows(LoraEngine({"unet": root}), budget=10**9)
    files = [adapter("lora", seed) for seed in range(40)]
    with rows.opened():
        for count in (1, 3, 40):  # beyond the buffers' first room
            stacks: list[Stack] = [[LoraUse(file)] for file in files[:count]]
            assert same_as_alone(root, rows, stacks, torch.float32)
        assert ROOM < 40 * 2
        rows.use([[LoraUse(files[5])]])
        with pytest.raises(ValueError, match="under way"):
            rows.remove(files[5].identity)
        rows.remove(files[3].identity)
        rows.place(adapter("lora", 99))  # into the gap
        mixture: list[Stack] = [[LoraUse(files[5])], [LoraUse(adapter("lora", 99))]]
        assert same_as_alone(root, rows, mixture, torch.float32)
        assert same_as_alone(root, rows, [[LoraUse(files[3])]], torch.float32)


def test_beyond_the_budget_the_one_used_longest_ago_leaves() -> None:
    root, files = small(), [adapter("lora", seed) for seed in range(6)]
    engine = LoraEngine({"unet": root})
    rows = Rows(engine)
    rows.place(files[0])
    one = rows.size
    rows = Rows(engine, budget=2 * one)
    with rows.opened():
        for first, second in pairwise(files):
            assert same_as_alone(root, rows, [[LoraUse(first)], [LoraUse(second)]], torch.float32)
            assert rows.size == 2 * one
        # a batch that needs more than the budget gets it
        stacks: list[Stack] = [[LoraUse(file)] for file in files]
        assert same_as_alone(root, rows, stacks, torch.float32)
    assert is_untouched(root)


def test_an_adapter_is_placed_bit_by_bit_and_others_are_served_between(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lora.engine.rows.AT_ONCE", 1)
    root = small()
    rows = Rows(LoraEngine({"unet": root}))
    first, second, third = (adapter("lora", seed) for seed in range(3))
    with rows.opened():
        calls = 0
        while not rows.place_for(second, 0.0):
            calls += 1
            assert same_as_alone(root, rows, [[LoraUse(first)], []], torch.float32)
        assert calls == len(second.layers)
        size = rows.size
        assert same_as_alone(root, rows, [[LoraUse(first)], [LoraUse(second)]], torch.float32)
        assert rows.size == size and rows.place_for(second, 0.0)
        assert not rows.place_for(third, 0.0)
        assert rows.place_for(first, 0.0)  # what was begun is undone
        assert all(third.identity not in layer.columns for layer in rows._layers.values())
        assert not rows.place_for(third, 0.0)
        assert same_as_alone(root, rows, [[LoraUse(third)], [LoraUse(first)]], torch.float32)
    assert is_untouched(root)


def test_placing_bit_by_bit_fails_as_placing_does() -> None:
    rows = Rows(LoraEngine({"unet": small()}))
    for _ in range(2):
        with pytest.raises(LoraUnsupported, match="cannot share"):
            rows.place_for(adapter("loha"), 1.0)
    with pytest.raises(Exception):  # noqa: B017
        while not rows.place_for(poisoned(adapter("lora"), low=True), 0.0):
            pass
    assert rows.size == 0 and not any(layer.columns for layer in rows._layers.values())


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(LOW_RANK)))
def test_what_is_not_low_rank_has_no_place_in_a_batch(name: str) -> None:
    root = small()
    rows = Rows(LoraEngine({"unet": root}))
    assert rows.misfit(adapter(name))
    with rows.opened(), pytest.raises(LoraUnsupported, match="cannot share a batch"):
        rows.use([[LoraUse(adapter("lora"))], [LoraUse(adapter(name))]])
    assert is_untouched(root)


def test_a_failure_leaves_no_row_with_an_adapter() -> None:
    root = small()
    rows = Rows(LoraEngine({"unet": root}))
    with rows.opened():
        rows.use([[LoraUse(adapter("lora"))]])
        with pytest.raises(Exception):  # noqa: B017
            rows.use([[LoraUse(poisoned(adapter("lora"), low=True))]])
        assert is_untouched(root)
        assert same_as_alone(root, rows, mixed(), torch.float32)
        with pytest.raises(LoraIncompatible, match="overflows"):
            rows.use([[LoraUse(adapter("lora"), 1e300)]])
        assert is_untouched(root)


def test_another_rows_infinities_do_not_reach_a_row_in_half_precision() -> None:
    root = small(torch.float16)
    tensors = {
        "unet.linear.lora_A.weight": torch.full((2, 12), 6e4),
        "unet.linear.lora_B.weight": torch.full((8, 2), 1e-7),
    }
    rows = Rows(engine := LoraEngine({"unet": root}))
    huge = bind(tensors, engine.key_map)
    rows._layers.clear()
    with rows.opened():
        rows.place(huge)
        layer = next(iter(rows._layers.values()))
        layer._down, layer._up = layer._down.half(), layer._up.half()  # as it is on a GPU
        rows.use([[], [LoraUse(huge)]])
        assert next(iter(layer.added.scales.flatten())).dtype is torch.float16
        given = torch.full((2, 3, 12), 10.0, dtype=torch.float16)
        with torch.no_grad():
            out = root.linear(given)
    fresh = small(torch.float16)
    with torch.no_grad():
        assert torch.allclose(out[0], fresh.linear(given)[0], atol=1e-2)


def test_a_model_that_mixes_rows_is_refused() -> None:
    root = small()
    rows = Rows(LoraEngine({"unet": root}))
    with rows.opened():
        rows.use([[LoraUse(adapter("lora"))], []])
        with pytest.raises(LoraUnsupported, match="mixes the rows"):
            root.linear(torch.zeros(6, 12))


def test_rows_and_a_stack_applied_alone_keep_each_other_out() -> None:
    root = small()
    engine = LoraEngine({"unet": root})
    rows = Rows(engine)
    with rows.opened():
        rows.use([[LoraUse(adapter("lora"))]])
        with pytest.raises(EngineBusy), engine.applied([LoraUse(adapter("loha"))]):
            pass
    alone = engine.applied([LoraUse(adapter("loha"))])
    with alone, pytest.raises(EngineBusy), rows.opened():
        pass
    with rows.opened():
        assert same_as_alone(root, rows, mixed(), torch.float32)
    assert is_untouched(root)


def test_an_exception_within_the_block_leaves_no_trace() -> None:
    root = small()
    rows = Rows(LoraEngine({"unet": root}))
    with pytest.raises(KeyboardInterrupt), rows.opened():
        rows.use(mixed())
        raise KeyboardInterrupt
    assert is_untouched(root)
