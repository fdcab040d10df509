"""A worker for the emulator whose drawings stop where the test wants: `python -m tests.held`.

A prompt `hold FOLDER` draws one of very many steps, and waits for FOLDER/on; then it has drawn all of them,
and waits for FOLDER/end. `refresh FOLDER` does the same, and then the memory does not suffice. The real
pipeline draws other prompts.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import handler
from tests.waiting import until

STEPS = 10**12
"""So many that the first of them, however quick, says that the end is far."""


class HeldPipeline:
    """A pipeline that stands in for the real one."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def generate(
        self, request: Any, route: Any, given: Any, timings: Any, on_step: Any
    ) -> list[Image.Image]:
        word, _, folder = request.prompt.partition(" ")
        if word not in ("hold", "refresh"):
            found: list[Image.Image] = self._real.generate(request, route, given, timings, on_step)
            return found
        on_step(1, STEPS, lambda: None)
        until((Path(folder) / "on").exists)
        on_step(STEPS, STEPS, lambda: None)
        until((Path(folder) / "end").exists)
        if word == "refresh":
            raise torch.OutOfMemoryError("as the prompt wants")
        return [Image.new("RGB", (64, 64))]


def main() -> None:
    worker = handler.default_worker()
    parts = worker.parts
    worker.__dict__["parts"] = replace(parts, pipeline=HeldPipeline(parts.pipeline))
    handler.main()


if __name__ == "__main__":
    main()
