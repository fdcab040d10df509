"""A cache opened from plain values, as an operator writes them down."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lora.fetch.civitai import Civitai
from lora.fetch.hub import Hub
from lora.fetch.rules import WebRules, origin_of
from lora.fetch.sources import CIVITAI, HUB
from lora.fetch.web import Web
from lora.volume.cache import FALLBACK_ROOT, Limits, VolumeCache

Server = tuple[str, str]
"""(endpoint, token) of a hub; an empty endpoint means the public one."""


def open_cache(
    root: Path,
    limits: Limits | None = None,
    *,
    hub: Server = ("", ""),
    civitai: Server = ("", ""),
    headers: Mapping[str, tuple[str, str]] | None = None,
    allowed_hosts: tuple[str, ...] = (),
    allow_private: bool = False,
) -> VolumeCache:
    """The cache in a folder. Nothing is requested or written yet.

    `headers`: origin -> (name, value) of the header that another host gets; the rest as in `WebRules`. An
    endpoint that is named here may lie in the private network. Raises: ValueError if an endpoint is no URL.
    """
    own, tokens = set(), dict(headers or {})
    for public, (endpoint, token) in ((HUB, hub), (CIVITAI, civitai)):
        origin = origin_of(endpoint or public)
        if endpoint:
            own.add(origin)
        if token:
            tokens[origin] = ("Authorization", f"Bearer {token}")
    web = Web(WebRules(allow_private, allowed_hosts, frozenset(own), tokens))
    return VolumeCache(
        root,
        limits,
        web,
        hub=Hub(hub[1] or None, hub[0] or HUB),
        civitai=Civitai(web, civitai[0] or CIVITAI),
        fallback=FALLBACK_ROOT,
    )
