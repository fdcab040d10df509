"""Opens the cache in a folder: from environment variables, or from values that were read elsewhere."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

from lora.fetch.civitai import Civitai
from lora.fetch.hub import Hub
from lora.fetch.rules import WebRules, auth_headers, origin_of, user_of, without_user
from lora.fetch.sources import CIVITAI, HUB
from lora.fetch.web import Web
from lora.volume.cache import FALLBACK_ROOT, Limits, VolumeCache

NUMBERS: Mapping[str, tuple[float, float]] = {
    "LORA_CACHE_MAX_GB": (0.0, 0.0),
    "LORA_MAX_FILE_MB": (2048.0, 1.0),
    "LORA_DOWNLOAD_TIMEOUT": (300.0, 1.0),
    "LORA_TTL_HOURS": (24.0, 0.0),
}
"""Variable -> its default and its least value: those of the worker's settings, to which a test holds them."""

VARIABLES = (
    *("HF_TOKEN", "HF_ENDPOINT", "CIVITAI_TOKEN", "CIVITAI_ENDPOINT"),
    *("LORA_CACHE_DIR", "LORA_AUTH_HEADERS", "LORA_ALLOWED_HOSTS", "LORA_ALLOW_PRIVATE_URLS"),
    "LORA_SHARE_PRIVATE",
    *NUMBERS,
)
"""The environment variables that say how a cache is opened; they mean here what they mean to the worker."""

OWN_PREFIX = "LORA_"
"""Of the variables that are refused as misspelt; others' names may be as near to ours as they like."""

BOOLEANS = {"": False, "0": False, "false": False, "1": True, "true": True}

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
    values = _values(os.environ if environ is None else environ)
    numbers = {name: _number(name, values[name]) for name in NUMBERS}
    allow_private, share_private = (
        _boolean(name, values[name]) for name in ("LORA_ALLOW_PRIVATE_URLS", "LORA_SHARE_PRIVATE")
    )
    try:
        headers = auth_headers(values["LORA_AUTH_HEADERS"])
    except ValueError as error:
        raise ValueError(f"LORA_AUTH_HEADERS: {error}") from None
    return make_cache(
        Path(folder or values["LORA_CACHE_DIR"] or FOLDER),
        Limits(
            file_bytes=int(numbers["LORA_MAX_FILE_MB"] * 1e6),
            total_bytes=int(numbers["LORA_CACHE_MAX_GB"] * 1e9) or None,
            timeout=numbers["LORA_DOWNLOAD_TIMEOUT"],
            ttl=numbers["LORA_TTL_HOURS"] * 3600,
        ),
        WebRules(
            allow_private=allow_private,
            share_private=share_private,
            allowed_hosts=tuple(values["LORA_ALLOWED_HOSTS"].replace(",", " ").split()),
            tokens=headers,
        ),
        hub=(values["HF_ENDPOINT"], values["HF_TOKEN"]),
        civitai=(values["CIVITAI_ENDPOINT"], values["CIVITAI_TOKEN"]),
    )


def _values(environ: Mapping[str, str]) -> dict[str, str]:
    """The texts of `VARIABLES`, empty for one that is not set. Raises: ValueError for a misspelt name."""
    for name in environ:
        if not name.startswith(OWN_PREFIX) or name in VARIABLES:
            continue
        if close := get_close_matches(name, VARIABLES, n=1, cutoff=0.9):
            raise ValueError(f"{name} is not a setting (did you mean {close[0]}?)")
    return {name: environ.get(name, "").strip() for name in VARIABLES}


def _boolean(name: str, text: str) -> bool:
    if text.lower() not in BOOLEANS:
        raise ValueError(f"{name} is none of 0, 1, false, true")
    return BOOLEANS[text.lower()]


def _number(name: str, text: str) -> float:
    default, least = NUMBERS[name]
    try:
        value = float(text or default)
    except ValueError:
        value = math.nan
    if not least <= value < math.inf:
        raise ValueError(f"{name} is not a number of at least {least:g}")
    return value


def make_cache(
    root: Path,
    limits: Limits,
    rules: WebRules,
    *,
    hub: Server,
    civitai: Server,
    family: str | None = None,
    hub_caches: Sequence[Path] = (),
) -> VolumeCache:
    """The cache in a folder. Nothing is requested or written yet.

    The hubs' tokens are added to the rules; an endpoint that is named here may lie in the private network.
    `family`: of the model that adapters are for, such as SDXL. `hub_caches`: folders on this machine in which
    the hub's files are looked for before it is asked. Raises: ValueError if an endpoint is no URL.
    """
    own, tokens = set(rules.own), dict(rules.tokens)
    for public, (endpoint, token) in ((HUB, hub), (CIVITAI, civitai)):
        origin = origin_of(endpoint or public)
        if endpoint:
            own.add(origin)
        if user := user_of(endpoint):  # in no URL, so in no record and no error either
            tokens[origin] = ("Authorization", f"Basic {user}")
        if token:
            tokens[origin] = ("Authorization", f"Bearer {token}")
    web = Web(replace(rules, own=frozenset(own), tokens=tokens))
    return VolumeCache(
        root,
        limits,
        web,
        hub=Hub(hub[1] or None, without_user(hub[0]) or HUB, web, tuple(hub_caches)),
        civitai=Civitai(web, without_user(civitai[0]) or CIVITAI, family),
        fallback=FALLBACK_ROOT,
    )
