"""The server's routes of a worker for text."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from contextlib import aclosing
from typing import Any

from prometheus_client.registry import Collector
from starlette.routing import BaseRoute, Route

from worker.actions import action_of
from worker.http import serve as http_serve
from worker.http.app import Endpoint, Serving, job_of
from worker.http.exchange import Exchange
from worker.openai_answers import ErrorBody
from worker.parts import Answer, Job
from worker.text.input import MODELS, ROUTES
from worker.text.parameters import CHAT, COMPLETION
from worker.text.statistics import Figures
from worker.text.worker import TextWorker


class Texts:
    """`/generate`, and OpenAI's `/v1/chat/completions`, `/v1/completions` and `/v1/models`."""

    def __init__(self, worker: TextWorker) -> None:
        self._worker = worker

    def routes(self, serving: Serving) -> list[BaseRoute]:
        """The routes."""
        self._serving = serving
        asked = {CHAT: ("POST", self._openai), COMPLETION: ("POST", self._openai)}
        asked[MODELS] = ("GET", self._models)
        return [
            Route("/generate", Endpoint(serving, self._generate), methods=["POST"]),
            *(
                Route(path, Endpoint(serving, asked[kind][1]), methods=[asked[kind][0]])
                for path, kind in ROUTES.items()
            ),
        ]

    async def health(self) -> Answer:
        """The answer of the action `health`."""
        return await self._one({"action": "health"})

    def collectors(self) -> Iterable[Collector]:
        """The statistics of the texts."""
        worker = self._worker
        return (Figures(worker.statistics, lambda: worker.counts),)

    async def _generate(self, exchange: Exchange) -> None:
        exchange.wants_events = exchange.prefers_events()
        with self._serving.jobs.ticket():
            await self._answer(exchange, job_of(await self._serving.read(exchange)))

    async def _openai(self, exchange: Exchange) -> None:
        with self._serving.jobs.ticket():
            body = await self._serving.read(exchange)
            route = exchange.request.url.path
            await self._answer(
                exchange, job_of({"input": {"openai_route": route, "openai_input": body}})
            )

    async def _models(self, exchange: Exchange) -> None:
        await exchange.answer(await self._one({"openai_route": "/v1/models"}))

    async def _one(self, given: Mapping[str, Any]) -> Answer:
        """The answer to a job that has one piece and waits for no other."""
        job = {"id": uuid.uuid4().hex, "input": given}
        (answer,) = [piece async for piece in self._worker.handle(job)]
        return answer

    async def _answer(self, exchange: Exchange, job: Job) -> None:
        streams = exchange.wants_events or _streams(job["input"])
        await exchange.while_connected(self._in_line(exchange, job), beats=streams)

    async def _in_line(self, exchange: Exchange, job: Job) -> None:
        """Sends the job's pieces as they come, once it is the job's turn. Raises: NotReady."""
        line = self._serving.actions if action_of(job) else self._serving.jobs

        async def post(update: dict[str, Any]) -> None:
            if exchange.wants_events:
                await exchange.event("progress", update)

        async with line.place(), aclosing(self._worker.handle(job, post)) as pieces:
            async for piece in pieces:
                if isinstance(piece, str):
                    await exchange.write(piece)
                elif isinstance(error := piece.get("error"), ErrorBody):
                    await exchange.refuse(piece)
                    if error["code"] == "WORKER_CLOSED":  # weights could not be put back
                        self._serving.give_up()
                    return
                else:
                    await exchange.answer(piece)
                    return
        await exchange.close()


def _streams(given: Any) -> bool:
    """Whether an input, or OpenAI's body in it, asks for a stream."""
    if not isinstance(given, Mapping):
        return False
    inner = (given.get("openai_input"), given.get("body"))
    return bool(given.get("stream")) or any(map(_streams, inner))


def serve(worker: TextWorker) -> None:
    """Serves HTTP while the base loads, and after. Raises: as `worker.http.serve.serve`, ModelUnusable."""
    http_serve.serve(worker.settings, Texts(worker), worker.setup)
