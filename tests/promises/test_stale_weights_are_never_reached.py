"""Coming back to a stack is fast, and never reaches what was made for something else.

Most of the holes looked for here are those of sglang's `_reactivate_cached_dynamic_lora_layers`.
"""

from __future__ import annotations

import copy
import gc
import json
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from torch import Tensor, nn

from lora.engine import dynamic
from lora.engine import engine as engine_module
from lora.engine import prepared as prepared_module
from lora.engine.engine import Budgets, EngineBusy, LoraEngine
from lora.engine.stack import LoraUse, Mode, Stack
from lora.errors import LoraIncompatible, LoraUnsupported
from lora.formats.adapter import LoraFile
from tests.lora.small import (
    MODES,
    Poisoned,
    adapter,
    as_fresh,
    bind,
    outputs,
    poisoned,
    same,
    small,
    tensors_of,
)
from tests.state import unchanged

EVERY_MODE = pytest.mark.parametrize("mode", MODES)
AMPLE = Budgets()
MIXED = ("lora", "loha", "norms")
"""Low-rank, merged in both modes, and a bias."""


def use(*names: str, scale: float = 1.0) -> Stack:
    return [LoraUse(adapter(name), scale) for name in names]


def check(engine: LoraEngine, root: nn.Module, stack: Stack, mode: Mode) -> None:
    """A block on this engine gives what a new engine would, and leaves no trace."""
    expected = as_fresh(root, stack, mode)
    with unchanged(root):
        with engine.applied(stack, mode):
            torch.testing.assert_close(outputs(root), expected, rtol=1e-5, atol=1e-5)
        assert same(outputs(root), outputs(copy.deepcopy(root)))


def check_all(sequence: list[Stack], mode: Mode, budgets: Budgets = AMPLE) -> None:
    """In blocks of their own, then as switches within one."""
    root = small()
    engine = LoraEngine({"unet": root}, budgets)
    for stack in sequence:
        check(engine, root, stack, mode)
    expected = [as_fresh(root, stack, mode) for stack in sequence]
    with unchanged(root), engine.applied([], mode) as block:
        for stack, wanted in zip(sequence, expected, strict=True):
            block.switch(stack)
            torch.testing.assert_close(outputs(root), wanted, rtol=1e-5, atol=1e-5)


# --- what tells one stack from another --------------------------------------------------------------


@EVERY_MODE
@pytest.mark.parametrize("name", MIXED)
def test_a_file_that_changed_under_its_name(name: str, mode: Mode) -> None:
    key_map = LoraEngine({"unet": small()}).key_map
    old, new = (bind(tensors_of(name, seed), key_map) for seed in (0, 1))
    assert not same(
        as_fresh(small(), [LoraUse(old)], mode), as_fresh(small(), [LoraUse(new)], mode)
    )
    check_all([[LoraUse(file)] for file in (old, new, old)], mode)


def with_alpha(alpha: float | None, key_map_of: LoraEngine) -> LoraFile:
    config = None if alpha is None else json.dumps({"peft_type": "LORA", "lora_alpha": alpha})
    return bind(tensors_of("lora"), key_map_of.key_map, config=config)


@EVERY_MODE
def test_the_same_tensors_with_another_alpha(mode: Mode) -> None:
    engine = LoraEngine({"unet": small()})
    plain, strong, weak = (with_alpha(alpha, engine) for alpha in (None, 8.0, 1.0))
    assert plain.sha256 == strong.sha256 == weak.sha256
    results = [as_fresh(small(), [LoraUse(file)], mode) for file in (plain, strong, weak)]
    base = outputs(small())["linear"]
    for result, scaling in zip(results, (1.0, 4.0, 0.5), strict=True):  # alpha / rank 2
        change = results[0]["linear"] - base
        torch.testing.assert_close(result["linear"] - base, scaling * change, rtol=1e-3, atol=1e-4)
    check_all([[LoraUse(file)] for file in (plain, strong, weak, plain, strong)], mode)
    check_all([[LoraUse(strong), LoraUse(weak)], [LoraUse(weak), LoraUse(strong)]], mode)


