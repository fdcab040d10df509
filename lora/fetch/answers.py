"""What a server's refusal means: how long to wait, and what is in the way."""

from __future__ import annotations

import email.utils
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from urllib.parse import urlsplit

import requests

from lora.errors import AccessDenied
from lora.fetch.body import Body

MAX_REFUSAL = 64_000
"""Bytes of a refusal that are read."""

TOKENS = "It may need a token: HF_TOKEN, CIVITAI_TOKEN, LORA_AUTH_HEADERS, or ?token= in a link to Civitai."

EARLY = "is in early access: it is given to those alone who paid for it"

REASONS = {
    "early access": (EARLY, "It takes the token of an account that did."),
    "early-access": (EARLY, "It takes the token of an account that did."),
    "disabled downloads": ("cannot be had: its creator disabled its download", ""),
    "logged in": ("asks for a login", TOKENS),
}
"""What Civitai writes into a refusal -> what is in the way and what to do, in our words: a server's own may
hold secrets."""


def status_in_words(status: int) -> str:
    """An HTTP status that may pass, as a sentence names it."""
    return f"rate limit, HTTP {status}" if status == 429 else f"HTTP {status}"


def wait_of(headers: Mapping[str, str]) -> float | None:
    """The seconds that an answer asks to wait; None if it does not say.

    Retry-After holds them as a number or as a date; without it, `RateLimit: "api";r=0;t=55` does, which is
    what the Hugging Face hub sends (draft-ietf-httpapi-ratelimit-headers).
    """
    text = headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdigit():
        return float(text)
    with suppress(ValueError, OverflowError):
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    limit = re.search(r";\s*r=0\s*;\s*t=(\d{1,9})\b", headers.get("RateLimit", ""), re.ASCII)
    return float(limit[1]) if limit else None


def later(after: float | None) -> str:
    """What to do about a server that does not answer now. `after`: the seconds that it asks to wait."""
    return "Try again later." if after is None else f"The server asks to wait {after:.0f} s."


def denied(shown: str, body: Body) -> AccessDenied:
    """The error for an answer that refuses access, by status 401 or 403 or by a page to log in."""
    told = (urlsplit(body.url).query if body.status == 200 else _text(body)).lower()
    refuses = "asks for a login" if body.status == 200 else f"refuses access (HTTP {body.status})"
    found = (about for word, about in REASONS.items() if word in told)
    reason, hint = next(found, (refuses, TOKENS))
    if reason == EARLY and (day := re.search(r'"deadline":\s*"(\d{4}-\d\d-\d\d)', told)):
        reason += f", until {day[1]}"
    return AccessDenied(f"{shown} {reason}", hint)


def _text(body: Body) -> str:
    """What a short refusal says; empty if it is long, or cannot be read."""
    if body.sent_length is None or body.sent_length > MAX_REFUSAL:
        return ""
    with suppress(requests.RequestException, ValueError):
        return body.read(MAX_REFUSAL).decode(errors="replace")
    return ""
