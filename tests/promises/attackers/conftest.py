"""Gives each attacker its rounds, and writes down what they came to."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.report import write_result
from tests.promises.attackers.rounds import SECONDS, SEED, Rounds

FIGURES = pytest.StashKey[dict[str, Any]]()


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> Iterator[Rounds]:
    begun, made = time.monotonic(), Rounds()
    yield made
    figures = request.config.stash.setdefault(FIGURES, {})
    figures[request.node.name] = {
        "rounds": made.done,
        "seconds": round(time.monotonic() - begun, 1),
        "peak_mb_of_the_process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        **dict(sorted(made.seen.items())),
    }


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """On demand, prints the figures and writes benchmarks/results/attack.json."""
    figures = config.stash.get(FIGURES, {})
    if not SECONDS or not figures:
        return
    failed = [report.nodeid for report in terminalreporter.getreports("failed")]
    about = {"seed": SEED, "seconds_each_at_most": SECONDS, "failed": failed}
    path = write_result("attack", {**about, "attackers": figures})
    for name, found in figures.items():
        terminalreporter.write_line(f"{name}: {found}")
    terminalreporter.write_line(str(path))