@EVERY_MODE
@pytest.mark.parametrize(
    "sequence",
    [
        [("lora",), ("lora_bias",), ("lora",)],  # the second covers one layer of the first's two
        [("full",), ("norms",), ("full",)],  # nothing in common
        [("lora", "loha"), ("loha",), ("lora", "loha")],  # several, and one of them
        [("lora", "locon", "dora"), ("dora", "locon", "lora"), ("locon", "dora")],  # another order
        [("lora", "lora"), ("lora",)],  # twice the same
        [("full", "norms"), (), ("full",)],
    ],
)
def test_stacks_that_cover_different_layers(sequence: list[tuple[str, ...]], mode: Mode) -> None:
    check_all([use(*names) for names in sequence], mode)


@EVERY_MODE
@pytest.mark.parametrize("names", [("lora",), ("lora", "loha"), ("loha", "norms", "lora")])
def test_a_changed_scale(names: tuple[str, ...], mode: Mode) -> None:
    check_all([use(*names, scale=scale) for scale in (1.0, 0.25, -1.0, 0.0, 1.0)], mode)
    files = [adapter(name) for name in names]
    strengths = [[1.0, 0.5, 2.0], [0.5, 1.0, 0.0], [0.0, 1.0, 0.5], [1.0, 0.5, 2.0]]
    stacks = [list(map(LoraUse, files, each)) for each in strengths]
    check_all(stacks, mode)


@EVERY_MODE
def test_another_mode_between(mode: Mode) -> None:
    root = small()
    engine = LoraEngine({"unet": root})
    other = MODES[1 - MODES.index(mode)]
    for one in (mode, other, mode):
        check(engine, root, use(*MIXED, "locon"), one)
    expected = [as_fresh(root, use(part), one) for one, part in product((mode, other), MIXED)]
    with unchanged(root), engine.applied([], mode) as block:
        for (one, part), wanted in zip(product((mode, other), MIXED), expected, strict=True):
            block.switch(use(part), one)
            torch.testing.assert_close(outputs(root), wanted, rtol=1e-5, atol=1e-5)


class Pair(nn.Module):
    """One weight with two names, of which a user scales each apart."""

    def __init__(self, table: nn.Parameter) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 3)
        self.table.weight = table


@EVERY_MODE
def test_a_shared_weight_whose_owners_are_scaled_apart(mode: Mode) -> None:
    table = nn.Parameter(torch.zeros(4, 3))
    roots = {"unet": Pair(table), "text_encoder": Pair(table)}
    engine = LoraEngine(roots)
    tensors = {"unet.table.diff": torch.ones(4, 3), "text_encoder.table.diff": 5 * torch.ones(4, 3)}
    file = bind(tensors, engine.key_map)
    first, second = ({"unet": 1.0, "text_encoder": 0.0}, {"unet": 0.0, "text_encoder": 1.0})
    with engine.applied([LoraUse(file, components=first)], mode) as block:
        assert table.unique().tolist() == [1.0]
        block.switch([LoraUse(file, components=second)])
        assert table.unique().tolist() == [5.0]
    assert table.unique().tolist() == [0.0]


# --- a pipeline that changes between two blocks -----------------------------------------------------


@torch.no_grad()
def in_place(root: nn.Module) -> None:
    for parameter in root.parameters():
        parameter.mul_(1.5)


def load_other(root: nn.Module) -> None:
    state = {name: value * 0.5 + 1 for name, value in root.state_dict().items()}
    root.load_state_dict(state)


def load_and_assign(root: nn.Module) -> None:
    state = {name: value * 0.5 + 1 for name, value in root.state_dict().items()}
    root.load_state_dict(state, assign=True)


@torch.inference_mode()
def in_place_in_inference_mode(root: nn.Module) -> None:
    for parameter in root.parameters():
        parameter.mul_(1.5)


def to_half(root: nn.Module) -> None:
    root.to(torch.bfloat16)


