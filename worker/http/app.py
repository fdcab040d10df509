"""What all of the server's routes share: who may ask, when, how much; and `/ping`, `/health`, `/metrics`."""

from __future__ import annotations

import hmac
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping
from enum import StrEnum
from typing import Any, Protocol
from urllib.parse import urlsplit

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from lora.errors import CodedError
from settings import Settings
from validation import InvalidInput
from worker.failures import unexpected
from worker.http.errors import NoSuchRoute, NotReady, Unauthorized, ending
from worker.http.exchange import Exchange, Json
from worker.http.line import Line
from worker.http.metrics import Metrics
from worker.openai_answers import error_answer
from worker.parts import Answer, Job

ACTIONS = 4
"""Actions that are worked on at once, beside the jobs."""

BESIDE_INPUT = ("s3Config", "policy")
"""What a job may have beside its input."""


class State(StrEnum):
    """How far the server is."""

    LOADING = "loading"
    READY = "ready"
    ENDING = "ending"


class Kind(Protocol):
    """A worker's own routes. Until the server is ready, nothing of the worker is asked for."""

    def routes(self, serving: Serving) -> list[BaseRoute]:
        """The routes."""

    async def health(self) -> Answer:
        """The answer of the action `health`."""

    def collectors(self) -> Iterable[Collector]:
        """Figures for `/metrics`, besides the server's own."""


class Serving:
    """The server's state, and the two lines in which its requests stand."""

    def __init__(self, settings: Settings, give_up: Callable[[], None]) -> None:
        """`give_up`: ends the server, because its process must not go on."""
        self.settings, self.give_up = settings, give_up
        self.state = State.LOADING
        self.jobs = Line(settings.concurrency, settings.waiting)
        self.actions = Line(ACTIONS, settings.waiting)
        self.metrics = Metrics(self.jobs)

    def end(self) -> None:
        """Takes nothing more, and sends away who waits."""
        self.state = State.ENDING
        self.jobs.close()
        self.actions.close()

    def check_ready(self) -> None:
        """Raises: NotReady."""
        if self.state is State.LOADING:
            raise NotReady("the models are still loaded", "/ping answers 200 when they are there.")
        if self.state is State.ENDING:
            raise ending()

    def check_key(self, headers: Mapping[str, str]) -> None:
        """Raises: Unauthorized."""
        key = self.settings.api_key
        scheme, _, sent = headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(sent.strip().encode(errors="replace"), key.encode())
        if key and not (same and scheme.lower() == "bearer"):
            raise Unauthorized("the key is missing or wrong", "Send Authorization: Bearer KEY.")

    def check_origin(self, headers: Mapping[str, str]) -> None:
        """Raises: Unauthorized if any web site that a person visits asks, through the person's browser."""
        origin = headers.get("origin")
        if origin and not self.settings.api_key and urlsplit(origin).netloc != headers.get("host"):
            raise Unauthorized(
                "a web page of another site asks", "Set WORKER_API_KEY, and send it from there."
            )

    async def read(self, exchange: Exchange) -> dict[str, Any]:
        """The request's body. Raises: BodyTooLarge; InvalidInput."""
        return await exchange.read(self.settings.max_body_mb)


class Endpoint:
    """One route: lets in who may ask, and turns whatever goes wrong into an answer."""

    def __init__(
        self,
        serving: Serving,
        work: Callable[[Exchange], Awaitable[None]],
        *,
        needs_ready: bool = True,
        needs_key: bool = True,
    ) -> None:
        self._serving, self._work = serving, work
        self._needs_ready, self._needs_key = needs_ready, needs_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        begun, exchange = time.monotonic(), Exchange(scope, receive, send)
        try:
            await self._answer(exchange)
        except ClientDisconnect:
            pass
        finally:
            seconds = time.monotonic() - begun
            self._serving.metrics.answered(str(scope["path"]), exchange.status, seconds)

    async def _answer(self, exchange: Exchange) -> None:
        try:
            if self._needs_key:
                self._serving.check_key(exchange.request.headers)
                self._serving.check_origin(exchange.request.headers)
            if self._needs_ready:
                self._serving.check_ready()
            await self._work(exchange)
        except CodedError as error:
            await exchange.fail(error)
        except ClientDisconnect:
            raise
        except Exception as error:  # noqa: BLE001 - the last line: a request must end in an answer
            await exchange.fail(unexpected(error))


def new_app(serving: Serving, kind: Kind) -> Starlette:
    """The server's routes. `/ping` is open and always answered, the others need the key."""
    for collector in kind.collectors():
        serving.metrics.registry.register(collector)

    async def health(exchange: Exchange) -> None:
        jobs = serving.jobs
        about = {"status": serving.state, "running": jobs.working, "waiting": jobs.waiting}
        ready = serving.state is State.READY
        told = await kind.health() if ready else {}
        await exchange.respond(Json({**about, **told}, 200 if ready else 503))

    async def metrics(exchange: Exchange) -> None:
        text = generate_latest(serving.metrics.registry)
        await exchange.respond(Response(text, headers={"Content-Type": CONTENT_TYPE_LATEST}))

    return Starlette(
        routes=[
            ping_route(serving),
            Route("/health", Endpoint(serving, health, needs_ready=False), methods=["GET"]),
            Route("/metrics", Endpoint(serving, metrics, needs_ready=False), methods=["GET"]),
            *kind.routes(serving),
        ],
        exception_handlers={HTTPException: _no_route},
    )


def new_health_app(serving: Serving) -> Starlette:
    """`/ping` alone, for PORT_HEALTH."""
    return Starlette(routes=[ping_route(serving)], exception_handlers={HTTPException: _no_route})


def ping_route(serving: Serving) -> Route:
    """`/ping` as RunPod's load balancer asks: 204 while the models load, 200, else 503."""
    statuses = {State.LOADING: 204, State.READY: 200, State.ENDING: 503}

    async def ping(exchange: Exchange) -> None:
        status = statuses[serving.state]
        await exchange.respond(
            Response(status_code=204) if status == 204 else Json({"status": serving.state}, status)
        )

    answers = Endpoint(serving, ping, needs_ready=False, needs_key=False)
    return Route("/ping", answers, methods=["GET"])


async def _no_route(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 404
    words = "is not asked with this method" if status == 405 else "is not served"
    answer = error_answer(NoSuchRoute(f"{request.url.path[:200]} {words}", "See docs/http.md."))
    headers = error.headers if isinstance(error, HTTPException) else None
    return Json(answer, status, dict(headers or {}))


def job_of(body: Mapping[str, Any]) -> Job:
    """A job with an id of its own. The body is its input, or has it as `input`. Raises: InvalidInput."""
    job_id = uuid.uuid4().hex
    if "input" not in body:
        return {"id": job_id, "input": body}
    if other := sorted(set(body) - {"input", *BESIDE_INPUT}):
        known = ", ".join(BESIDE_INPUT)
        raise InvalidInput.of([f"{name} is not read beside input, only {known}" for name in other])
    return {**body, "id": job_id}
