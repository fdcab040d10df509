"""Opens the cache in a folder: from environment variables, or from values that were read elsewhere."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

from lora.fetch.civitai import Civitai
from lora.fetch.hub import Hub
from lora.fetch.rules import WebRules, auth_headers, origin_of
from lora.fetch.sources import CIVITAI, HUB
from lora.fetch.web import Web
from lora.volume.cache import FALLBACK_ROOT, Limits, VolumeCache

VARIABLES = (
    *("HF_TOKEN", "HF_ENDPOINT", "CIVITAI_TOKEN", "CIVITAI_ENDPOINT"),
    *(
        "LORA_CACHE_DIR",
        "LORA_CACHE_MAX_GB",
        "LORA_MAX_FILE_MB",
        "LORA_DOWNLOAD_TIMEOUT",
        "LORA_TTL_HOURS",
    ),
    *("LORA_AUTH_HEADERS", "LORA_ALLOWED_HOSTS", "LORA_ALLOW_PRIVATE_URLS"),
)
"""The environment variables that say how a cache is opened; they mean here what they mean to the worker."""

FOLDER = "/models/loras"
"""The cache's folder where LORA_CACHE_DIR is not set."""

Server = tuple[str, str]
"""(endpoint, token) of a hub; an empty endpoint means the public one."""


def open_cache(
    folder: Path | str | None = None, environ: Mapping[str, str] | None = None
) -> VolumeCache:
    """The cache in a folder, by default LORA_CACHE_DIR. Nothing is requested or written yet.

    `VARIABLES` of the environment say how. Raises: ValueError that names a variable that cannot be used, or
    is misspelt, and repeats nothing of its text.
    """
    given = os.environ if environ is None else environ
    values = {name: text.strip() for name, text in given.items()}
    for name in set(values) - set(VARIABLES):
        if close := get_close_matches(name, VARIABLES, n=1, cutoff=0.9):
            raise ValueError(f"{name} is not a setting (did you mean {close[0]}?)")

    def text(name: str) -> str:
        return values.get(name, "")

    def number(name: str, default: float) -> float:
        try:
            value = float(text(name) or default)
        except ValueError:
            value = math.nan
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is not a number of at least 0")
        return value

    try:
        headers = auth_headers(text("LORA_AUTH_HEADERS"))
    except ValueError as error:
        raise ValueError(f"LORA_AUTH_HEADERS: {error}") from None
    return make_cache(
        Path(folder or text("LORA_CACHE_DIR") or FOLDER),
        Limits(
            file_bytes=int(number("LORA_MAX_FILE_MB", 2048) * 1e6),
            total_bytes=int(number("LORA_CACHE_MAX_GB", 0) * 1e9) or None,
            timeout=number("LORA_DOWNLOAD_TIMEOUT", 300),
            ttl=number("LORA_TTL_HOURS", 24) * 3600,
        ),
        WebRules(
            allow_private=text("LORA_ALLOW_PRIVATE_URLS") in ("1", "true"),
            allowed_hosts=tuple(text("LORA_ALLOWED_HOSTS").replace(",", " ").split()),
            tokens=headers,
        ),
        hub=(text("HF_ENDPOINT"), text("HF_TOKEN")),
        civitai=(text("CIVITAI_ENDPOINT"), text("CIVITAI_TOKEN")),
    )


def make_cache(
    root: Path,
    limits: Limits,
    rules: WebRules,
    *,
    hub: Server,
    civitai: Server,
    family: str | None = None,
) -> VolumeCache:
    """The cache in a folder. Nothing is requested or written yet.

    The hubs' tokens are added to the rules; an endpoint that is named here may lie in the private network.
    `family`: of the model that adapters are for, such as SDXL. Raises: ValueError if an endpoint is no URL.
    """
    own, tokens = set(rules.own), dict(rules.tokens)
    for public, (endpoint, token) in ((HUB, hub), (CIVITAI, civitai)):
        origin = origin_of(endpoint or public)
        if endpoint:
            own.add(origin)
        if token:
            tokens[origin] = ("Authorization", f"Bearer {token}")
    web = Web(replace(rules, own=frozenset(own), tokens=tokens))
    return VolumeCache(
        root,
        limits,
        web,
        hub=Hub(hub[1] or None, hub[0] or HUB),
        civitai=Civitai(web, civitai[0] or CIVITAI, family),
        fallback=FALLBACK_ROOT,
    )