def there_and_back(root: nn.Module) -> None:
    root.to(torch.bfloat16).to(torch.float32)


def elsewhere(root: nn.Module) -> None:
    """As a move to another device and back does it: the same objects, other memory."""
    for parameter in root.parameters():
        parameter.data = parameter.detach().clone() * 1.25


def new_parameters(root: nn.Module) -> None:
    for module in root.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach() * 2))


def other_layout(root: nn.Module) -> None:
    root.to(memory_format=torch.channels_last)


CHANGES = (
    in_place,
    in_place_in_inference_mode,
    load_other,
    load_and_assign,
    to_half,
    there_and_back,
    elsewhere,
    new_parameters,
    other_layout,
)


@EVERY_MODE
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("names", [(name,) for name in (*MIXED, "locon")] + [MIXED])
def test_weights_that_someone_else_changed(
    names: tuple[str, ...], change: Callable[[nn.Module], None], mode: Mode
) -> None:
    root = small()
    engine = LoraEngine({"unet": root})
    for _ in range(2):
        check(engine, root, use(*names), mode)
        change(root)
        check(engine, root, use(*names), mode)
        check(engine, root, use("full"), mode)


@EVERY_MODE
def test_weights_whose_memory_comes_back_with_other_values(mode: Mode) -> None:
    root = small()
    engine = LoraEngine({"unet": root})
    for _ in range(60):  # sooner or later the allocator gives the same address again
        check(engine, root, use("loha", "norms"), mode)
        there_and_back(root)
        in_place_through_data(root)


def in_place_through_data(root: nn.Module) -> None:
    """A new tensor, at the old address if the allocator wills, and no version that would tell."""
    for parameter in root.parameters():
        values, shape = parameter.detach().flatten().tolist(), parameter.shape
        parameter.data = torch.empty(0)
        parameter.data = torch.tensor(values).mul_(0.9).reshape(shape)


@EVERY_MODE
def test_a_module_that_went_to_half_precision_and_back_gets_the_files_own_precision(
    mode: Mode,
) -> None:
    root = small()
    engine, stack = LoraEngine({"unet": root}), use("lora", "locon")
    values = copy.deepcopy(root.state_dict())
    expected = as_fresh(root, stack, mode)
    root.to(torch.bfloat16)
    with engine.applied(stack, mode):
        outputs(root)
    root.to(torch.float32).load_state_dict(values)
    with engine.applied(stack, mode):
        torch.testing.assert_close(outputs(root), expected, rtol=1e-6, atol=1e-6)


@EVERY_MODE
@pytest.mark.parametrize("names", [("lora",), ("lora", "locon")])
def test_a_module_that_is_offloaded_and_comes_back(names: tuple[str, ...], mode: Mode) -> None:
    root, plain = small(), small()
    engine, stack = LoraEngine({"unet": root}), use(*names)
    check(engine, root, stack, mode)
    elsewhere = {name: value.clone() for name, value in root.state_dict().items()}
    cpu_offload(root, execution_device=torch.device("cpu"), state_dict=elsewhere)
    expected = as_fresh(plain, stack, mode)
    with engine.applied(stack, mode):
        torch.testing.assert_close(outputs(root), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs(root), outputs(plain))
    with pytest.raises(LoraUnsupported), engine.applied(use("loha"), mode):
        pytest.fail("the block must not be entered")
    torch.testing.assert_close(outputs(root), outputs(plain))
    remove_hook_from_submodules(root)
    for one in (stack, use("loha")):
        check(engine, root, one, mode)
    torch.testing.assert_close(outputs(root), outputs(plain))


# --- errors in the middle ---------------------------------------------------------------------------


