"""How tests wait: for an event, however busy the machine is, and with a guard against hanging."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Value = TypeVar("Value")

PATIENCE = 300.0
"""Seconds after which what a test waits for counts as never coming. No test is about this time."""


def until(
    look: Callable[[], Value], what: Callable[[], object] = str, pause: float = 0.02
) -> Value:
    """Looks time and again until there is something true, and returns it. `what` says how things stand."""
    deadline = time.monotonic() + PATIENCE
    while not (seen := look()):
        assert time.monotonic() < deadline, what()
        time.sleep(pause)
    return seen


class Clock:
    """Stands in for the module `time` in a module under test: its hands are in the test's hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now
