"""Another strength of the same adapters costs no plan, and what it made on its way is not kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lora.engine.engine import Budgets, LoraEngine
from lora.engine.prepared import VARIANTS
from lora.engine.stack import LoraUse, Mode
from lora.formats.adapter import LoraFile
from tests.adapters import SELF_ATTENTION, kohya, loha, randn
from tests.lora.engine.test_engine import parse
from tests.state import unchanged


@pytest.fixture
def files(engine: LoraEngine, tmp_path: Path) -> list[LoraFile]:
    return [
        parse(engine, tmp_path, kohya(seed=0), "a"),
        parse(engine, tmp_path, kohya(seed=10), "b"),
        parse(engine, tmp_path, loha(seed=5), "c"),
    ]


def weight_of(unet: nn.Module) -> torch.Tensor:
    return unet.get_submodule(SELF_ATTENTION).weight.detach().clone()


def count_plans(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    from lora.engine import engine as module

    made, real = list[int](), module.make_plan
    monkeypatch.setattr(module, "make_plan", lambda *given: made.append(1) or real(*given))
    return made


@pytest.mark.parametrize("mode", [Mode.DYNAMIC, Mode.MERGED])
def test_a_changed_strength_needs_no_new_plan(
    engine: LoraEngine,
    unet: nn.Module,
    files: list[LoraFile],
    mode: Mode,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, x = count_plans(monkeypatch), randn(2, 7, 64)
    module, seen = unet.get_submodule(SELF_ATTENTION), {}
    scales = (1.0, 0.5, 2.0, -1.0, 0.5)
    with torch.no_grad(), unchanged(unet), engine.applied([], mode) as block:
        made.clear()
        for scale in scales:
            block.switch([LoraUse(file, scale) for file in files])
            seen[scale] = module(x)
    assert len(made) == 1
    for scale in scales:
        fresh = LoraEngine({"unet": unet})  # knows nothing of what was before
        with torch.no_grad(), fresh.applied([LoraUse(file, scale) for file in files], mode):
            assert torch.equal(module(x), seen[scale])


def test_a_strength_of_zero_is_another_plan_and_both_are_kept(
    engine: LoraEngine, files: list[LoraFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = count_plans(monkeypatch)
    off = {"unet": 0.0}
    with engine.applied([LoraUse(files[0]), LoraUse(files[1])]) as block:
        for _ in range(3):
            block.switch([LoraUse(files[0]), LoraUse(files[1], components=off)])
            block.switch([LoraUse(files[0], 0.3), LoraUse(files[1], 0.2)])
    assert len(made) == 2


def test_merged_weights_of_passing_strengths_are_not_kept(
    engine: LoraEngine, files: list[LoraFile]
) -> None:
    with engine.applied([LoraUse(files[0])], Mode.MERGED) as block:
        block.switch([LoraUse(files[0], 0.999)])
        size = engine.prepared.size
        for step in range(200):
            block.switch([LoraUse(files[0], step / 1000)])
        assert engine.prepared.size == size


def test_merged_weights_of_a_strength_that_comes_back_are_kept(
    engine: LoraEngine, unet: nn.Module, files: list[LoraFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora.engine import engine as module

    merged, real = list[int](), module.merge
    monkeypatch.setattr(module, "merge", lambda *given: merged.append(1) or real(*given))
    with unchanged(unet), engine.applied([LoraUse(files[0], 0.5)], Mode.MERGED) as block:
        seen = {}
        for scale in (0.5, 1.0, 1.0):  # the first, and one that comes a second time
            block.switch([LoraUse(files[0], scale)])
            seen[scale] = weight_of(unet)
            block.switch([])
        merged.clear()
        for scale in (1.0, 0.5, 1.0):
            block.switch([LoraUse(files[0], scale)])
            assert torch.equal(weight_of(unet), seen[scale])
            block.switch([])
    assert merged == []


def test_strengths_that_come_back_have_a_limit_and_a_budget(
    engine: LoraEngine, unet: nn.Module, files: list[LoraFile]
) -> None:
    with engine.applied([LoraUse(files[0])], Mode.MERGED) as block:
        block.switch([LoraUse(files[0])])
        one = engine.prepared.size - files[0].size
        for scale in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6) * 2:
            block.switch([LoraUse(files[0], scale)])
        assert engine.prepared.size <= files[0].size + VARIANTS * one
    small = LoraEngine({"unet": unet}, Budgets(prepared=files[0].size + one + one // 2))
    with unchanged(unet), small.applied([LoraUse(files[0])], Mode.MERGED) as block:
        for scale in (0.1, 0.2) * 3:
            block.switch([LoraUse(files[0], scale)])
        assert 0 < small.prepared.size <= small.prepared.budget
