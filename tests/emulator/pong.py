"""An HTTP server for the tests of load balancing: does what its path says."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

NAME, FOLDER = os.environ["RUNPOD_POD_ID"], Path(os.environ["PONG"])


async def ping(request: Request) -> Response:
    """The status in the file NAME.ping, or 204."""
    file = FOLDER / f"{NAME}.ping"
    return Response(status_code=int(file.read_text()) if file.exists() else 204)


async def echo(request: Request) -> Response:
    body = await request.body()
    about = {"worker": NAME, "size": len(body), "query": request.url.query}
    return JSONResponse({**about, "method": request.method}, headers={"X-Own": "yes"})


async def large(request: Request) -> Response:
    return Response(b"x" * (31 << 20))


async def wait(request: Request) -> Response:
    """Waits for the file `go`; where its client hangs up, it makes the file `NAME.gone`."""
    (FOLDER / f"{NAME}.waits").touch()
    while not (FOLDER / "go").exists():
        if await request.is_disconnected():
            (FOLDER / f"{NAME}.gone").touch()
        await asyncio.sleep(0.02)
    return JSONResponse({"worker": NAME})


async def stream(request: Request) -> Response:
    """One line at once, the next when the file `go` is there."""

    async def lines() -> AsyncIterator[str]:
        yield "first\n"
        while not (FOLDER / "go").exists():
            await asyncio.sleep(0.02)
        yield "second\n"

    return StreamingResponse(lines(), media_type="text/plain")


async def socket(socket: WebSocket) -> None:
    await socket.accept()
    while (message := await socket.receive())["type"] != "websocket.disconnect":
        if message.get("text") == "end":
            await socket.close(4001, "as asked")
            return
        if (data := message.get("bytes")) is not None:
            await socket.send_bytes(data[::-1])
        else:
            await socket.send_text(f"{NAME} {message['text']}")


async def refused(socket: WebSocket) -> None:
    await socket.send_denial_response(Response(status_code=503))


APP = Starlette(
    routes=[
        Route("/ping", ping),
        Route("/echo", echo, methods=["GET", "POST"]),
        Route("/large", large),
        Route("/wait", wait, methods=["POST"]),
        Route("/stream", stream),
        WebSocketRoute("/socket", socket),
        WebSocketRoute("/refused", refused),
    ]
)

if __name__ == "__main__":
    uvicorn.run(APP, port=int(os.environ["PORT"]), log_level="warning")
