"""How far a job is: throttled, in order, and handed to whoever shows it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from lora.transfers import Transfer

Send = Callable[[dict[str, Any]], None]
"""Takes one update, {phase, fraction, text}."""

INTERVAL = 0.5
"""Least seconds between two updates of one phase."""


class Progress:
    """One job's progress. A new phase is always told; within a phase, at most one update in `INTERVAL`."""

    def __init__(self, send: Send, clock: Callable[[], float] = time.monotonic) -> None:
        self._send = send
        self._clock = clock
        self._phase = ""
        self._last = float("-inf")

    def tell(self, phase: str, fraction: float, text: str) -> None:
        """Reports `fraction` (0 to 1) of a phase, with a few words for a person."""
        now = self._clock()
        if phase == self._phase and now - self._last < INTERVAL and fraction < 1.0:
            return
        self._phase, self._last = phase, now
        self._send({"phase": phase, "fraction": round(fraction, 3), "text": text})

    def step(self, done: int, total: int) -> None:
        """One more denoising step is done."""
        self.tell("generating", done / max(total, 1), f"step {done}/{total}")

    def download(self, now: Transfer) -> None:
        """More bytes of the job's LoRAs have come in."""
        share = f"{100 * now.done // now.total}%" if now.total else f"{now.done / 1e6:.0f} MB"
        words = f"downloading {now.files} LoRA{'s' * (now.files > 1)} {share}"
        fraction = now.done / now.total if now.total else 0.0
        self.tell("downloading", fraction, f"{words}, {now.rate / 1e6:.3g} MB/s")
