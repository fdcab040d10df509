"""A WebSocket as a session of live frames takes it. Imports without torch."""

from __future__ import annotations

from contextlib import suppress

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from live.wire import Closed


class Socket:
    """A client's WebSocket that was accepted; `receive` and `send` are what a session is given."""

    def __init__(self, socket: WebSocket) -> None:
        self._socket = socket

    async def receive(self) -> str | bytes:
        """The next message. Raises: Closed."""
        message = await self._socket.receive()
        if message["type"] == "websocket.disconnect":
            raise Closed
        text = message.get("text")
        return str(text) if text is not None else bytes(message.get("bytes") or b"")

    async def send(self, data: bytes) -> None:
        """Sends one message. Raises: Closed."""
        try:
            await self._socket.send_bytes(data)
        except (WebSocketDisconnect, RuntimeError):
            raise Closed from None

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """Closes it, if the client has not."""
        states = (self._socket.client_state, self._socket.application_state)
        if WebSocketState.DISCONNECTED not in states:
            with suppress(WebSocketDisconnect, RuntimeError):  # the client does so at this moment
                await self._socket.close(code, reason)
