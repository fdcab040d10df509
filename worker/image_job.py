"""One job's way from the request to the answer: prepare, draw, answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from lora.engine.engine import Block, LoraEngine
from lora.engine.stack import LoraUse, Mode
from lora.errors import LoraUnsupported
from lora.fetch.sources import Reference
from lora.library.catalog import Catalog
from lora.volume.loader import Loaded, LoraLibrary
from lora.volume.presets import Presets
from pipelines.image import ImagePipeline, Preview, Route, StepCallback, Timings, choose_route
from schemas import ImageRequest, parse_job
from settings import Settings
from worker.inputs import load_picture
from worker.opening import default_loras
from worker.outputs import (
    Bucket,
    OutputTooLarge,
    deliver,
    encode,
    guard_size,
    parameters_text,
    requested_bucket,
)
from worker.progress import Progress
from worker.selection import Chosen, Selection
from worker.stop import Stop

Job = Mapping[str, Any]
Answer = dict[str, Any]

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
"""The answer's timings, in the order in which they happen."""


PREVIEW_QUALITY = 70


@dataclass(frozen=True)
class Parts:
    """What setup makes and every job uses."""

    pipeline: ImagePipeline
    engine: LoraEngine
    library: LoraLibrary
    bucket: Bucket | None
    settings: Settings
    drawing: threading.Lock
    """Held while weights are changed and pictures drawn: one job at a time."""

    @cached_property
    def catalog(self) -> Catalog:
        """The volume's LoRAs as a library."""
        training, cache = self.settings.lora_training_dir, self.library.cache
        folder = Path(training) if training else None
        return Catalog(cache, self.engine.key_map, folder, self.settings.model)

    @cached_property
    def selection(self) -> Selection:
        """The presets, and what a job gets that asks for no LoRA."""
        settings, presets = self.settings, Presets(self.library.cache.shelf.root)
        return Selection(presets, settings.lora_default_preset, default_loras(settings))

    @property
    def warnings(self) -> tuple[str, ...]:
        """What every answer must tell: a volume that cannot be written."""
        trouble = self.library.cache.shelf.trouble
        return (trouble,) if trouble else ()


class ImageJob:
    """One job. Its three stages are called in order, each once, by whatever thread."""

    request: ImageRequest
    """With what its presets add."""
    route: Route
    loaded: list[Loaded]
    picture: Image.Image | None = None
    drawn: Drawn

    def __init__(self, parts: Parts, job: Job, progress: Progress, stop: Stop) -> None:
        self._parts, self._job, self._progress, self._stop = parts, job, progress, stop
        self._timings = Timings(dict.fromkeys(PHASES, 0.0))
        self.warnings: list[str] = []
        """What the answer must tell, beyond what the pictures and LoRAs themselves bring."""

    def prepare(self) -> None:
        """Checks the request, and brings every LoRA and the picture here. Changes no weight.

        Raises: CodedError.
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

    def draw(self) -> None:
        """Applies the LoRAs, draws, puts the weights back. Holds the drawing lock.

        Raises: CodedError; RestoreFailed; whatever the device raises.
        """
        with self._parts.drawing:
            self._stop.check()
            self._parts.engine.settle()
            self.drawn = self._draw_with_loras() if self.loaded else Drawn(self._generate())

    def _generate(self, block: Block | None = None) -> list[Image.Image]:
        return self._parts.pipeline.generate(
            self.request, self.route, self.picture, self._timings, self._on_step(block)
        )

    def _draw_with_loras(self) -> Drawn:
        request, timings = self.request, self._timings
        pipeline, engine = self._parts.pipeline, self._parts.engine
        pairs = list(zip(request.loras, self.loaded, strict=True))
        stack = [use.of(found.file) for use, found in pairs]
        words = [word for use, found in pairs if use.scale for word in found.embeddings]
        with (
            pipeline.tokens(words) as warnings,
            engine.applied(stack, self._mode(), request.num_inference_steps) as block,
        ):
            timings.add("apply", block.seconds)
            images = self._generate(block)
            drawn = time.perf_counter()
        timings.add("restore", time.perf_counter() - drawn)
        unheld = [
            f"{self.loaded[place].entry.name}: no step lies between its start and end"
            for place in block.never_held()
        ]
        return Drawn(images, block.mode, (*warnings, *block.warnings, *unheld))

    def _mode(self) -> Mode:
        if self.request.lora_mode is None and any(use.ranged for use in self.request.loras):
            # The worker's setting is no reason to refuse what only dynamic can do.
            return Mode.DYNAMIC
        return Mode(self.request.lora_mode or self._parts.settings.lora_mode)

    def _on_step(self, block: Block | None) -> StepCallback:
        """Tells the LoRAs and the client how far it is; ends a job that is to stop.

        A refiner's steps come after the base's.
        """
        reached = 0.0

        def on_step(done: int, total: int, preview: Preview) -> None:
            nonlocal reached
            self._stop.check()
            if block and done < total and done / total > reached:
                reached = done / total
                block.at(reached)
            self._progress.step(done, total, lambda: _as_uri(preview()))

        return on_step

    def answer(self) -> Answer:
        """The answer, its pictures encoded and, where a bucket is set, uploaded. Raises: CodedError."""
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
            text = _parameters(parts.pipeline, request, drawn.images[0], self.loaded)
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
                _report(use, found, drawn.mode)
                for use, found in zip(request.loras, self.loaded, strict=True)
            ],
            "timings": {phase: round(s, 4) for phase, s in self._timings.seconds.items()},
            "warnings": [
                *parts.warnings,
                *self.warnings,
                *drawn.warnings,
                *(warning for one in self.loaded for warning in one.warnings),
                *_unused_warnings(self.loaded),
            ],
        }


@dataclass(frozen=True)
class Drawn:
    """A job's pictures, and how its LoRAs were applied."""

    images: list[Image.Image]
    mode: Mode | None = None
    warnings: tuple[str, ...] = ()


