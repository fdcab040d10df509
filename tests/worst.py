"""A worker whose pipeline does the worst that a prompt names: `python -m tests.worst`, for the emulator."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import runpod
from PIL import Image

from handler import Worker
from worker.logs import set_up
from worker.opening import read_settings

TOKEN = "hf_" + "SecretSecretSecret"

NAMES: dict[str, Any] = {
    "NaN": float("nan"),
    "infinity": [float("-inf")],
    "bytes": b"\x00\xff",
    "an object": object(),
    "a set": {1, 2},
    "no text for a name": {1: 2},
    "half a surrogate pair": "half \ud83d pair",
}
"""Prompt -> what the answer has for the model's name."""

HUGE = "a huge picture"
EXCEPTION = "an exception with a token"
OUT_OF_MEMORY = "out of memory"
PROMPTS = (*NAMES, HUGE, EXCEPTION)


class WorstPipeline:
    """A pipeline that stands in for the real one."""

    def __init__(self, real: Any) -> None:
        self._real = real
        self.name: Any = real.name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def generate(self, request: Any, *rest: Any) -> list[Image.Image]:
        self.name = NAMES.get(request.prompt, self._real.name)
        if request.prompt == EXCEPTION:
            raise RuntimeError(f"https://example.com/file?token={TOKEN} said no to {TOKEN}")
        if request.prompt == HUGE:
            noise = np.random.default_rng(0).integers(0, 256, (2200, 2200, 3), dtype=np.uint8)
            return [Image.fromarray(noise)]
        return self._real.generate(request, *rest)


def main() -> None:
    set_up(json_lines=True)
    worker = Worker(read_settings(os.environ)).setup()
    parts = worker.parts
    worker.__dict__["parts"] = replace(parts, pipeline=WorstPipeline(parts.pipeline))
    runpod.serverless.start({"handler": partial(worker.handle)})


if __name__ == "__main__":
    main()
