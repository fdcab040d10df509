"""The job handler: `python handler.py` starts the RunPod worker; importing this does nothing.

`Worker` does four things per job: parse, load the LoRAs, generate with them applied, answer. Every job
ends in an answer, and after every job the pipeline is bit for bit what it was before.
"""

from __future__ import annotations

import gc
import logging
import os
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from PIL import Image

from lora.engine import Block, Budgets, LoraEngine, RestoreFailed
from lora.errors import CodedError, LoraUnsupported
from lora.library import Loaded, LoraLibrary
from lora.sources import Reference, parse, redact_url
from lora.stack import LoraUse, Mode
from lora.web import quiet_libraries
from pipelines.image import ImagePipeline, Route, StepCallback, Timings, choose_route
from pipelines.loading import load_models
from schemas import ImageRequest, LoraRequest, parse_job
from settings import Settings
from worker.inputs import load_picture
from worker.outputs import (
    Bucket,
    deliver,
    encode,
    guard_size,
    open_bucket,
    parameters_text,
)
from worker.progress import Progress

log = logging.getLogger("worker")

Job = Mapping[str, Any]
Answer = dict[str, Any]
SendProgress = Callable[[Job, dict[str, Any]], None]

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


@dataclass(frozen=True)
class Parts:
    """What setup makes and every job uses."""

    pipeline: ImagePipeline
    engine: LoraEngine
    library: LoraLibrary
    bucket: Bucket | None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What every answer must tell: a volume that cannot be written."""
        trouble = self.library.cache.shelf.trouble
        return (trouble,) if trouble else ()


class Worker:
    """Serves jobs, one at a time. All state is in `parts`."""

    def __init__(self, settings: Settings, send_progress: SendProgress | None = None) -> None:
        self.settings = settings
        self._send = send_progress or (lambda job, update: log.debug("%s", update["text"]))
        self._drawing = threading.Lock()
        self.preloaded: dict[str, str] = {}
        """What became of each source of LORA_PRELOAD: `under way`, `ready`, or an error."""

    def setup(self) -> Worker:
        """Loads the models and opens the cache, so that the first job finds them; returns itself.

        Raises: WeightsMissing, or whatever keeps the models from loading: then no job can be served.
        """
        begun = time.perf_counter()
        log.info("%s is ready after %.1f s", self.parts.pipeline.name, time.perf_counter() - begun)
        if self.settings.preload:
            self.preloaded = {redact_url(source): "under way" for source in self.settings.preload}
            threading.Thread(target=self._preload, name="preload", daemon=True).start()
        return self

    @cached_property
    def parts(self) -> Parts:
        """What every job uses; made when it is first asked for."""
        pipeline = ImagePipeline(load_models(self.settings))
        settings = self.settings
        budgets = Budgets(
            int(settings.lora_originals_gb * 1e9), int(settings.lora_prepared_gb * 1e9)
        )
        engine = LoraEngine(pipeline.components, budgets)
        lora_cache = settings.open_cache()
        with suppress(OSError):  # whoever needs to write will say so
            lora_cache.shelf.prepare()
        library = LoraLibrary(lora_cache, engine.key_map, int(settings.lora_warm_gb * 1e9))
        return Parts(pipeline, engine, library, open_bucket(self.settings))

    def check_fitness(self) -> None:
        """Raises: CodedError if this worker cannot be right: LORA_PRELOAD names what can mean nothing.

        A preloaded LoRA that cannot be had at the moment is logged, and is no reason to stop.
        """
        for source in self.settings.preload:
            parse(Reference(source))
        log.info("preloading: %s", self.preloaded or "nothing")

    def _preload(self) -> None:
        for source in self.settings.preload:
            try:
                self.parts.library.load(Reference(source))
                self.preloaded[redact_url(source)] = "ready"
            except CodedError as error:
                self.preloaded[redact_url(source)] = str(error)
                log.warning("LORA_PRELOAD: %s", error)

    def __call__(self, job: Job) -> Answer:
        """The answer to a job, or `{"error": "CODE: sentence. hint"}`. Never raises.

        `refresh_worker` is in it where the process must not go on: weights that could not be put back,
        memory that did not suffice, a device that failed.
        """
        try:
            return self._answer(job)
        except RestoreFailed as error:
            return _failure(error, refresh=True)
        except CodedError as error:
            return _failure(error)
        except torch.OutOfMemoryError:
            log.warning("out of memory")
        except torch.AcceleratorError as error:
            return _failure(_unexpected(error), refresh=True)
        except Exception as error:  # noqa: BLE001 - the last line: a job must end in an answer
            return _failure(_unexpected(error))
        # Here, and not in the clause above: there the error still holds the job's tensors.
        self.parts.engine.free()
        self.parts.library.free()
        gc.collect()
        torch.cuda.empty_cache()
        return _failure(OutOfMemory("the device's memory did not suffice", OOM_HINT), refresh=True)

    def _answer(self, job: Job) -> Answer:
        parts = self.parts
        request = parse_job(job)
        route, warnings = choose_route(request, has_refiner=parts.pipeline.has_refiner)
        timings = Timings(dict.fromkeys(PHASES, 0.0))
        progress = Progress(lambda update: self._send(job, update))
        loaded = _load(parts.library, request, timings, progress)
        if request.strict_loras:
            _refuse_unused(loaded)
        picture = (
            load_picture(request.image_url, parts.library.cache.web) if request.image_url else None
        )
        drawn = self._generate(request, route, picture, loaded, timings, progress)
        with timings.measure("encode"):
            text = _parameters(parts.pipeline, request, drawn.images[0], loaded)
            encoded = [
                encode(i, request.output_format, request.output_quality, text) for i in drawn.images
            ]
            name = self.settings.bucket_name
            urls = deliver(encoded, str(job.get("id", "job")), parts.bucket, name)
        answer: Answer = {
            "images": urls,
            "image_url": urls[0],
            "seed": request.seed,
            "model": parts.pipeline.name,
            "loras": [
                _report(use, found, drawn.mode)
                for use, found in zip(request.loras, loaded, strict=True)
            ],
            "timings": {phase: round(s, 4) for phase, s in timings.seconds.items()},
            "warnings": [
                *parts.warnings,
                *request.warnings,
                *warnings,
                *drawn.warnings,
                *(warning for one in loaded for warning in one.warnings),
                *_unused_warnings(loaded),
            ],
        }
        guard_size(answer, self.settings.max_answer_mb)
        return answer

    def _generate(
        self,
        request: ImageRequest,
        route: Route,
        picture: Image.Image | None,
        loaded: list[Loaded],
        timings: Timings,
        progress: Progress,
    ) -> Drawn:
        """Draws with the LoRAs applied; a request without LoRAs does not touch the engine."""
        pipeline, engine = self.parts.pipeline, self.parts.engine
        with self._drawing:  # no job may draw while another's LoRAs are applied
            engine.settle()
            if not loaded:
                return Drawn(pipeline.generate(request, route, picture, timings, progress.step))
            stack = [_use(lora, found) for lora, found in zip(request.loras, loaded, strict=True)]
            words = [
                word
                for use, found in zip(stack, loaded, strict=True)
                if use.scale
                for word in found.embeddings
            ]
            with (
                pipeline.tokens(words) as warnings,
                engine.applied(stack, self._mode(request), request.num_inference_steps) as block,
            ):
                timings.add("apply", block.seconds)
                images = pipeline.generate(
                    request, route, picture, timings, _steps(block, progress)
                )
                drawn = time.perf_counter()
            timings.add("restore", time.perf_counter() - drawn)
            unheld = [
                f"{loaded[place].entry.name}: no step lies between its start and end"
                for place in block.never_held()
            ]
        return Drawn(images, block.mode, (*warnings, *block.warnings, *unheld))

    def _mode(self, request: ImageRequest) -> Mode:
        if request.lora_mode is None and any(lora.ranged for lora in request.loras):
            return (
                Mode.DYNAMIC
            )  # the worker's setting is no reason to refuse what only dynamic can do
        return Mode(request.lora_mode or self.settings.lora_mode)


@dataclass(frozen=True)
class Drawn:
    """A job's pictures, and how its LoRAs were applied."""

    images: list[Image.Image]
    mode: Mode | None = None
    warnings: tuple[str, ...] = ()