def _as_uri(preview: Image.Image | None) -> str | None:
    return encode(preview, "webp", PREVIEW_QUALITY, "").data_uri if preview else None


def _load(
    library: LoraLibrary, request: ImageRequest, timings: Timings, progress: Progress
) -> list[Loaded]:
    """The job's LoRAs. They come in at the same time: each phase counts as long as the slowest takes."""
    if not request.loras:
        return []
    loaded = library.load_all([use.lora for use in request.loras], progress.download)
    timings.add("resolve", max(one.resolve_seconds for one in loaded))
    timings.add("download", max(one.download_seconds for one in loaded))
    timings.add("parse", max(one.parse_seconds for one in loaded))
    return loaded


MAX_UNUSED = 1000
"""How many unused tensors an answer lists; the warning has the count."""


def _report(use: LoraUse[Reference], loaded: Loaded, mode: Mode | None) -> dict[str, Any]:
    """What the answer says of one LoRA."""
    file = loaded.file
    layers = len({layer.target for layer in file.layers if use.scale_of(layer.target)})
    words = sorted({word.word for word in loaded.embeddings}) if use.scale else []
    return {
        "source": use.lora.shown,
        "file": loaded.entry.name,
        "sha256": file.sha256,
        "origin": "downloaded" if loaded.entry.downloaded else "cached",
        "algorithm": "+".join(file.algorithms),
        "rank": file.rank,
        "layers": layers,
        "words": words,
        "used_keys": file.keys,
        "unused_keys": unused_keys(loaded),
        "scale": {"all": use.scale, **use.components} if use.components else use.scale,
        "mode": mode,
        "status": "applied" if layers or words else "scale is 0",
    }


def unused_keys(loaded: Loaded) -> list[dict[str, str]]:
    """The tensors that cannot be used, each with its reason; the first `MAX_UNUSED`."""
    return [
        {"key": unused.key[:200], "reason": unused.reason}
        for unused in loaded.file.unused[:MAX_UNUSED]
    ]


def _refuse_unused(loaded: list[Loaded]) -> None:
    """Raises: LoraUnsupported if a file has a tensor that cannot be used."""
    for one in loaded:
        if unused := one.file.unused:
            raise LoraUnsupported(
                f"{one.reference.shown}: {len(unused)} of {one.file.keys + len(unused)} tensors cannot be "
                f"used ({unused[0].key[:200]}: {unused[0].reason})",
                "Leave out strict_loras to use the others.",
            )


def _unused_warnings(loaded: list[Loaded]) -> list[str]:
    return [
        f"{one.entry.name}: {len(one.file.unused)} of {one.file.keys + len(one.file.unused)} "
        "tensors were not used (see unused_keys)"
        for one in loaded
        if one.file.unused
    ]


def _parameters(
    pipeline: ImagePipeline, request: ImageRequest, picture: Image.Image, loaded: list[Loaded]
) -> str:
    values = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "steps": request.num_inference_steps,
        "scheduler": request.scheduler,
        "guidance_scale": request.guidance_scale,
        "seed": request.seed,
        "size": f"{picture.width}x{picture.height}",
        "model": pipeline.name,
    }
    loras = [
        (one.entry.path.stem, use.scale, one.file.sha256)
        for use, one in zip(request.loras, loaded, strict=True)
    ]
    return parameters_text(values, loras)
