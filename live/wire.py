"""One message of a session: two bytes of length, big-endian, then so many bytes of JSON, then a picture.

A message without a picture may also be sent as text: its JSON alone. Here, too, is how a session gets and
sends messages, whatever carries them. Imports without torch.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple

from validation import InvalidInput

MAX_JSON = 0xFFFF
"""Most bytes of a message's JSON."""

Receive = Callable[[], Awaitable[str | bytes]]
"""Waits for the client's next message, a text or bytes. Raises: Closed once the client is gone."""

Send = Callable[[bytes], Awaitable[None]]
"""Sends one message (`pack`). Raises: Closed once the client is gone."""


class Closed(Exception):
    """The client is gone: `Receive` and `Send` raise this, and the session ends in order."""


class Message(NamedTuple):
    """What one side says, and the picture that belongs to it."""

    about: dict[str, Any]
    picture: bytes = b""
    """A JPEG, PNG or WebP file; empty for none."""


def pack(about: Mapping[str, Any], picture: bytes = b"") -> bytes:
    """A message as it is sent. Raises: ValueError if the JSON takes more than `MAX_JSON` bytes."""
    written = json.dumps(about, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    text = written.encode("utf-8", "replace")
    if len(text) > MAX_JSON:
        raise ValueError(f"a message of {len(text)} bytes of JSON")
    return b"".join((len(text).to_bytes(2, "big"), text, picture))


def unpack(data: str | bytes) -> Message:
    """What was sent. Raises: InvalidInput with what is wrong with it."""
    if isinstance(data, str):
        return Message(_object(data))
    length = int.from_bytes(data[:2], "big")
    if len(data) < 2 + length or not length:
        raise InvalidInput(
            "the message is shorter than it says",
            "Send two bytes of length (big-endian), so many bytes of JSON, then the picture.",
        )
    return Message(_object(data[2 : 2 + length]), bytes(data[2 + length :]))


def _object(text: str | bytes) -> dict[str, Any]:
    try:
        about = json.loads(text)
    except (ValueError, RecursionError):
        about = None
    if not isinstance(about, dict):
        raise InvalidInput("the message is no JSON object", "docs/live.md shows the messages.")
    return about
