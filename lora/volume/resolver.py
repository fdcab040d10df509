"""Where a reference's file is: what the hub and Civitai answer, kept on the volume for a while."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from lora.errors import DownloadFailed
from lora.fetch.civitai import Civitai
from lora.fetch.download import Limits, pause_after
from lora.fetch.hub import Hub
from lora.fetch.sources import CachedName, CivitaiFile, HubFile, Reference, RemoteFile, parse
from lora.volume.records import read_as, write
from lora.volume.refusals import Refusals
from lora.volume.shelf import Shelf, digest_of

LOOKUPS = ".lookups"


class Resolved(NamedTuple):
    """Where a reference's file is, and how it is to be had."""

    location: RemoteFile | CachedName
    refresh: bool = False
    warning: str | None = None


@dataclass(frozen=True)
class Lookup:
    """What a hub answered: the fields of a RemoteFile, and when."""

    file: dict[str, Any]
    when: float


class Resolver:
    """Asks each hub once in a while, not once per job."""

    def __init__(
        self, shelf: Shelf, hub: Hub, civitai: Civitai, refusals: Refusals, limits: Limits
    ) -> None:
        self._shelf, self._hub, self._civitai = shelf, hub, civitai
        self._refusals, self._limits = refusals, limits

    def resolve(self, reference: Reference) -> Resolved:
        """Where the reference's file is: in the cache by name, or at a URL.

        Asks the hub or Civitai if it must, downloads nothing. Raises: LoraError.
        """
        place = parse(reference, self._hub.endpoint, self._civitai.endpoint)
        if isinstance(place, HubFile):
            plain = not (reference.weight_name or reference.revision or "@" in reference.path)
            if plain and self._shelf.existing(reference.path):
                return Resolved(CachedName(reference.path, reference.sha256))
            fixed = re.fullmatch(r"[0-9a-f]{40}", place.revision or "") is not None
            ask, server = (lambda: self._hub.ask(place)), self._hub.endpoint
        elif isinstance(place, CivitaiFile):
            fixed = place.version is not None
            ask, server = (lambda: self._civitai.ask(place)), self._civitai.endpoint
        else:
            return Resolved(place, reference.refresh)
        found = self._look_up(f"{server} {place}", ask, fixed, refresh=reference.refresh)
        remote = found.location
        if reference.sha256 and isinstance(remote, RemoteFile):
            found = found._replace(location=replace(remote, sha256=reference.sha256))
        return found

    def _look_up(
        self, key: str, ask: Callable[[], RemoteFile], fixed: bool, *, refresh: bool
    ) -> Resolved:
        """What a hub says of a reference, from the volume as long as that is fresh."""
        name = f"{digest_of(key)}.json"
        known, when = None, 0.0
        for root in self._shelf.roots:
            lookup = read_as(Lookup, root / LOOKUPS / name)
            if lookup and lookup.when > when:
                with suppress(TypeError):
                    known, when = RemoteFile(**lookup.file), lookup.when
        fresh = fixed or time.time() - when < self._limits.ttl
        if known and fresh and not refresh:
            return Resolved(known)
        try:
            with self._refusals.remembered(key, ask_anyway=refresh):
                found = self._patiently(ask)
        except DownloadFailed as error:
            if known is None or refresh:
                raise
            words = f"{known.shown} may be out of date: {error.sentence}"
            return Resolved(known, warning=words)
        with suppress(OSError):  # only the next look-up suffers
            root = self._shelf.prepare()
            write(root, root / LOOKUPS / name, Lookup(asdict(found), time.time()))
        return Resolved(found, refresh)

    def _patiently(self, ask: Callable[[], RemoteFile]) -> RemoteFile:
        """Asks again where a hub does not answer, as a download does."""
        deadline = time.monotonic() + self._limits.timeout
        for failures in range(1, self._limits.tries):
            try:
                return ask()
            except DownloadFailed:
                pause = pause_after(failures, self._limits)
                if time.monotonic() + pause > deadline:
                    raise
                time.sleep(pause)
        return ask()
