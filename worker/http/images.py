"""The server's routes of a worker for pictures."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from prometheus_client.registry import Collector
from starlette.routing import BaseRoute, Route

from lora.errors import nearest
from schemas import IMAGE_REQUEST, parse_job
from validation import InvalidInput, faults_of, field, number
from worker.actions import action_of
from worker.failures import ErrorText
from worker.http import serve as http_serve
from worker.http.app import Endpoint, Serving, job_of
from worker.http.exchange import Exchange
from worker.http.live import live_route
from worker.openai_answers import ModelNotFound, models_answer
from worker.parts import Answer, Job
from worker.queue.sender import Post

if TYPE_CHECKING:
    from handler import Worker

MOST = IMAGE_REQUEST["properties"]["num_images"]["maximum"]

OPENAI: dict[str, Any] = {
    "type": "object",
    "properties": {
        "model": field("string|null", None, "The base, or a preset"),
        "n": number("integer|null", None, (1, MOST), "How many pictures"),
        "size": field("string|null", None, "WIDTHxHEIGHT, or auto"),
        "response_format": field("string|null", None, "", enum=["b64_json", "url", None]),
        "output_compression": number("integer|null", None, (1, 100), "Quality of jpeg and webp"),
        "background": field("string|null", None, "", enum=["auto", "opaque", None]),
        "stream": field("boolean|null", None, "", enum=[False, None]),
    },
}
"""The fields of OpenAI's that are not fields of ours; the others go to the job as they are."""

WITHOUT_EFFECT = ("quality", "style", "moderation", "user", "safety_identifier", "partial_images")
"""Fields of OpenAI's that are taken and change nothing; the answer says so."""


class Images:
    """`/generate`, OpenAI's `/v1/images/generations` and `/v1/models`, and `/live`."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def routes(self, serving: Serving) -> list[BaseRoute]:
        """The routes."""
        self._serving = serving
        return [
            Route("/generate", Endpoint(serving, self._generate), methods=["POST"]),
            Route("/v1/images/generations", Endpoint(serving, self._draw), methods=["POST"]),
            Route("/v1/models", Endpoint(serving, self._models), methods=["GET"]),
            live_route(serving, self._worker),
        ]

    async def health(self) -> Answer:
        """The answer of the action `health`."""
        return await self._run({"id": uuid.uuid4().hex, "input": {"action": "health"}}, _nobody)

    def collectors(self) -> Iterable[Collector]:
        """None: what pictures took, the server counts itself."""
        return ()

    async def _generate(self, exchange: Exchange) -> None:
        with self._serving.jobs.ticket():
            job = job_of(await self._serving.read(exchange))
            exchange.wants_events = events = exchange.prefers_events()

            async def post(update: dict[str, Any]) -> None:
                await exchange.event("progress", update)

            work = self._in_line(job, post if events else _nobody)
            answer = await exchange.while_connected(work, beats=events)
        await exchange.answer(answer)

    async def _draw(self, exchange: Exchange) -> None:
        with self._serving.jobs.ticket():
            body = await self._serving.read(exchange)
            values, by_url = await asyncio.to_thread(self._values, body)
            work = self._in_line(job_of({"input": values}), _nobody)
            answer = openai_answer(await exchange.while_connected(work), by_url=by_url)
        idle = [name for name in WITHOUT_EFFECT if body.get(name) is not None]
        told = [f"{name} has no effect here" for name in idle]
        await exchange.answer({**answer, "warnings": [*answer["warnings"], *told]})

    async def _models(self, exchange: Exchange) -> None:
        presets, name = await asyncio.to_thread(self._presets), self._worker.parts.pipeline.name
        await exchange.answer(models_answer([name], name, sorted(presets)))

    def _presets(self) -> Collection[str]:
        return self._worker.parts.selection.presets.read()

    def _values(self, body: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
        """A job's input, and whether the answer has URLs. Raises: InvalidInput; ModelNotFound."""
        values, faults = translated(body)
        has_bucket, form = self._worker.parts.bucket is not None, body.get("response_format")
        if has_bucket and form == "b64_json":
            faults.append("response_format: pictures are uploaded here; only url is answered")
        if faults:
            try:
                parse_job({"input": values})
            except InvalidInput as error:
                faults += error.faults
            raise InvalidInput.of(faults)
        base, model = self._worker.parts.pipeline.name, body.get("model")
        if model not in (None, "", base, self._worker.settings.model):
            presets = self._presets()
            if model not in presets:
                hint = nearest(model, [base, *presets]) or f"The base is {base}."
                raise ModelNotFound(f"there is no model {model[:200]!r}", hint)
            if "lora_selection" in values:
                raise InvalidInput.of(["model names a preset, and lora_selection is given too"])
            values["lora_selection"] = model
        return values, has_bucket or form == "url"

    async def _in_line(self, job: Job, post: Post) -> Answer:
        """The answer, once it is the job's turn. Raises: the job's error; NotReady."""
        line = self._serving.actions if action_of(job) else self._serving.jobs
        async with line.place():
            return await self._run(job, post)

    async def _run(self, job: Job, post: Post) -> Answer:
        answer = await self._worker.handle(job, post)
        if answer.pop("refresh_worker", False):
            self._serving.give_up()
        if isinstance(error := answer.get("error"), ErrorText):
            raise error.error
        self._serving.metrics.drew(answer.get("timings", {}))
        return answer


async def _nobody(update: dict[str, Any]) -> None:
    """Takes an update for which nobody asked."""


def translated(body: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """OpenAI's body as a job's input, and what is wrong with OpenAI's own fields."""
    own = OPENAI["properties"]
    given = {name: value for name, value in body.items() if value is not None}
    values = {n: v for n, v in given.items() if n not in own and n not in WITHOUT_EFFECT}
    faults = list(faults_of(OPENAI, {n: v for n, v in given.items() if n in own}, ""))
    meant = {"num_images": given.get("n"), "output_quality": given.get("output_compression")}
    size = given.get("size", "auto")
    if sides := re.fullmatch(r"(\d{1,5})x(\d{1,5})", str(size)):
        meant |= {"width": int(sides[1]), "height": int(sides[2])}
    elif size != "auto" and isinstance(size, str):
        faults.append("size: not WIDTHxHEIGHT, such as 1024x1024, and not auto")
    for name, value in meant.items():
        if value is not None and name in values:
            faults.append(f"{name} is given twice, once in OpenAI's words")
    if "action" in values:
        faults.append("action is not a field (leave it out)")
    new = {name: value for name, value in meant.items() if value is not None}
    return ({**values, **new} if not faults else values), faults


def openai_answer(answer: Mapping[str, Any], *, by_url: bool) -> Answer:
    """The job's answer in OpenAI's shape, with what ours has besides."""
    words = {"revised_prompt": answer["prompt"]} if "prompt" in answer else {}
    data = [
        {"url": url, **words} if by_url else {"b64_json": url.partition(",")[2], **words}
        for url in answer["images"]
    ]
    besides = {n: v for n, v in answer.items() if n not in ("images", "image_url", "prompt")}
    return {"created": int(time.time()), "data": data, **besides}


def serve(worker: Worker) -> None:
    """Serves HTTP while the models load, and after. Raises: as `worker.http.serve.serve`, WeightsMissing."""
    http_serve.serve(worker.settings, Images(worker), lambda: worker.setup().check_fitness())
