"""What a link's query says. Of a link to a hub's page each part is used, or the link is refused."""

from __future__ import annotations

import re
from collections.abc import Container
from urllib.parse import SplitResult, parse_qsl, urlencode, urlsplit

from lora.errors import SourceInvalid

OF_THE_PAGE = re.compile(r"download|not-for-all-audiences|sync-account|utm_\w+", re.ASCII)
"""Names that say how a page is shown or how someone came to it, and so nothing of a file."""

SIGNING = re.compile(r"(x-amz|x-goog)-.*|token|api_key", re.IGNORECASE)
"""Parameters of a URL's query that authorize a request and do not identify the file."""

NUMBER = re.compile(r"\d{1,18}", re.ASCII)


def query_of(parts: SplitResult, used: Container[str], shown: str) -> dict[str, str]:
    """The parts of a link's query that `used` names; a part without a value says nothing.

    Raises: SourceInvalid if the link says anything else, or something twice; it repeats no value, which may
    be a secret.
    """
    if parts.username is not None or parts.password is not None:
        raise SourceInvalid(f"{shown}: its link names a user, which means nothing there")
    said: dict[str, str] = {}
    for name, value in parse_qsl(parts.query):
        if name not in used and OF_THE_PAGE.fullmatch(name):
            continue
        word = name if re.fullmatch(r"[A-Za-z_-]{1,24}", name) else "a part"
        if name not in used:
            raise SourceInvalid(
                f"{shown}: {word} in its link's query means nothing here", "Leave it out."
            )
        if said.setdefault(name, value) != value:
            raise SourceInvalid(f"{shown}: its link's query has two values of {word}")
    return said


def token_of(said: dict[str, str], shown: str) -> str | None:
    """The token that a link's query says; None if it says none. Raises: SourceInvalid."""
    token = said.get("token")
    if token and not (token.isascii() and token.isprintable()):
        raise SourceInvalid(f"{shown}: the token in its link holds a character that no token may")
    return token


def number_of(said: dict[str, str], name: str, shown: str) -> int | None:
    """The number that a link's query says under this name; None if it says none. Raises: SourceInvalid."""
    if name not in said:
        return None
    if not NUMBER.fullmatch(said[name]):
        raise SourceInvalid(f"{shown}: {name} in its link's query is no number")
    return int(said[name])


def credential_of(url: str, token: str | None = None) -> str | None:
    """What of a link opens its file: user, password, signature and token; None if it names none of these."""
    parts = urlsplit(url)
    signed = [pair for pair in parse_qsl(parts.query) if SIGNING.fullmatch(pair[0])]
    user, at, _ = parts.netloc.rpartition("@")
    return repr((user, signed, token)) if at or signed or token else None


def without_credentials(url: str, harmless: Container[str]) -> str:
    """The URL without its user and, if that says more than the `harmless` names, its query and fragment."""
    parts = urlsplit(url)
    parts = parts._replace(netloc=parts.netloc.rpartition("@")[2])
    if parts.fragment or any(name not in harmless for name, _ in parse_qsl(parts.query)):
        parts = parts._replace(query="", fragment="")
    return parts.geturl()


def identity_of(parts: SplitResult) -> str:
    """The URL without its signature, which differs each time a store signs a URL of the same file."""
    query = parse_qsl(parts.query, keep_blank_values=True)
    if not any(SIGNING.fullmatch(name) for name, _ in query):
        return parts.geturl()
    kept = urlencode([(name, value) for name, value in query if not SIGNING.fullmatch(name)])
    return parts._replace(query=kept).geturl()
