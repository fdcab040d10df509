"""The scheduler: each text as if it were alone, whoever comes, goes, fails or takes a turn alone."""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lora.engine.engine import LoraEngine
from lora.engine.stack import LoraUse, Stack
from lora.errors import CodedError, LoraIncompatible
from tests.text.small import (
    ALONE,
    END,
    SHARED,
    adapter,
    base,
    engine_of,
    generated,
    peft,
    prompts,
    text_model,
)
from tests.waiting import PATIENCE, until
from text.batch import FIRST_PIECE, SMALLEST_PIECE
from text.generation import Generation
from text.loading import TextModel
from text.sampling import Sampling
from text.scheduler import Closed, Scheduler
from worker.stop import Cancelled


class Service:
    """A model of this test's own with its scheduler."""

    def __init__(self, most: int = 8) -> None:
        self.text: TextModel = text_model()
        self.engine: LoraEngine = engine_of(self.text)
        self.ended: list[Generation] = []
        self.scheduler = Scheduler(self.text, self.engine, most, self.ended.append)

    def stack(self, kind: str | None, scale: float = 1.0, seed: int = 0) -> Stack:
        return [] if kind is None else [LoraUse(adapter(self.engine, kind, seed), scale)]

    def start(self, prompt: list[int], new: int, stack: Stack = (), **more: Any) -> Generation:
        sampling = more.pop("sampling", None) or Sampling(max_tokens=new, temperature=0)
        one = Generation(prompt, sampling, stack, **more)
        self.scheduler.submit(one)
        return one

    def is_untouched(self) -> bool:
        now, was = self.text.model.state_dict(), base().state_dict()
        return all(torch.equal(now[name], was[name]) for name in was) and not any(
            "forward" in module.__dict__ for module in self.text.model.modules()
        )

    def is_idle(self) -> bool:
        return self.scheduler.counts == {"queued": 0, "running": 0} and not self.engine.undo.pending


@pytest.fixture
def service() -> Iterator[Service]:
    made = Service()
    yield made
    made.scheduler.close()


def tokens(one: Generation) -> list[int]:
    assert one.wait(PATIENCE)
    assert one.error is None, one.error
    return one.tokens


class Cancel:
    """A check that a test sets off."""

    def __init__(self) -> None:
        self.on = False

    def __call__(self) -> None:
        if self.on:
            raise Cancelled("the job was cancelled")


@pytest.mark.parametrize("kind", [None, *SHARED, *ALONE])
def test_a_text_alone_is_what_peft_generates(service: Service, kind: str | None) -> None:
    for prompt in prompts(3):
        one = service.start(prompt, 20, service.stack(kind))
        assert tokens(one) == generated(peft(kind), prompt, 20)
    until(service.is_idle)
    assert service.is_untouched()


def test_mixed_texts_are_what_peft_generates_for_each_alone(service: Service) -> None:
    jobs = [
        (prompt, 5 + 7 * number % 30, [None, *SHARED, *ALONE][number % (1 + len(SHARED + ALONE))])
        for number, prompt in enumerate(prompts(40, seed=1))
    ]
    texts = [service.start(prompt, new, service.stack(kind)) for prompt, new, kind in jobs]
    made = [tokens(one) for one in texts]
    assert made == [generated(peft(kind), prompt, new) for prompt, new, kind in jobs]
    assert sorted(map(id, service.ended)) == sorted(map(id, texts))
    until(service.is_idle)
    assert service.is_untouched()


def test_a_long_prompt_is_read_in_pieces_beside_running_texts(service: Service) -> None:
    long = [number % 256 for number in range(200)]
    first = service.start([1, 2, 3], 60, service.stack("plain"))
    until(lambda: len(first.tokens) > 3)
    second = service.start(long, 12, service.stack("other"))
    assert tokens(second) == generated(peft("other"), long, 12)
    assert tokens(first) == generated(peft("plain"), [1, 2, 3], 60)


def test_prompts_of_several_lengths_are_read_together(service: Service) -> None:
    given = [list(range(1, 2 + size)) for size in (60, 3, 17, 3, 40, 1)]
    blocker = service.start([9], 3)
    texts = [
        service.start(prompt, 15, service.stack(SHARED[n % 4])) for n, prompt in enumerate(given)
    ]
    made = [tokens(one) for one in texts]
    assert made == [generated(peft(SHARED[n % 4]), p, 15) for n, p in enumerate(given)]
    tokens(blocker)


def test_stacks_and_scales_are_the_rows_own(service: Service) -> None:
    both = [*service.stack("plain", 0.5), *service.stack("other", -1.0)]
    (prompt,) = prompts(1, seed=5)
    alone = tokens(service.start(prompt, 20, both))
    crowd = [service.start(p, 30, service.stack("plain")) for p in prompts(5, seed=6)]
    assert tokens(service.start(prompt, 20, both)) == alone
    assert alone != generated(peft("plain"), prompt, 20)
    for one in crowd:
        tokens(one)