@EVERY_MODE
@pytest.mark.parametrize("low", [True, False])
def test_an_error_in_the_middle_of_a_switch(low: bool, mode: Mode) -> None:
    root = small()
    engine, stack = LoraEngine({"unet": root}), use(*MIXED)
    bad = [*use("lora", "full"), LoraUse(poisoned(adapter("dora"), low=low))]
    for first in (stack, []):
        with unchanged(root), engine.applied(first, mode) as block:
            with pytest.raises(Poisoned):
                block.switch(bad)
            assert same(outputs(root), outputs(small()))
            block.at(0.7)  # nothing is applied, so nothing comes or goes
            assert same(outputs(root), outputs(small()))
            block.switch(stack)
            assert same(outputs(root), as_fresh(small(), stack, mode))
    check(engine, root, use("lora", "full"), mode)


@pytest.mark.parametrize("place", ["tensor", "repeat_interleave", "split"])
def test_an_error_while_scales_are_set(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root = small()
    engine, names = LoraEngine({"unet": root}), ("lora", "lora_bias", "locon")
    check(engine, root, use(*names), Mode.DYNAMIC)

    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(dynamic.torch, place, fail)
        with pytest.raises(torch.OutOfMemoryError), engine.applied(use(*names, scale=3.0)):
            pytest.fail("the block must not be entered")
    for scale in (3.0, 1.0):
        check(engine, root, use(*names, scale=scale), Mode.DYNAMIC)


@EVERY_MODE
@pytest.mark.parametrize(
    ("module", "place"),
    [
        (engine_module, "merge"),
        (engine_module, "refuse_overflow"),
        (prepared_module, "scaled"),
        (prepared_module, "make_factors"),
        (prepared_module, "Ready"),
    ],
)
def test_another_scale_that_fails_changes_nothing_that_is_kept(
    module: Any, place: str, mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = small()
    engine, names = LoraEngine({"unet": root}), ("lora", "lora_bias", *MIXED)
    check(engine, root, use(*names, scale=0.5), mode)

    class Refused(Exception):
        pass

    def fail(*_: object, **__: object) -> None:
        raise Refused

    with monkeypatch.context() as patch:
        patch.setattr(module, place, fail)
        for scale in (2.0, 3.0):
            with suppress(Refused), engine.applied(use(*names, scale=scale), mode):
                pass
    for scale in (0.5, 2.0, 0.5, 3.0):
        check(engine, root, use(*names, scale=scale), mode)


def test_a_scale_that_a_merged_layer_refuses_is_not_the_next_jobs() -> None:
    root = small().to(torch.float16)
    engine, low = LoraEngine({"unet": root}), use("lora", "lora_bias", scale=0.5)
    with engine.applied([*low, *use("full", scale=1.0)], Mode.DYNAMIC):
        expected = outputs(root)
    for scale in (2e5, -3e5):
        refused = [*use("lora", "lora_bias", scale=2.0), *use("full", scale=scale)]
        with pytest.raises(LoraIncompatible), engine.applied(refused, Mode.DYNAMIC):
            pytest.fail("the block must not be entered")
        with engine.applied([*low, *use("full", scale=1.0)], Mode.DYNAMIC):
            assert same(outputs(root), expected)


def test_a_refused_switch_leaves_nothing_of_either_stack() -> None:
    root = small()
    engine = LoraEngine({"unet": root})
    ranged = [LoraUse(adapter("lora"), start=0.5)]
    with unchanged(root), engine.applied(use("lora", "full"), Mode.MERGED) as block:
        with pytest.raises(LoraUnsupported):
            block.switch(ranged)
        assert same(outputs(root), outputs(small()))


# --- what is kept -----------------------------------------------------------------------------------


@dataclass
class Work:
    """How often something was made anew."""

    factors: int = 0
    merges: int = 0


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    done, make_factors, merge = Work(), prepared_module.make_factors, engine_module.merge

    def counted_factors(layers: list[object]) -> object:
        done.factors += len(layers)
        return make_factors(layers)

    def counted_merge(*arguments: object) -> Tensor:
        done.merges += 1
        return merge(*arguments)

    monkeypatch.setattr(prepared_module, "make_factors", counted_factors)
    monkeypatch.setattr(engine_module, "merge", counted_merge)
    return done


def run(engine: LoraEngine, stack: Stack, mode: Mode) -> None:
    with engine.applied(stack, mode):
        pass


@EVERY_MODE
@pytest.mark.parametrize("within", ["blocks", "one block"])
def test_coming_back_to_a_stack_makes_nothing_anew(within: str, mode: Mode, work: Work) -> None:
    root = small()
    engine = LoraEngine({"unet": root})
    stacks = [use("lora", "loha"), use("locon", "norms"), use("lora")]
    for stack in stacks:
        run(engine, stack, mode)
    assert work.factors + work.merges > 0
    before = copy.copy(work)
    if within == "blocks":
        for stack in stacks:
            run(engine, stack, mode)
    else:
        with engine.applied([], mode) as block:
            for stack in [*stacks, *stacks]:
                block.switch(stack)
    assert work == before
    for stack in stacks:
        check(engine, root, stack, mode)


def test_another_scale_makes_no_factors_anew(work: Work) -> None:
    engine = LoraEngine({"unet": small()})
    for scale in (1.0, 0.5, -2.0, 1.0):
        run(engine, use("lora", "locon", scale=scale), Mode.DYNAMIC)
    assert work == Work(factors=4)


@EVERY_MODE
def test_freed_memory_is_made_anew_and_right(mode: Mode, work: Work) -> None:
    root = small()
    engine = LoraEngine({"unet": root})
    run(engine, use(*MIXED), mode)
    first = copy.copy(work)
    with engine.applied([], mode), pytest.raises(EngineBusy):
        engine.free()
    engine.free()
    in_place(root)
    run(engine, use(*MIXED), mode)
    assert work == Work(2 * first.factors, 2 * first.merges)
    check(engine, root, use(*MIXED), mode)


BUDGETS = (
    Budgets(prepared=0),
    Budgets(originals=0),
    Budgets(0, 0),
    Budgets(originals=200),
    Budgets(prepared=2500),
    Budgets(originals=400, prepared=1000),
)


@EVERY_MODE
@pytest.mark.parametrize("budgets", BUDGETS, ids=repr)
def test_whatever_the_budgets_the_results_are_right(budgets: Budgets, mode: Mode) -> None:
    names = [("lora",), ("full",), ("lora", "loha", "norms"), ("lora",), ("locon", "full")]
    check_all([use(*each) for each in names * 2], mode, budgets)


@EVERY_MODE
def test_what_was_pushed_out_is_made_anew_and_right(mode: Mode, work: Work) -> None:
    root = small()
    engine = LoraEngine({"unet": root}, Budgets(prepared=2500))
    check(engine, root, use("full"), mode)
    first = copy.copy(work)
    for seed in range(4):
        run(engine, [LoraUse(adapter("full", seed=10 + seed))], mode)
    before = copy.copy(work)
    run(engine, use("full"), mode)
    assert work.merges > before.merges
    assert first.merges > 0
    check(engine, root, use("full"), mode)


@EVERY_MODE
def test_a_budget_that_is_just_large_enough_still_serves_after_the_weights_changed(
    mode: Mode, work: Work
) -> None:
    root, stack = small(), use("full")
    sizes = sum(root.get_parameter(f"{n}").nbytes for n in ("linear.weight", "linear.bias"))
    sizes += root.get_parameter("conv.weight").nbytes
    engine = LoraEngine({"unet": root}, Budgets(prepared=adapter("full").size + sizes + 64))
    run(engine, stack, mode)
    in_place(root)
    run(engine, stack, mode)
    before = copy.copy(work)
    run(engine, stack, mode)
    assert work == before


@EVERY_MODE
def test_without_a_budget_nothing_of_a_stack_stays_in_memory(mode: Mode) -> None:
    root = small()
    engine = LoraEngine({"unet": root}, Budgets(0, 0))
    file = bind(tensors_of("lora"), engine.key_map)
    tensors = [weakref.ref(layer.algorithm.lora_down) for layer in file.layers]
    with engine.applied([LoraUse(file)], mode):
        outputs(root)
    del file
    gc.collect()
    assert [reference() for reference in tensors] == [None, None]
