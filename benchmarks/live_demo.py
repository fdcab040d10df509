"""The demo worker, its looks and its clock, for `benchmarks.live`."""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from demo import pictures
from handler import Worker
from live.looks import Look, Looks
from live.painter import Drawn, Painter, Ticket
from live.queue import Waiting
from live.request import Asked
from pipelines.live import LiveStream, Spec, spread
from settings import Settings

PROMPTS = ("a big red circle on a blue background", "a small green square on a white background")
PRESETS: dict[str, list[tuple[str, float]]] = {
    "none": [],
    "stripes": [("demo-stripes", 1.0)],
    "outline": [("demo-outline", 1.0)],
    "both": [("demo-stripes", 0.6), ("demo-outline", 0.8)],
    "spiral": [("demo-spiral", 1.0)],
    "three": [("demo-stripes", 0.4), ("demo-outline", 0.4), ("demo-spiral", 0.6)],
    "night": [("demo-night", 1.0)],
}
"""The last is a LoHa, which cannot be a row: in a stream batch it is drawn alone."""
STRENGTHS = (0.5, 1.0)
PICTURES = 3


def milliseconds(work: Callable[[], object]) -> float:
    """The CPU time of this thread."""
    begun = time.thread_time()
    work()
    return 1000 * (time.thread_time() - begun)


def median(values: Sequence[float]) -> float:
    """Rounded for the result."""
    return round(statistics.median(values), 2)


@dataclass
class Demo:
    """The demo worker, its looks, and pictures to draw over."""

    worker: Worker
    looks: dict[tuple[str, float, str], Look]
    frames: list[Image.Image]

    def painter(self, steps: int, done: list[Drawn], **options: Any) -> Painter:
        """A painter of 64 pixels."""
        spec = Spec(64, 64, spread(steps, 0.5))
        stream = LiveStream(self.worker.parts.pipeline, spec)
        return Painter(stream, self.worker.parts.engine, done.append, **options)

    def ticket(self, key: tuple[str, float, str], picture: int, seq: int) -> Ticket:
        """One frame."""
        look = self.looks[key]
        return Ticket(Waiting(seq, b"", look), look, self.frames[picture])


def new_demo(folder: Path) -> Demo:
    """The demo worker, with a cache in `folder`."""
    worker = Worker(
        Settings(model="demo", device="cpu", lora_cache_dir=folder, lora_allow_private_urls=True)
    ).setup()
    found = Looks(worker.parts.library, worker.parts.selection)
    looks = {}
    for (name, stack), strength, prompt in itertools.product(PRESETS.items(), STRENGTHS, PROMPTS):
        asked = Asked(prompt=prompt, seed=1).changed(
            {"loras": [{"path": path, "scale": scale * strength} for path, scale in stack]}
        )
        if look := found.of(asked, fetch=True):
            looks[name, strength, prompt] = look
    rng = random.Random(3)
    combinations = pictures.all_combinations()
    scenes = [pictures.random_scene(rng, rng.choice(combinations)) for _ in range(PICTURES)]
    return Demo(worker, looks, [Image.fromarray(pictures.draw(scene)) for scene in scenes])
