"""OpenAI's API in front of an endpoint: each request becomes a job, whose answer or stream is the response.

RunPod serves it under `/v2/{endpoint}/openai/v1/...`; the worker gets `openai_route` and `openai_input`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from starlette.responses import Response, StreamingResponse

from emulator.bodies import Json, read
from emulator.job import RUNSYNC_LIMIT, Job, Status
from emulator.jobs import JobQueue

PAUSE = 0.01
"""Seconds between two looks at a stream."""

CODES = {
    "invalid_request_error": 400,
    "permission_error": 403,
    "not_found_error": 404,
}
"""OpenAI's type of an error -> the response's code; 500 for the others."""


class OpenAiApi:
    """The routes under /v2/{endpoint}/openai."""

    def __init__(self, queue: JobQueue) -> None:
        self._queue = queue
        self.router = APIRouter()
        self.router.add_api_route("/v1/models", self.look, methods=["GET"])
        self.router.add_api_route("/v1/{path:path}", self.post, methods=["POST"])

    async def look(self, request: Request) -> Response:
        """Answers what the worker does to a route without a body."""
        return await self._whole(self._add(request, {}))

    async def post(self, request: Request, path: str) -> Response:
        """Answers what the worker does to a body, piece by piece if the body asks for that."""
        body, size = await read(request, RUNSYNC_LIMIT)
        if size > RUNSYNC_LIMIT:
            raise HTTPException(413, "the payload is too large")
        try:
            given = json.loads(body)
        except ValueError:
            raise HTTPException(400, "the body is no JSON") from None
        if not isinstance(given, dict):
            raise HTTPException(400, "the body is no object")
        job = self._add(request, {"openai_input": given})
        return await self._streamed(job) if given.get("stream") else await self._whole(job)

    def _add(self, request: Request, given: dict[str, Any]) -> Job:
        route = request.url.path.partition("/openai")[2]
        return self._queue.add({"input": {"openai_route": route, **given}}, sync=True)

    async def _whole(self, job: Job) -> Response:
        await self._until(job, pieces=False)
        if job.status is not Status.COMPLETED:
            return _error(job)
        output = job.output
        return Json(output[0] if isinstance(output, list) and output else output)

    async def _streamed(self, job: Job) -> Response:
        await self._until(job, pieces=True)
        if not job.stream and job.status is not Status.COMPLETED:
            return _error(job)
        return StreamingResponse(self._pieces(job), media_type="text/event-stream")

    async def _pieces(self, job: Job) -> AsyncIterator[str]:
        try:
            while True:
                ended = job.status.final
                for piece in self._queue.read_stream(job):
                    yield str(piece.get("output", "") if isinstance(piece, dict) else piece)
                if ended:
                    break
                await asyncio.sleep(PAUSE)
            if job.status is not Status.COMPLETED:
                yield f"data: {json.dumps(_body(job))}\n\n"
        finally:
            self._queue.cancel(job)  # whoever reads it no longer

    async def _until(self, job: Job, *, pieces: bool) -> None:
        """Waits for the job's end, or with `pieces` for the first of its pieces."""
        try:
            while not (job.status.final or (pieces and job.stream)):
                await asyncio.sleep(PAUSE)
        except asyncio.CancelledError:
            self._queue.cancel(job)
            raise


def _body(job: Job) -> dict[str, Any]:
    """An error in OpenAI's shape: the worker's own, if it has one."""
    try:
        error = json.loads(job.error or "")
        if isinstance(error, dict) and "message" in error:
            return {"error": error}
    except ValueError:
        pass
    message = job.error or f"the job is {job.status}"
    return {"error": {"message": message, "type": "server_error", "param": None, "code": None}}


def _error(job: Job) -> Response:
    body = _body(job)
    return Json(body, CODES.get(body["error"].get("type"), 500))