def test_adapters_that_arrive_beside_running_texts_are_placed_between_their_steps(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora.engine.rows.AT_ONCE", 1)
    monkeypatch.setattr("text.scheduler.PLACING", 0.0)
    prompt, arriving = prompts(2)
    sampling = Sampling(60, 0.0, ignore_eos=True)
    running = service.start(prompt, 60, sampling=sampling)
    until(lambda: len(running.tokens) > 1)
    texts = [service.start(arriving, 20, service.stack(kind)) for kind in ("plain", "other")]
    made = [tokens(one) for one in texts]
    assert made == [generated(peft(kind), arriving, 20) for kind in ("plain", "other")]
    assert len(tokens(running)) == 60
    until(service.is_idle)
    assert service.is_untouched()


def test_pieces_of_prompts_grow_while_they_are_quick_and_shrink_when_they_are_not(
    service: Service,
) -> None:
    batch = service.scheduler.batch
    batch.steps.append(1.0)
    for _ in range(3):
        batch._learn(int(batch._size), 0.5)
    grown = batch._size
    assert grown == FIRST_PIECE * 1.5**3
    batch._learn(3, 0.1)  # the rest of a prompt tells nothing of a whole piece
    batch._learn(int(batch._size), 1.0)
    assert batch._size == grown
    batch._learn(int(batch._size), 2.0)
    assert batch._size == int(grown) / 2
    for _ in range(20):
        batch._learn(int(batch._size), 9.0)
    assert batch._size == SMALLEST_PIECE


def test_a_seed_gives_the_same_text_in_any_company(service: Service) -> None:
    sampling = Sampling(max_tokens=40, temperature=1.3, top_p=0.95, top_k=40, seed=7)
    (prompt,) = prompts(1, seed=9)
    stack = service.stack("plain")
    alone = tokens(service.start(prompt, 0, stack, sampling=sampling))
    others = [
        service.start(p, 0, service.stack(SHARED[n % 4]), sampling=Sampling(60, 1.0, seed=n))
        for n, p in enumerate(prompts(6, seed=10))
    ]
    crowded = tokens(service.start(prompt, 0, stack, sampling=sampling))
    assert crowded == alone
    assert len({tuple(tokens(one)) for one in others}) == len(others)


def test_a_cancelled_text_ends_within_a_step_and_the_others_go_on(service: Service) -> None:
    cancel = Cancel()
    doomed = service.start([5, 6], 10_000, service.stack("plain"), check=cancel)
    other = service.start([7, 8, 9], 50, service.stack("other"))
    until(lambda: doomed.tokens)
    cancel.on = True
    assert doomed.wait(PATIENCE)
    assert isinstance(doomed.error, Cancelled)
    assert tokens(other) == generated(peft("other"), [7, 8, 9], 50)


def test_a_queued_text_that_is_cancelled_never_begins() -> None:
    service = Service(most=1)
    first = service.start([5, 6], 100)
    cancel = Cancel()
    waiting = service.start([5], 5, check=cancel)
    cancel.on = True
    assert waiting.wait(PATIENCE)
    assert isinstance(waiting.error, Cancelled) and not waiting.times.begun
    tokens(first)
    service.scheduler.close()


def test_a_stack_that_cannot_be_applied_fails_alone(service: Service) -> None:
    running = service.start([5, 6], 60, service.stack("plain"))
    impossible = service.start([5], 5, service.stack("plain", 1e300))
    after = service.start([7], 20, service.stack("dora", 1e38))
    assert impossible.wait(PATIENCE) and after.wait(PATIENCE)
    assert isinstance(impossible.error, LoraIncompatible)
    assert isinstance(after.error, CodedError)
    assert tokens(running) == generated(peft("plain"), [5, 6], 60)
    assert tokens(service.start([5], 9)) == generated(peft(None), [5], 9)


def test_a_stack_that_cannot_be_applied_fails_none_that_is_read_with_it(service: Service) -> None:
    blocker = service.start([5, 6], 4, service.stack("plain"))
    stacks = [service.stack("other", scale) for scale in (1.0, 1e300, -1.0, 1e300, 0.5)]
    texts = [service.start([7 + n], 6, stack) for n, stack in enumerate(stacks)]
    assert all(one.wait(PATIENCE) for one in texts)
    assert [one.error is None for one in texts] == [True, False, True, False, True]
    assert texts[0].tokens == generated(peft("other"), [7], 6)
    tokens(blocker)


def test_an_error_of_the_model_ends_those_who_were_in_it_and_no_more(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = service.start([5, 6], 10_000, service.stack("plain"))
    until(lambda: running.tokens)
    with monkeypatch.context() as patch:
        patch.setattr(service.text.model.model.norm, "forward", _explode)
        assert running.wait(PATIENCE)
    assert isinstance(running.error, RuntimeError)
    assert tokens(service.start([5], 9, service.stack("dora"))) == generated(peft("dora"), [5], 9)
    until(service.is_idle)
    assert service.is_untouched()


def _explode(*given: object) -> None:
    raise RuntimeError("the device is gone")


def test_what_ends_a_text(service: Service) -> None:
    (prompt,) = prompts(1, seed=3)
    free = generated(peft(None), prompt, 40)
    one = service.start(prompt, 40, sampling=Sampling(40, 0, stop_token_ids=frozenset({free[9]})))
    assert tokens(one) == free[: free.index(free[9]) + 1]
    assert (one.finish, one.stopped_by) == ("stop", free[9])
    until_then = Sampling(40, 0, stop_token_ids=frozenset({free[0]}), min_tokens=5)
    one = service.start(prompt, 40, sampling=until_then)
    assert len(tokens(one)) > 5 or one.tokens[-1] != free[0]
    assert free[0] not in one.tokens[:5]
    one = service.start(prompt, 1000)
    tokens(one)
    assert one.finish == ("stop" if one.tokens[-1] == END else "length")
    assert len(prompt) + len(one.tokens) <= 256


def test_no_row_keeps_numbers_of_the_one_before(service: Service) -> None:
    tokens(service.start(prompts(1)[0], 20, service.stack("plain")))
    until(service.is_idle)
    slots = service.scheduler.batch._slots
    assert slots.size and not any(bool(store.any()) for store in slots._keys.values())


def test_keys_of_another_adapter_would_be_seen() -> None:
    """The same prompt under another adapter reads no K and V of the first: the test that would see it."""
    service = Service(most=1)
    (prompt,) = prompts(1, seed=2)
    made = [tokens(service.start(prompt, 15, service.stack(kind))) for kind in (*SHARED, None)]
    assert made == [generated(peft(kind), prompt, 15) for kind in (*SHARED, None)]
    assert len({tuple(one) for one in made}) == len(made)
    service.scheduler.close()


def test_a_closed_scheduler_ends_all_and_takes_no_more() -> None:
    service = Service(most=2)
    texts = [service.start([n + 1], 10_000, service.stack("plain")) for n in range(5)]
    until(lambda: texts[0].tokens)
    service.scheduler.close()
    assert all(isinstance(one.error, Closed) for one in texts if one.finish == "error")
    assert all(one.finish for one in texts)
    with pytest.raises(Closed):
        service.start([1], 1)
    assert service.is_untouched()


KINDS = (None, *SHARED, *ALONE)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_whatever_happens_every_weight_is_what_it_was_and_no_text_is_lost(seed: int) -> None:
    """100 sequences each of texts, cancels and exceptions, with adapters of all kinds."""
    r = random.Random(seed)
    service = Service(most=3)
    stacks = {kind: service.stack(kind) for kind in KINDS}
    expected = {
        (kind, n): generated(peft(kind), prompt, 12)
        for kind in KINDS
        for n, prompt in enumerate(prompts(3, seed=8))
    }
    for _ in range(100):
        jobs = []
        for _ in range(r.randrange(1, 5)):
            kind, number, fate = r.choice(KINDS), r.randrange(3), r.choice("......cx")
            check = Cancel() if fate != "x" else _after(r.randrange(4))
            prompt = prompts(3, seed=8)[number]
            jobs.append((service.start(prompt, 12, stacks[kind], check=check), kind, number))
            if fate == "c":
                threading.Timer(r.random() * 0.01, setattr, (check, "on", True)).start()
        for one, kind, number in jobs:
            assert one.wait(PATIENCE)
            whole = expected[kind, number]
            if one.error is None:
                assert one.tokens == whole
            else:
                assert isinstance(one.error, (Cancelled, RuntimeError))
                assert one.tokens == whole[: len(one.tokens)]
    until(service.is_idle)
    assert service.is_untouched()
    assert len(service.ended) == len(set(map(id, service.ended))) >= 100
    service.scheduler.close()


def _after(count: int) -> Any:
    """A check that fails at its nth call: by a deadline, as a job's does."""
    left = [count]

    def check() -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Cancelled("the time is over")

    return check


def test_the_base_of_these_tests_is_never_changed() -> None:
    twin = copy.deepcopy(base())
    service = Service()
    tokens(service.start([1, 2], 5, service.stack("saved")))
    assert all(
        torch.equal(a, b) for a, b in zip(twin.parameters(), base().parameters(), strict=True)
    )
    service.scheduler.close()
