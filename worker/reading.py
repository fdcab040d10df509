"""Begins to read the weights while the program still imports its libraries; itself imports little."""

from __future__ import annotations

import time
from collections.abc import Mapping

from pipelines.weights import Reading, read_ahead
from settings import Settings, SettingsError
from text_settings import TextSettings


class Start:
    """This process's start, where it is a worker's program."""

    def __init__(self) -> None:
        self._begun: float | None = None
        self._reading: Reading | None = None

    def begin(self, environ: Mapping[str, str]) -> None:
        """Reads ahead what the environment's settings name; nothing where they are wrong."""
        self._begun = time.perf_counter()
        try:
            kind = TextSettings if environ.get("WORKER_KIND", "").strip() == "text" else Settings
            self._reading = read_ahead(kind.from_env(environ))
        except SettingsError:
            self._reading = None

    @property
    def seconds(self) -> float:
        """Since the program began; 0 in another program."""
        return 0.0 if self._begun is None else time.perf_counter() - self._begun

    @property
    def reading(self) -> float:
        """How long the weights were read, or have been."""
        return self._reading.seconds if self._reading else 0.0


START = Start()
"""Of this process."""
