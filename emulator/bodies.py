"""JSON in and out, with limits. It is strict: what one side sends, the other side must be able to read."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse


class Json(JSONResponse):
    """An answer in ASCII, so that half a surrogate pair in a string passes, which UTF-8 cannot hold."""

    def render(self, content: Any) -> bytes:
        """The bytes."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


async def read(request: Request, limit: int) -> tuple[bytes, int]:
    """A request's body and its size. A body over the limit is read to its end, but not kept whole."""
    pieces, size = [], 0
    async for piece in request.stream():
        size += len(piece)
        if size <= limit:
            pieces.append(piece)
    return b"".join(pieces), size


def parse(body: bytes) -> dict[str, Any]:
    """The JSON object in a body. Raises: HTTPException 400."""
    try:
        value = json.loads(body, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"the body is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise HTTPException(400, "the body is no JSON object")
    return value


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not in it")


def _finite(text: str) -> float:
    """A number. 1e999, for example, would be read as infinity, which JSON cannot write."""
    number = float(text)
    return number if math.isfinite(number) else _refuse(text)