def _use(lora: LoraRequest, found: Loaded) -> LoraUse:
    return LoraUse(
        found.file, lora.scale, lora.components, lora.blocks, start=lora.start, end=lora.end
    )


def _steps(block: Block, progress: Progress) -> StepCallback:
    """Tells the LoRAs and the client how far the drawing is. A refiner's steps come after the base's."""
    reached = 0.0

    def on_step(done: int, total: int) -> None:
        nonlocal reached
        if done < total and done / total > reached:
            reached = done / total
            block.at(reached)
        progress.step(done, total)

    return on_step


class OutOfMemory(CodedError):
    """The device's memory did not suffice for the job."""

    code = "OUT_OF_MEMORY"


OOM_HINT = "Ask for fewer or smaller pictures."


class Unexpected(CodedError):
    """Anything that nobody foresaw: a fault of the worker."""

    code = "INTERNAL"


def _unexpected(error: Exception) -> Unexpected:
    """Logs where it happened, and not what it said: exceptions' texts may hold a URL or a token."""
    log.error("%s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
    words = f"the job failed unexpectedly ({type(error).__name__})"
    return Unexpected(words, "This is a fault of the worker; its log has the place.")


def _failure(error: CodedError, *, refresh: bool = False) -> Answer:
    log.info("job failed: %s", error)
    return {"error": str(error), "refresh_worker": True} if refresh else {"error": str(error)}


def _load(
    library: LoraLibrary, request: ImageRequest, timings: Timings, progress: Progress
) -> list[Loaded]:
    """The job's LoRAs. They come in at the same time: each phase counts as long as the slowest takes."""
    if not request.loras:
        return []
    loaded = library.load_all([lora.reference for lora in request.loras], progress.download)
    timings.add("resolve", max(one.resolve_seconds for one in loaded))
    timings.add("download", max(one.download_seconds for one in loaded))
    timings.add("parse", max(one.parse_seconds for one in loaded))
    return loaded


MAX_UNUSED = 1000
"""How many unused tensors an answer lists; the warning has the count."""


def _report(lora: LoraRequest, loaded: Loaded, mode: Mode | None) -> dict[str, Any]:
    """What the answer says of one LoRA."""
    file, use = loaded.file, _use(lora, loaded)
    layers = len({layer.target for layer in file.layers if use.scale_of(layer.target)})
    words = sorted({word.word for word in loaded.embeddings}) if lora.scale else []
    return {
        "source": lora.reference.shown,
        "file": loaded.entry.name,
        "sha256": file.sha256,
        "origin": "downloaded" if loaded.entry.downloaded else "cached",
        "algorithm": "+".join(file.algorithms),
        "rank": file.rank,
        "layers": layers,
        "words": words,
        "used_keys": file.keys,
        "unused_keys": [
            {"key": unused.key[:200], "reason": unused.reason}
            for unused in file.unused[:MAX_UNUSED]
        ],
        "scale": {"all": lora.scale, **lora.components} if lora.components else lora.scale,
        "mode": mode,
        "status": "applied" if layers or words else "scale is 0",
    }


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


@cache
def default_worker() -> Worker:
    """The worker of this process, by its environment; the models are loaded when it is first asked for."""
    return Worker(Settings.from_env(os.environ)).setup()


def generate_image(job: Job) -> Answer:
    """The handler function: a job in, its answer out. See `Worker.__call__`.

    The first call loads the models, and raises what keeps them from loading.
    """
    return default_worker()(job)


def main() -> None:
    """Loads the models, then serves RunPod's jobs for ever (or one, with --test_input)."""
    import runpod

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    quiet_libraries()
    worker = default_worker()
    runpod.serverless.register_fitness_check(worker.check_fitness)
    runpod.serverless.start({"handler": generate_image})


if __name__ == "__main__":
    main()
