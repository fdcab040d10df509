"""The server's route for live frames: a session of `live` over a WebSocket."""

from __future__ import annotations

from typing import Any

from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket

from live.session import run
from lora.errors import CodedError
from worker.http.app import Serving
from worker.http.exchange import Json
from worker.http.socket import Socket
from worker.openai_answers import error_answer, status_of


def live_route(serving: Serving, worker: Any) -> WebSocketRoute:
    """`WS /live`. Its sessions count for themselves, and end when the client or the server does."""

    async def answer(socket: WebSocket) -> None:
        try:
            serving.check_key(socket.headers)
            serving.check_ready()
        except CodedError as error:
            refusal = Json(error_answer(error), status_of(error.code))
            await socket.send_denial_response(refusal)
            return
        await socket.accept()
        client = Socket(socket)
        await run(client.receive, client.send, worker)
        await client.close()

    return WebSocketRoute("/live", answer)
