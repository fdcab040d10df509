"""Failures while putting back: nothing is forgotten, nothing dirty becomes an original."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora.engine.engine import LoraEngine, RestoreFailed
from lora.engine.originals import Originals
from lora.engine.stack import LoraUse, Mode
from tests.lora.small import adapter, outputs, same, small
from tests.state import State


@pytest.fixture
def root() -> nn.Module:
    return small()


@pytest.fixture
def engine(root: nn.Module) -> LoraEngine:
    return LoraEngine({"unet": root})


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException, times: int) -> list[int]:
    """Lets the next restores fail."""
    restore, calls = Originals.restore, [0]

    def broken(self: Originals, weight: nn.Parameter) -> None:
        calls[0] += 1
        if calls[0] <= times:
            raise error
        restore(self, weight)

    monkeypatch.setattr(Originals, "restore", broken)
    return calls


@pytest.mark.parametrize("error", [RuntimeError("the device failed"), KeyboardInterrupt()])
def test_what_could_not_be_put_back_is_put_back_before_anything_else(
    engine: LoraEngine, root: nn.Module, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    before = State(root)
    expected = RestoreFailed if isinstance(error, Exception) else KeyboardInterrupt
    with monkeypatch.context() as patch:
        failing(patch, error, times=1)
        with pytest.raises(expected), engine.applied([LoraUse(adapter("full"))], Mode.MERGED):
            pass
        with pytest.raises(AssertionError):
            before.assert_same(root)
    with engine.applied([LoraUse(adapter("lora"))], Mode.MERGED):
        pass
    before.assert_same(root)


def test_as_long_as_it_cannot_no_block_is_opened_and_nothing_may_draw(
    engine: LoraEngine, root: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = State(root)
    with monkeypatch.context() as patch:
        failing(patch, RuntimeError(), times=10**6)
        with pytest.raises(RestoreFailed), engine.applied([LoraUse(adapter("full"))], Mode.MERGED):
            pass
        with pytest.raises(RestoreFailed):
            engine.settle()
        with pytest.raises(RestoreFailed), engine.applied([LoraUse(adapter("lora"))]):
            pytest.fail("the block must not be entered")
    engine.settle()
    before.assert_same(root)


def test_a_switch_that_cannot_put_a_weight_back_fails(
    engine: LoraEngine, root: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = State(root)
    with engine.applied([LoraUse(adapter("norms"))], Mode.MERGED) as block:
        with monkeypatch.context() as patch:
            failing(patch, RuntimeError(), times=1)
            with pytest.raises(RestoreFailed):
                block.switch([LoraUse(adapter("lora"))])
        assert same(outputs(root), outputs(small()))
    before.assert_same(root)


def test_a_forward_that_someone_took_away_does_not_keep_weights_from_being_put_back(
    engine: LoraEngine, root: nn.Module
) -> None:
    before = State(root)
    stack = [LoraUse(adapter("lora")), LoraUse(adapter("full")), LoraUse(adapter("norms"))]
    with engine.applied(stack, Mode.DYNAMIC):
        for module in root.modules():
            module.__dict__.pop("forward", None)
    before.assert_same(root)


def test_parameters_that_the_model_dropped_are_not_kept_alive(
    engine: LoraEngine, root: nn.Module
) -> None:
    import gc
    import weakref

    old = []
    for _ in range(3):
        with engine.applied([LoraUse(adapter("full"))], Mode.MERGED):
            pass
        linear = next(m for m in root.modules() if isinstance(m, nn.Linear))
        old.append(weakref.ref(linear.weight))
        linear.weight = nn.Parameter(torch.randn_like(linear.weight))
    engine.prepared.clear()
    gc.collect()
    assert [one() for one in old] == [None] * 3
