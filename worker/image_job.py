"""One image job, from the request to the answer: prepare, draw, answer."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from PIL import Image

from lora.engine.engine import Block
from lora.engine.stack import LoraUse, Mode
from lora.errors import LoraUnsupported
from lora.fetch.sources import Reference
from lora.volume.loader import Loaded, LoraLibrary
from pipelines.image import Preview, StepCallback, Timings
from pipelines.routes import Route, choose_route
from schemas import ImageRequest, parse_job
from worker.inputs import load_picture
from worker.intake import Turn
from worker.outputs import (
    OutputTooLarge,
    deliver,
    encode,
    guard_size,
    parameters_text,
    requested_bucket,
)
from worker.parts import Answer, Job, Parts
from worker.progress import Progress
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


class ImageJob:
    """One job. Its three stages are called once each, in order, from any thread."""

    request: ImageRequest
    """The job's request, with the additions of its presets."""
    route: Route
    loaded: list[Loaded]
    picture: Image.Image | None = None
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
        has_loras = self._job["input"].get("loras") is not None
        self._chosen: Chosen = self._parts.selection.choose(request, has_loras=has_loras)
        self.request = request = self._chosen.request
        self.route, warnings = choose_route(request, has_refiner=pipeline.has_refiner)
        self.warnings += [*request.warnings, *warnings]
        self._bucket = requested_bucket(self._job, library.cache.web) or self._parts.bucket
        self._stop.check()
        self.loaded = _load(library, request, self._timings, self._progress)
        if request.strict_loras:
            _refuse_unused(self.loaded)
        if request.image_url:
            self.picture = load_picture(request.image_url, library.cache.web)
        self._stop.wait()
        self._turn.waits()

    def draw(self) -> None:
        """Applies the LoRAs, draws, and puts the weights back, holding the drawing lock.

        Raises: CodedError; RestoreFailed; any error of the device.
        """
        with self._parts.drawing:
            self._stop.go_on()
            self._stop.check()
            self._turn.draws(self.route.runs)
            try:
                self._parts.engine.settle()
                self.drawn = self._draw_with_loras() if self.loaded else Drawn(self._generate())
            finally:
                self._turn.ends()

    def _generate(self, block: Block | None = None) -> list[Image.Image]:
        return self._parts.pipeline.generate(
            self.request, self.route, self.picture, self._timings, self._on_step(block)
        )

    def _draw_with_loras(self) -> Drawn:
        request, timings = self.request, self._timings
        pipeline, engine = self._parts.pipeline, self._parts.engine
        pairs = list(zip(request.loras, self.loaded, strict=True))
        stack = [use.of(loaded.file) for use, loaded in pairs]
        words = [word for use, loaded in pairs if use.scale for word in loaded.embeddings]
        with (
            pipeline.tokens(words) as warnings,
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
                (loaded.entry.path.stem, use.scale, loaded.file.sha256)
                for use, loaded in zip(request.loras, self.loaded, strict=True)
            ]
            text = parameters_text(request, parts.pipeline.name, drawn.images[0].size, loras)
            quality = request.output_quality
            encoded = [encode(image, file_format, quality, text) for image in drawn.images]
            urls = deliver(encoded, str(self._job.get("id", "job")), self._bucket)
        return {
            "images": urls,
            "image_url": urls[0],
            "seed": request.seed,
            "model": parts.pipeline.name,
            **self._chosen.as_answer(),
            "loras": [
                _report(use, loaded, drawn.mode, in_range=place not in drawn.unheld)
                for place, (use, loaded) in enumerate(zip(request.loras, self.loaded, strict=True))
            ],
            "timings": {phase: round(s, 4) for phase, s in self._timings.seconds.items()},
            "warnings": [
                *parts.warnings,
                *self.warnings,
                *drawn.warnings,
                *(warning for one in self.loaded for warning in one.warnings),
                *(
                    f"{one.entry.name}: {_share_of_unused(one)} were not used (see unused_keys)"
                    for one in self.loaded
                    if one.file.unused
                ),
            ],
        }


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


MAX_UNUSED = 1000
"""Most unused tensors that an answer lists; its warning has the whole count."""


def _report(
    use: LoraUse[Reference], loaded: Loaded, mode: Mode | None, *, in_range: bool
) -> dict[str, Any]:
    """One LoRA's entry in the answer."""
    file = loaded.file
    # Text encoders do not denoise, so a range does not concern them.
    drawn = use if in_range else use.without("unet")
    layers = len({layer.target for layer in file.layers if drawn.scale_of(layer.target)})
    words = sorted({word.word for word in loaded.embeddings}) if use.scale else []
    return {
        **about(loaded),
        "layers": layers,
        "words": words,
        "used_keys": file.keys,
        "unused_keys": unused_keys(loaded),
        "scale": {"all": use.scale, **use.components} if use.components else use.scale,
        "mode": mode,
        "status": "applied"
        if layers or words
        else "scale is 0"
        if in_range
        else "no step in its range",
    }


def about(loaded: Loaded) -> dict[str, Any]:
    """What every answer says of a LoRA."""
    return {
        "source": loaded.reference.shown,
        "file": loaded.entry.name,
        "sha256": loaded.file.sha256,
        "origin": "downloaded" if loaded.entry.downloaded else "cached",
        "algorithm": "+".join(loaded.file.algorithms),
        "rank": loaded.file.rank,
    }


def unused_keys(loaded: Loaded) -> list[dict[str, str]]:
    """The first `MAX_UNUSED` tensors that cannot be used, each with its reason."""
    return [
        {"key": unused.key[:200], "reason": unused.reason}
        for unused in loaded.file.unused[:MAX_UNUSED]
    ]


def _refuse_unused(loaded: list[Loaded]) -> None:
    """Raises: LoraUnsupported if a file has a tensor that cannot be used."""
    for lora in loaded:
        if unused := lora.file.unused:
            raise LoraUnsupported(
                f"{lora.reference.shown}: {_share_of_unused(lora)} cannot be used "
                f"({unused[0].key[:200]}: {unused[0].reason})",
                "Without strict_loras the other tensors are used.",
            )


def _share_of_unused(lora: Loaded) -> str:
    count = len(lora.file.unused)
    return f"{count} of {lora.file.keys + count} tensors"
