"""What OpenAI's clients read of any worker: errors, with the HTTP status of each code, and models."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from typing import Any

from lora.errors import CodedError
from worker.parts import Answer

STATUSES = {
    **dict.fromkeys(
        (
            "INVALID_INPUT",
            "CHAT_TEMPLATE_FAILED",
            "LORA_SOURCE_INVALID",
            "LORA_INCOMPATIBLE",
            "LORA_UNSUPPORTED",
            "SCHEMA_UNSUPPORTED",
            "LORA_CORRUPT",
            "LORA_TOO_LARGE",
            "OUTPUT_TOO_LARGE",
        ),
        400,
    ),
    "UNAUTHORIZED": 401,
    "LORA_ACCESS_DENIED": 403,
    "LORA_NOT_FOUND": 404,
    "MODEL_NOT_FOUND": 404,
    "NO_SUCH_ROUTE": 404,
    "BODY_TOO_LARGE": 413,
    "BUSY": 429,
    "LORA_DOWNLOAD_FAILED": 502,
    "UPLOAD_FAILED": 502,
    "CANCELLED": 503,
    "NOT_READY": 503,
    "OUT_OF_MEMORY": 503,
    "WORKER_CLOSED": 503,
    "DEADLINE_EXCEEDED": 504,
    "CACHE_FULL": 507,
}
"""Code of an error -> HTTP status; 500 for the others."""

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}
"""HTTP status -> OpenAI's type of an error; `server_error` for the others."""


class ModelNotFound(CodedError):
    """`model` names neither the base nor an adapter or a preset that this worker knows."""

    code = "MODEL_NOT_FOUND"


class ErrorBody(dict[str, Any]):
    """An error in OpenAI's shape. The SDK answers with its `str()`, which is JSON."""

    def __str__(self) -> str:
        return json.dumps(self)


def status_of(code: object) -> int:
    """The HTTP status of an error's code."""
    return STATUSES.get(str(code), 500)


def error_answer(error: CodedError) -> Answer:
    """`{"error": {message, type, param, code, hint}}`; the code is ours."""
    body = ErrorBody(
        message=f"{error.sentence}. {error.hint}".strip(),
        type=TYPES.get(status_of(error.code), "server_error"),
        param=None,
        code=error.code,
        hint=error.hint,
    )
    return {"error": body}


def models_answer(bases: Iterable[str], now: str, others: Sequence[str]) -> Answer:
    """What can be named as `model`: the bases, and adapters or presets of the one that is loaded `now`."""
    about = {"object": "model", "created": int(time.time()), "owned_by": "worker"}
    names = [{"id": base, **about, "root": base, "parent": None} for base in bases]
    names += [{"id": name, **about, "root": name, "parent": now} for name in others]
    return {"object": "list", "data": names}
