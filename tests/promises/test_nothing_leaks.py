"""The restore matrix: every algorithm, every way out of a block, every precision: bit for bit the same."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora.engine.engine import Budgets, EngineBusy, LoraEngine
from lora.engine.stack import LoraUse, Mode, Stack
from lora.formats.adapter import LoraFile
from tests.lora.small import (
    DTYPES,
    MODES,
    NAMES,
    Poisoned,
    adapter,
    as_fresh,
    outputs,
    poisoned,
    same,
    small,
)
from tests.state import unchanged
from tests.waiting import PATIENCE


def matrix(test: Callable[..., None]) -> Callable[..., None]:
    """Every algorithm x both modes x every precision."""
    test = pytest.mark.parametrize("name", NAMES)(test)
    test = pytest.mark.parametrize("mode", MODES)(test)
    return pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[-1])(test)


def tensors_in(file: LoraFile) -> list[Tensor]:
    found = []
    for layer in file.layers:
        inner = getattr(layer.algorithm, "inner", layer.algorithm)
        found += [v for part in (layer.algorithm, inner) for v in vars(part).values()]
    return [value for value in found if isinstance(value, Tensor)]


@matrix
def test_after_a_normal_exit(name: str, mode: Mode, dtype: torch.dtype) -> None:
    root, file = small(dtype), adapter(name)
    engine, plain = LoraEngine({"unet": root}), outputs(root)
    before = [tensor.clone() for tensor in tensors_in(file)]
    for _ in range(2):  # the second time from what was kept
        with unchanged(root), engine.applied([LoraUse(file, 0.7)], mode):
            assert not same(plain, outputs(root))
        assert same(plain, outputs(root))
    assert all(map(torch.equal, before, tensors_in(file)))


@matrix
def test_after_an_error_in_the_body(name: str, mode: Mode, dtype: torch.dtype) -> None:
    root = small(dtype)
    engine = LoraEngine({"unet": root})
    for error in (KeyError, KeyboardInterrupt):
        with (
            unchanged(root),
            pytest.raises(error),
            engine.applied([LoraUse(adapter(name), -2.0)], mode),
        ):
            raise error


@matrix
def test_after_applying_failed_midway(name: str, mode: Mode, dtype: torch.dtype) -> None:
    root = small(dtype)
    engine = LoraEngine({"unet": root})
    for low in (True, False):
        stack = [LoraUse(poisoned(adapter(name), low=low))]
        with unchanged(root), pytest.raises(Poisoned), engine.applied(stack, mode):
            pytest.fail("the block must not be entered")


@matrix
def test_with_two_adapters_on_one_layer(name: str, mode: Mode, dtype: torch.dtype) -> None:
    root = small(dtype)
    engine = LoraEngine({"unet": root})
    stack = [
        LoraUse(adapter(name), 0.7),
        LoraUse(adapter(name, seed=1), -0.4),
        LoraUse(adapter("lora"), 1.5),
    ]
    with unchanged(root), engine.applied(stack, mode):
        pass


@matrix
def test_after_a_switch(name: str, mode: Mode, dtype: torch.dtype) -> None:
    root, other = small(dtype), adapter("full" if name != "full" else "glora", seed=2)
    engine, first = LoraEngine({"unet": root}), [LoraUse(adapter(name))]
    second = [LoraUse(other, 0.5)]
    with unchanged(root), engine.applied(first, mode) as block:
        block.switch(second)
        assert same(outputs(root), as_fresh(small(dtype), second, mode))
        block.switch(first)
        assert same(outputs(root), as_fresh(small(dtype), first, mode))


@matrix
def test_after_a_switch_that_failed_midway(name: str, mode: Mode, dtype: torch.dtype) -> None:
    root = small(dtype)
    engine, first = LoraEngine({"unet": root}), [LoraUse(adapter("lora")), LoraUse(adapter("loha"))]
    for low in (True, False):
        with unchanged(root), engine.applied(first, mode) as block:
            with pytest.raises(Poisoned):
                block.switch([LoraUse(poisoned(adapter(name), low=low), 0.5)])
            assert same(outputs(root), outputs(small(dtype)))
            block.switch(first)
            assert same(outputs(root), as_fresh(small(dtype), first, mode))


@pytest.mark.parametrize("name", NAMES)
def test_both_modes_mean_what_the_delta_says(name: str) -> None:
    file = adapter(name)
    expected = small()
    for layer in file.layers:
        parameter = expected.get_submodule(layer.target.path).get_parameter(layer.parameter)
        original = small().get_submodule(layer.target.path).get_parameter(layer.parameter)
        parameter.data += 0.7 * layer.algorithm.delta(original.detach())
    for mode in MODES:
        torch.testing.assert_close(
            as_fresh(small(), [LoraUse(file, 0.7)], mode), outputs(expected), rtol=1e-4, atol=1e-4
        )


def test_of_two_threads_that_ask_at_once_one_is_refused_and_nothing_is_harmed() -> None:
    root = small()
    engine = LoraEngine({"unet": root})
    barrier, answers = threading.Barrier(2), []

    def ask() -> None:
        barrier.wait()
        try:
            with engine.applied([LoraUse(adapter("loha"))], Mode.MERGED):
                barrier.wait(PATIENCE)  # the other one has been refused
                answers.append("applied")
        except EngineBusy:
            answers.append("busy")
            barrier.wait(PATIENCE)

    with unchanged(root):
        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(answers) == ["applied", "busy"]
    with engine.applied([]), pytest.raises(EngineBusy):
        engine.free()
    engine.free()


# --- random lives of an engine ----------------------------------------------------------------------

BAD = "bad"
FILES = ("lora", "locon", "loha", "dora", "full", "lora_bias", "norms")
Wanted = tuple[str, float, tuple[float, float]]

WHOLE = (0.0, 1.0)
USES = st.tuples(
    st.sampled_from(FILES),
    st.sampled_from((1.0, 0.0, -0.5, 2.0)),
    st.sampled_from((WHOLE, WHOLE, (0.0, 0.5), (0.5, 1.0))),
)
STACKS = st.lists(USES, max_size=3).map(tuple)
MODE = st.sampled_from(MODES)
INSIDE = st.one_of(
    st.tuples(st.just("switch"), STACKS, MODE),
    st.tuples(st.just("fail"), STACKS, MODE, st.booleans()),
    st.tuples(st.just("at"), st.sampled_from((0.0, 0.3, 0.5, 0.9, 1.0))),
)
BLOCKS = st.tuples(STACKS, MODE, st.lists(INSIDE, max_size=4), st.booleans())
BUDGETS = (
    Budgets(),
    Budgets(0, 0),
    Budgets(originals=300),
    Budgets(prepared=3000),
    Budgets(700, 1500),
)


def to_stack(wanted: tuple[Wanted, ...], mode: Mode) -> Stack:
    """Ranges are for the dynamic mode."""
    return [
        LoraUse(adapter(name), scale, start=span[0], end=span[1])
        if mode is Mode.DYNAMIC
        else LoraUse(adapter(name), scale)
        for name, scale, span in wanted
    ]


@cache
def expected(wanted: tuple[Wanted, ...], mode: Mode, fraction: float) -> dict[str, Tensor]:
    held = [
        LoraUse(adapter(name), scale)
        for name, scale, (start, end) in wanted
        if mode is Mode.MERGED or (start <= fraction and (fraction < end or end == 1.0))
    ]
    return as_fresh(small(), held, mode)


class Life:
    """An engine, and what must be applied in it now."""

    def __init__(self, budgets: Budgets) -> None:
        self.root = small()
        self.engine = LoraEngine({"unet": self.root}, budgets)
        self.now: tuple[tuple[Wanted, ...], Mode, float] | None = None

    def check(self) -> None:
        torch.testing.assert_close(
            outputs(self.root),
            expected(*self.now) if self.now else outputs(small()),
            rtol=1e-5,
            atol=1e-5,
        )

    def block(self, wanted: tuple[Wanted, ...], mode: Mode, steps: list, fails: bool) -> None:
        with self.engine.applied(to_stack(wanted, mode), mode) as block:
            self.now = (wanted, mode, 0.0)
            self.check()
            for action, *arguments in steps:
                if action == "switch":
                    block.switch(to_stack(*arguments), arguments[1])
                    self.now = (*arguments, 0.0)
                elif action == "fail":
                    stack = [
                        *to_stack(*arguments[:2]),
                        LoraUse(poisoned(adapter("loha"), low=arguments[2])),
                    ]
                    with pytest.raises(Poisoned):
                        block.switch(stack, arguments[1])
                    self.now = None
                elif self.now:
                    block.at(*arguments)
                    self.now = (*self.now[:2], *arguments)
                self.check()
            if fails:
                raise Poisoned


@given(st.lists(BLOCKS | st.none(), min_size=1, max_size=4), st.sampled_from(BUDGETS))
@settings(max_examples=500, deadline=None)
def test_no_sequence_leaves_a_trace_or_reaches_stale_weights(
    blocks: list[tuple | None], budgets: Budgets
) -> None:
    life = Life(budgets)
    with unchanged(life.root):
        for block in blocks:
            if block is None:
                life.engine.free()
                continue
            try:
                life.block(*block)
            except Poisoned:
                assert block[-1]
        life.now = None
        life.check()
