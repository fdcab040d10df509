"""What a server's refusal means: how long to wait, and what is in the way."""

from __future__ import annotations

import email.utils
import re
import time
from collections.abc import Mapping
from contextlib import suppress

import requests

from lora.errors import AccessDenied
from lora.fetch.body import Body

MAX_REFUSAL = 64_000
"""Bytes of a refusal that are read."""

TOKENS = "It may need a token: HF_TOKEN, CIVITAI_TOKEN, LORA_AUTH_HEADERS, or ?token= in a link to Civitai."

EARLY = "is in early access: Civitai gives it to those alone who paid for it"

REASONS = {
    "early access": EARLY,
    "early-access": EARLY,
    "disabled downloads": "is not given away: its creator disabled its download",
    "logged in": "asks for a login",
}
"""What Civitai writes into a refusal -> what is in the way, in our words: a server's own may hold secrets."""


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
    told = f"{body.url} {_text(body)}".lower()
    reason = next((reason for word, reason in REASONS.items() if word in told), None)
    if reason == EARLY and (day := re.search(r'"deadline":\s*"(\d{4}-\d\d-\d\d)', told)):
        reason += f", until {day[1]}"
    if reason is None and body.status == 200:
        reason = "asks for a login"
    return AccessDenied(f"{shown} {reason or f'refuses access (HTTP {body.status})'}", TOKENS)


def _text(body: Body) -> str:
    """What a short refusal says; empty if it is long, or cannot be read."""
    if body.status == 200 or body.sent_length is None or body.sent_length > MAX_REFUSAL:
        return ""
    with suppress(requests.RequestException, ValueError):
        return body.read(MAX_REFUSAL).decode(errors="replace")
    return ""
