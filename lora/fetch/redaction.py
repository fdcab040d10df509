"""What may be shown of a text that names a source. What cannot be parsed is not shown."""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import unquote, urlsplit

HIDDEN = "…"
"""Stands where something is not shown."""

HUB_NAME = re.compile(
    r"(hf://)?([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(refs/(?:convert/\w+|pr/\d+)|[\w.-]+))?(/[^@]+)?",
    re.ASCII,
)
CIVITAI_NAME = re.compile(r"[\w.:-]*civitai:\d+(@\d+)?(\+\d+)?(\.\w+)?", re.ASCII | re.IGNORECASE)

TOKEN = re.compile(r"(hf|rpa)_\w{6,}", re.ASCII)
"""A word that begins as the hub's tokens and RunPod's do."""

SUSPICIOUS = re.compile(r"[?#:@=&;|\\]")
"""No such character stands in a name that may be shown: what is around it may be a query or a password."""


def redact_url(text: str) -> str:
    """A source as it may be shown: of a URL its scheme, host, port and path, of a name all of it.

    The rest of a path from the first part on that may hold a secret, and whatever is neither a URL nor a
    name, is hidden.
    """
    text = text.strip()
    if not text.isprintable():
        return HIDDEN
    if CIVITAI_NAME.fullmatch(text):
        return text
    if match := HUB_NAME.fullmatch(text):
        scheme, repo, revision, file = match.groups(default="")
        if revision and TOKEN.fullmatch(revision):
            revision = HIDDEN
        return scheme + _path(repo) + (f"@{revision}" if revision else "") + _path(file)
    if "://" in text or re.match(r"[A-Za-z][\w+.-]*:", text, re.ASCII):
        return _url(text)
    return _path(re.split(r"[?#]", text)[0] if "@" not in text else text)


def _url(text: str) -> str:
    try:
        parts = urlsplit(text)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return HIDDEN
    is_address = ":" in host and re.fullmatch(r"[0-9a-f:.]+", host)
    if not is_address and not re.fullmatch(r"[\w.-]+", host):
        return f"{parts.scheme}://{HIDDEN}" if host and parts.scheme else HIDDEN
    host = f"[{host}]" if is_address else host
    return f"{parts.scheme}://{host}{f':{port}' if port is not None else ''}{_path(parts.path)}"


def _path(path: str) -> str:
    """The path up to the first part that may hold a secret."""
    return "/".join(_shown_parts(path.split("/")))


def _shown_parts(parts: list[str]) -> Iterator[str]:
    for part in parts:
        plain = unquote(part)
        if SUSPICIOUS.search(plain) or TOKEN.fullmatch(plain) or not plain.isprintable():
            yield HIDDEN
            return
        yield part
