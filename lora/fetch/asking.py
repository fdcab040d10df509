"""Asks a hub's API, by the rules and within the limits that hold for every URL."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import requests

from lora.errors import AccessDenied, DownloadFailed, LoraCorrupt
from lora.fetch.answers import denied, later, status_in_words, wait_of
from lora.fetch.sources import ASK_TIMEOUT
from lora.fetch.web import Web

MAX_ANSWER = 8_000_000
"""Bytes of an answer that are read: in memory, JSON takes up to 25 times as much."""


@dataclass(frozen=True)
class Answer:
    """What a hub says, or that it refuses."""

    status: int
    """200, or a status that says that nothing is there or is ours: 400 to 404 and 410."""
    headers: Mapping[str, str]
    fields: Mapping[str, Any] = field(default_factory=dict)
    """The answer's JSON object; empty unless the status is 200."""
    refusal: AccessDenied | None = None
    """The error for 401 and 403."""


def ask(web: Web, url: str, server: str, shown: str, token: str | None = None) -> Answer:
    """One answer. `server`: how sentences name it; `shown`: what it is asked for.

    Raises: DownloadFailed if it does not answer, LoraCorrupt if it does not answer with a JSON object of
    text, SourceInvalid if it leads where the rules forbid.
    """
    deadline = time.monotonic() + ASK_TIMEOUT
    try:
        with web.open(url, stall=ASK_TIMEOUT, deadline=deadline, token=token) as body:
            status, headers = body.status, body.headers
            if status in (401, 403):
                return Answer(status, headers, refusal=denied(shown, body))
            if status == 200:
                return Answer(status, headers, _fields(body.read(MAX_ANSWER)))
    except requests.RequestException as error:
        raise DownloadFailed(f"{server} did not answer for {shown}", later(None)) from error
    except (ValueError, RecursionError) as error:
        raise LoraCorrupt(f"{server}'s answer for {shown} is not the JSON of its API") from error
    if status in (400, 404, 410):
        return Answer(status, headers)
    after, said = wait_of(headers), status_in_words(status)
    raise DownloadFailed(f"{server} did not answer for {shown} ({said})", later(after), after)


def _fields(body: bytes) -> dict[str, Any]:
    """Raises: ValueError, RecursionError."""
    fields = json.loads(body)
    if not isinstance(fields, dict):
        raise ValueError("it is no object")
    if b"\\u" in body:  # half a surrogate pair, which no name may hold
        json.dumps(fields, ensure_ascii=False).encode()
    return fields


def table(value: Any) -> dict[str, Any]:
    """The value if it is a table; else an empty one."""
    return value if isinstance(value, dict) else {}


def tables(value: Any) -> list[dict[str, Any]]:
    """The tables of a list; none if it is no list."""
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def is_sha256(digits: str) -> bool:
    """Whether it is a sha256 in small hex digits, as hubs write it."""
    return re.fullmatch("[0-9a-f]{64}", digits) is not None


def text(value: Any) -> str:
    """The value if it is printable text of a sane length; else an empty one."""
    return value if isinstance(value, str) and value.isprintable() and len(value) < 1000 else ""
