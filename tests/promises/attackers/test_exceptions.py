"""Exceptions at random lines of a job: whatever it leaves, the next picture is a fresh worker's."""

from __future__ import annotations

import dis
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import CodeType, FrameType
from typing import Any

from handler import Worker
from tests.conftest import ROOT
from tests.promises.attackers.rounds import Rounds
from tests.test_handler import job

OURS = tuple(str(ROOT / name) for name in ("lora", "pipelines", "worker", "handler.py"))

STACK = [{"path": "demo-stripes", "scale": 0.5}, {"path": "demo-night", "scale": 1.0}]
JOBS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dynamic": {"loras": STACK, "lora_mode": "dynamic"},
    "other scales": {"loras": [{**STACK[0], "scale": 2.0}, STACK[1]], "lora_mode": "dynamic"},
    "merged": {"loras": STACK, "lora_mode": "merged"},
    "merged with other scales": {
        "loras": [{**STACK[0], "scale": -1.0}, STACK[1]],
        "lora_mode": "merged",
    },
    "with a range": {"loras": [{**STACK[0], "end": 0.5}], "lora_mode": "dynamic"},
    "text encoders": {"loras": ["demo-spiral"], "lora_mode": "merged"},
}
"""They share stacks and weights, so that what one leaves shows in another."""

SEQUENCES = 1000


class Broken(Exception):
    """What no code expects."""


@cache
def _lines(code: CodeType) -> frozenset[int]:
    """The places in the code at which a line begins that can raise.

    Python announces a line again where it goes back to it: at the end of a `with` block, where an exception
    would keep the block's own exit from being called. So it would at a `try:`, which does nothing.
    """
    first: dict[int, int] = {}
    for place, line in dis.findlinestarts(code):
        first.setdefault(line, place)
    nothing = dis.opmap["NOP"]
    return frozenset(place for place in first.values() if code.co_code[place] != nothing)


Place = tuple[CodeType, int]


@contextmanager
def broken_at(number: int | None) -> Iterator[list[Place]]:
    """Raises at the line of our code that is the n-th to run in this thread, counted from 0; None: at none.

    Yields the lines that ran, in order.
    """
    ran: list[Place] = []

    def in_frame(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line" and frame.f_lasti in _lines(frame.f_code):
            ran.append((frame.f_code, frame.f_lasti))
            if len(ran) - 1 == number:
                raise Broken
        return in_frame

    def trace(frame: FrameType, event: str, given: Any) -> Any:
        return in_frame if frame.f_code.co_filename.startswith(OURS) else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield ran
    finally:
        sys.settrace(before)


class Attack:
    """A worker, and what it drew before anything happened to it."""

    def __init__(self, worker: Worker, rounds: Rounds) -> None:
        self.worker, self.seen = worker, rounds.seen
        self.wanted: dict[str, Any] = {}
        self._lines: dict[str, dict[Place, list[int]]] = {}
        for name in JOBS:
            with broken_at(None) as ran:
                self.wanted[name] = self.draw(name)["images"]
            times: dict[Place, list[int]] = {}
            self._lines[name] = times
            for number, place in enumerate(ran):
                times.setdefault(place, []).append(number)

    def draw(self, name: str) -> dict[str, Any]:
        return self.worker(job(num_inference_steps=2, seed=3, guidance_scale=1.0, **JOBS[name]))

    def hurt(self, chance: random.Random) -> None:
        """One job that an exception ends at some line, at one of the times that it runs. A worker that asks
        to be replaced is."""
        name = chance.choice(list(JOBS))
        numbers = chance.choice(list(self._lines[name].values()))
        with broken_at(chance.choice(numbers)):
            try:
                answer = self.draw(name)
            except Broken:  # outside of all stages: the platform's own code answers
                answer = {"error": "Broken"}
        self.seen["ended by the exception" if "error" in answer else "went on"] += 1
        self._replaced(answer)

    @property
    def places(self) -> int:
        """How many lines there are to break."""
        return len({place for places in self._lines.values() for place in places})

    def check(self, name: str) -> None:
        answer = self.draw(name)
        if self._replaced(answer):
            answer = self.draw(name)
        assert answer.get("images") == self.wanted[name], (name, answer.get("error"))

    def _replaced(self, answer: dict[str, Any]) -> bool:
        if asks := bool(answer.get("refresh_worker")):
            self.seen["workers replaced"] += 1
            self.worker = Worker(self.worker.settings).setup()
        return asks


def test_no_exception_within_a_job_changes_a_later_picture(
    demo_worker: Worker, rounds: Rounds
) -> None:
    attack = Attack(demo_worker, rounds)
    assert attack.wanted["dynamic"] != attack.wanted["other scales"]
    for chance in rounds(6, SEQUENCES, share=6):
        for _ in range(chance.choice((1, 1, 2))):
            attack.hurt(chance)
        attack.check(chance.choice(list(JOBS)))
    assert rounds.seen["ended by the exception"]
    rounds.seen["lines of our code"] = attack.places
