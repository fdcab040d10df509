"""A job's progress: which updates are sent, and what they say."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from lora.fetch.transfers import Transfer

Send = Callable[[dict[str, Any]], None]
"""A function that takes one update: {phase, fraction, text}, and perhaps `preview`."""

INTERVAL = 0.5
"""Least seconds between two updates of one phase."""


class Progress:
    """Sends one job's progress: each new phase at once, within a phase one update per `INTERVAL` at most."""

    def __init__(self, send: Send, clock: Callable[[], float] = time.monotonic) -> None:
        self._send = send
        self._clock = clock
        self._phase = ""
        self._last = float("-inf")

    def report(
        self,
        phase: str,
        fraction: float,
        text: str,
        preview: Callable[[], str | None] | None = None,
    ) -> None:
        """Reports that `fraction` (0 to 1) of a phase is done, with a few words for a person.

        `preview` makes a picture's data URI; it is called only for an update that is sent.
        """
        now = self._clock()
        if phase == self._phase and now - self._last < INTERVAL and fraction < 1.0:
            return
        self._phase, self._last = phase, now
        update: dict[str, Any] = {"phase": phase, "fraction": round(fraction, 3), "text": text}
        if preview and (picture := preview()):
            update["preview"] = picture
        self._send(update)

    def step(self, done: int, total: int, preview: Callable[[], str | None] | None = None) -> None:
        """Reports how many denoising steps are done."""
        self.report("generating", done / max(total, 1), f"step {done}/{total}", preview)

    def download(self, now: Transfer) -> None:
        """Reports how much of the job's LoRAs is downloaded."""
        share = f"{100 * now.done // now.total}%" if now.total else f"{now.done / 1e6:.0f} MB"
        words = f"downloading {now.files} LoRA{'s' * (now.files > 1)} {share}"
        fraction = now.done / now.total if now.total else 0.0
        self.report("downloading", fraction, f"{words}, {now.rate / 1e6:.3g} MB/s")
