"""One image job, from the request to the answer: prepare, draw, answer."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from itertools import cycle

from PIL import Image

from lora.engine.engine import Block
from lora.engine.stack import Mode
from lora.formats.embeddings import TokenEmbedding
from lora.volume.loader import Loaded, LoraLibrary
from pipelines.image import Preview, StepCallback
from pipelines.inpainting import Masked
from pipelines.routes import Route, choose_route
from pipelines.timings import Timings
from schemas import ImageRequest, parse_job
from worker.parts import Answer, Job, Parts
from worker.pictures import parameters
from worker.pictures.outputs import (
    OutputTooLarge,
    deliver,
    encode,
    guard_size,
    has_room,
    requested_bucket,
)
from worker.pictures.start import start_of
from worker.progress import Progress
from worker.queue.intake import Turn
from worker.reports import refuse_unused, report, share_of_unused
from worker.selection import Chosen
from worker.stop import Stop

PHASES = (
    "resolve",
    "download",
    "parse",
    "apply",
    "encode_prompt",
    "denoise",
    "decode",
    "restore",
    "encode",
)
"""The phases of `timings` in an answer, in the order in which they happen."""


PREVIEW_QUALITY = 70

TOO_LONG = "the pictures do not hold their parameters: a JPEG has no room for over 64 kB of text"


class ImageJob:
    """One job. Its three stages are called once each, in order, from any thread."""

    request: ImageRequest
    """The job's request, with the additions of its presets."""
    route: Route
    loaded: list[Loaded]
    start: Image.Image | Masked | None = None
    drawn: Drawn

    def __init__(self, parts: Parts, job: Job, progress: Progress, stop: Stop, turn: Turn) -> None:
        self._parts, self._job, self._progress = parts, job, progress
        self._stop, self._turn = stop, turn
        self._timings = Timings(dict.fromkeys(PHASES, 0.0))
        self.warnings: list[str] = []
        """Warnings for the answer, besides those of the drawing and of the LoRAs."""

    def prepare(self) -> None:
        """Checks the request, and fetches and parses every LoRA and the picture. Changes no weight.

        From then on the job's clock stands, until `draw` has its turn. Raises: CodedError.
        """
        pipeline, library = self._parts.pipeline, self._parts.library
        request = parse_job(self._job)
        has_loras = self._job["input"].get("loras") not in (None, "")
        self._chosen: Chosen = self._parts.selection.choose(request, has_loras=has_loras)
        self.request = request = self._chosen.request
        self.route, warnings = choose_route(request, has_refiner=pipeline.has_refiner)
        self.warnings += [*request.warnings, *warnings]
        self._bucket = requested_bucket(self._job, library.cache.web) or self._parts.bucket
        self._stop.check()
        self.loaded = _load(library, request, self._timings, self._progress)
        if request.strict_loras:
            refuse_unused(self.loaded)
        self._prompts = pipeline.measure(request, self._words())
        self.warnings += self._prompts.warnings
        self.start = start_of(
            request, library.cache.web, pipeline.default_size, self.warnings.append
        )
        self._stop.wait()
        self._turn.waits()

    def _words(self) -> list[TokenEmbedding]:
        """The words that the LoRAs bring with them."""
        pairs = zip(self.request.loras, self.loaded, strict=True)
        return [word for use, loaded in pairs if use.scale for word in loaded.embeddings]

    def draw(self) -> None:
        """Applies the LoRAs, draws, and puts the weights back, holding the drawing lock.

        Raises: CodedError; RestoreFailed; any error of the device.
        """
        with self._parts.drawing:
            self._stop.go_on()
            self._stop.check()
            self._turn.draws(self.route.runs * len(self._alone()))
            try:
                self._parts.engine.settle()
                self.drawn = self._draw_with_loras() if self.loaded else Drawn(self._generate())
            finally:
                self._turn.ends()

    def _generate(self, block: Block | None = None) -> list[Image.Image]:
        images: list[Image.Image] = []
        for number, request in enumerate(self._alone()):
            if block and number:
                block.at(0.0)  # the next picture's denoising begins
            images += self._parts.pipeline.generate(
                request, self.route, self.start, self._timings, self._on_step(block)
            )
        return images

    def _alone(self) -> list[ImageRequest]:
        """What is drawn one after the other: the request, or one for each picture that has its own seed."""
        if self.request.seed_mode == "batch":
            return [self.request]
        seeds = [(self.request.seed + i) % 2**64 for i in range(self.request.num_images)]
        return [replace(self.request, seed=seed, num_images=1, seed_mode="batch") for seed in seeds]

    def _draw_with_loras(self) -> Drawn:
        request, timings = self.request, self._timings
        pipeline, engine = self._parts.pipeline, self._parts.engine
        pairs = list(zip(request.loras, self.loaded, strict=True))
        stack = [use.of(loaded.file) for use, loaded in pairs]
        with (
            pipeline.tokens(self._words()) as warnings,
            engine.applied(stack, self._mode(), request.num_inference_steps) as block,
        ):
            timings.add("apply", block.seconds)
            images = self._generate(block)
            drawn = time.perf_counter()
        timings.add("restore", time.perf_counter() - drawn)
        unheld = block.never_held()
        idle = (
            f"{self.loaded[place].entry.name}: no step lies between its start and end"
            for place in unheld
        )
        return Drawn(images, block.mode, (*warnings, *block.warnings, *idle), frozenset(unheld))

    def _mode(self) -> Mode:
        if self.request.lora_mode is None and any(use.ranged for use in self.request.loras):
            # Only dynamic mode has ranges, and the worker's setting must not refuse the request.
            return Mode.DYNAMIC
        return Mode(self.request.lora_mode or self._parts.settings.lora_mode)

    def _on_step(self, block: Block | None) -> StepCallback:
        """After each step: switches LoRAs with a range, reports progress, and ends a job that is to stop.

        A refiner's steps follow the base model's.
        """
        reached = 0.0

        def on_step(done: int, total: int, preview: Preview) -> None:
            nonlocal reached
            self._stop.check()
            self._turn.step(done, total)
            if block and done < total and done / total > reached:
                reached = done / total
                block.at(reached)
            self._progress.step(done, total, lambda: _as_uri(preview()))

        return on_step

    def answer(self) -> Answer:
        """The answer: pictures encoded and, where a bucket is set, uploaded. Raises: CodedError."""
        self._stop.check()
        limit, fallback = self._parts.settings.max_answer_mb, self.request.output_fallback
        answer = self._answer_in(self.request.output_format)
        try:
            guard_size(answer, limit)
        except OutputTooLarge as error:
            if fallback is None or fallback == self.request.output_format:
                raise
            answer = self._answer_in(fallback)
            answer["warnings"].append(f"{error.sentence}: the pictures are {fallback}")
            guard_size(answer, limit)
        return answer

    def _answer_in(self, file_format: str) -> Answer:
        parts, request, drawn = self._parts, self.request, self.drawn
        with self._timings.measure("encode"):
            loras = [
                parameters.Applied(loaded.entry.name, use, loaded.file.sha256)
                for use, loaded in zip(request.loras, self.loaded, strict=True)
            ]
            size, quality = drawn.images[0].size, request.output_quality
            alone = self._alone()
            texts = [parameters.write(one, parts.pipeline.name, size, loras) for one in alone]
            tight = [] if all(has_room(file_format, text) for text in texts) else [TOO_LONG]
            encoded = [
                encode(image, file_format, quality, text)
                for image, text in zip(drawn.images, cycle(texts), strict=False)
            ]
            urls = deliver(encoded, str(self._job.get("id", "job")), self._bucket)
        return {
            "images": urls,
            "image_url": urls[0],
            "seed": request.seed,
            **({"seeds": [one.seed for one in alone]} if request.seed_mode == "each" else {}),
            "model": parts.pipeline.name,
            **self._chosen.as_answer(),
            **self._prompts.as_answer(),
            "loras": [
                report(use, loaded, drawn.mode, in_range=place not in drawn.unheld)
                for place, (use, loaded) in enumerate(zip(request.loras, self.loaded, strict=True))
            ],
            "timings": {phase: round(s, 4) for phase, s in self._timings.seconds.items()},
            "warnings": [
                *parts.warnings,
                *self.warnings,
                *drawn.warnings,
                *tight,
                *self._of_files(),
            ],
        }

    def _of_files(self) -> list[str]:
        """What the LoRAs' files give reason to warn of."""
        left_out = "were not used (see unused_keys)"
        return [
            *(warning for one in self.loaded for warning in one.warnings),
            *(
                f"{one.entry.name}: {share_of_unused(one)} {left_out}"
                for one in self.loaded
                if one.file.unused
            ),
        ]


@dataclass(frozen=True)
class Drawn:
    """A job's pictures, and how its LoRAs were applied."""

    images: list[Image.Image]
    mode: Mode | None = None
    warnings: tuple[str, ...] = ()
    unheld: frozenset[int] = frozenset()
    """The places of the LoRAs whose range held no step."""


def _as_uri(preview: Image.Image | None) -> str | None:
    return encode(preview, "webp", PREVIEW_QUALITY, "").data_uri if preview else None


def _load(
    library: LoraLibrary, request: ImageRequest, timings: Timings, progress: Progress
) -> list[Loaded]:
    """The job's LoRAs, fetched at the same time; a phase takes as long as for the slowest of them."""
    if not request.loras:
        return []
    loaded = library.load_all([use.lora for use in request.loras], progress.download)
    timings.add("resolve", max(one.resolve_seconds for one in loaded))
    timings.add("download", max(one.download_seconds for one in loaded))
    timings.add("parse", max(one.parse_seconds for one in loaded))
    return loaded
