"""Where a reference's file is: what the hub and Civitai answer, kept on the volume for a while."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from lora.errors import AccessDenied, DownloadFailed, LoraError, LoraNotFound
from lora.fetch.civitai import Civitai
from lora.fetch.download import pause_after
from lora.fetch.hub import Hub, SeveralAdapters
from lora.fetch.links import without_credentials
from lora.fetch.rules import origin_of
from lora.fetch.sources import (
    FILE_FACTS,
    CachedName,
    CivitaiFile,
    HubFile,
    Reference,
    RemoteFile,
    parse,
)
from lora.volume.records import read_as, write
from lora.volume.shelf import Shelf, digest_of

LOOKUPS = ".lookups"

REFUSED = LoraNotFound, AccessDenied


class Resolved(NamedTuple):
    """Where a reference's file is, and how it is to be fetched."""

    location: RemoteFile | CachedName
    refresh: bool = False
    warning: str | None = None
    copy: Path | None = None
    """Where the same file lies on this machine already, outside of the cache."""


@dataclass(frozen=True)
class Lookup:
    """What a hub answered: the fields of a RemoteFile, and when."""

    file: dict[str, Any]
    when: float


def _kept(answer: RemoteFile) -> Lookup:
    """What is written down of an answer. Without its secrets its URL may not do, but names the file: such an
    answer is as old as can be, and counts while the hub does not give another.
    """
    url = without_credentials(answer.url, {*FILE_FACTS, "fileId"})
    when = time.time() if url == answer.url else 0.0
    return Lookup(asdict(replace(answer, url=url)), when)


class _Question(NamedTuple):
    """What a hub is asked."""

    key: str
    """The server and the location, in which no token is shown."""
    token: str | None
    """With another token, the answer may be another."""
    ask: Callable[[], RemoteFile]


class _Found(NamedTuple):
    """Where a hub says that a file is."""

    remote: RemoteFile
    refresh: bool = False
    warning: str | None = None

    def resolved(self, reference: Reference, token: str | None = None) -> Resolved:
        """The same for a reference, whose own sha256 counts; `token`: its link's, for the file's origin."""
        remote = replace(self.remote, sha256=reference.sha256 or self.remote.sha256, token=token)
        return Resolved(remote, self.refresh, self.warning)


class Refusals:
    """Remembers for some seconds which sources answered 404 (nothing is there) or 403 (not for us)."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._guard = threading.Lock()
        self._until: dict[str, tuple[float, LoraError]] = {}

    @contextmanager
    def remembered(
        self, key: str, *, ask_anyway: bool, kinds: tuple[type[LoraError], ...] = REFUSED
    ) -> Iterator[None]:
        """Runs a block that asks a source; raises the source's remembered refusal instead, if there is one.

        `kinds`: the errors that are remembered.
        """
        with self._guard:
            until, refusal = self._until.get(key, (0.0, None))
        if isinstance(refusal, kinds) and not ask_anyway and time.monotonic() < until:
            raise type(refusal)(refusal.sentence, refusal.hint)
        try:
            yield
        except kinds as error:
            now = time.monotonic()
            with self._guard:
                fresh = {k: refused for k, refused in self._until.items() if refused[0] > now}
                self._until = {**fresh, key: (now + self._seconds, error)}
            raise
        with self._guard:
            self._until.pop(key, None)


class Resolver:
    """Asks each hub once in a while, not once per job."""

    def __init__(self, shelf: Shelf, hub: Hub, civitai: Civitai, refusals: Refusals) -> None:
        self._shelf, self._hub, self._civitai, self._refusals = shelf, hub, civitai, refusals

    def resolve(self, reference: Reference) -> Resolved:
        """Where the reference's file is: in the cache by name, or at a URL. Raises: LoraError."""
        location = parse(reference, self._hub.endpoint, self._civitai.endpoint)
        if isinstance(location, HubFile):
            plain = not (reference.weight_name or reference.revision or "@" in reference.path)
            if plain and self._shelf.existing(reference.path):
                return Resolved(CachedName(reference.path, reference.sha256))
            return self._in_hub(location, reference)
        if isinstance(location, CivitaiFile):
            return self._in_civitai(location, reference)
        return Resolved(location, reference.refresh)

    def _in_hub(self, location: HubFile, reference: Reference) -> Resolved:
        """From a cache of the hub on this machine, unless the source is to be asked; else from the hub."""
        several: LoraError | None = None
        try:
            copy = None if reference.refresh else self._hub.cached(location)
        except SeveralAdapters as error:  # the hub may know of the usual name among more files
            copy, several = None, error.error
        if copy:
            return _Found(copy.remote).resolved(reference)._replace(copy=copy.path)
        fixed = re.fullmatch(r"[0-9a-f]{40}", location.revision or "") is not None
        question = _Question(
            f"{self._hub.endpoint} {location}", None, lambda: self._hub.ask(location)
        )
        try:
            found = self._look_up(question, fixed, refresh=reference.refresh)
        except DownloadFailed:
            if several:
                raise several from None
            raise
        return found.resolved(reference)

    def _in_civitai(self, location: CivitaiFile, reference: Reference) -> Resolved:
        server, token = self._civitai.endpoint, location.token
        question = _Question(f"{server} {location}", token, lambda: self._civitai.ask(location))
        found = self._look_up(question, location.version is not None, refresh=reference.refresh)
        at_home = token and origin_of(found.remote.url) == origin_of(server)
        return found.resolved(reference, token if at_home else None)

    def _look_up(self, question: _Question, fixed: bool, *, refresh: bool) -> _Found:
        """A hub's answer about a reference; from the volume as long as the last answer is fresh."""
        name = f"{digest_of(question.key)}.json"
        known, when = None, 0.0
        for root in self._shelf.roots:
            lookup = read_as(Lookup, root / LOOKUPS / name)
            if lookup and lookup.when >= when:
                with suppress(TypeError):
                    known, when = RemoteFile(**lookup.file), lookup.when
        lately = abs(time.time() - when) < self._shelf.limits.ttl  # another's clock may be ahead
        fresh = when and (fixed or lately)
        if known and fresh and not refresh:
            return _Found(known)
        try:
            with self._refusals.remembered(f"{question.key} {question.token}", ask_anyway=refresh):
                answer = self._patiently(question.ask, can_wait=known is None or refresh)
        except LoraError as error:
            if known is None or refresh:
                raise
            return _Found(known, warning=f"{known.shown} may be out of date: {error.sentence}")
        with suppress(OSError):  # only the next look-up suffers
            root = self._shelf.prepare()
            write(root, root / LOOKUPS / name, _kept(answer))
        return _Found(answer, refresh)

    def _patiently(self, ask: Callable[[], RemoteFile], *, can_wait: bool) -> RemoteFile:
        """Asks again if a hub does not answer, as often and as late as a download would.

        Without `can_wait`, not if the hub asks to wait: there is an older answer.
        """
        limits = self._shelf.limits
        deadline = time.monotonic() + limits.timeout
        for failures in range(1, limits.tries):
            try:
                return ask()
            except DownloadFailed as error:
                pause = max(pause_after(failures, limits), error.after or 0.0)
                if time.monotonic() + pause > deadline or (error.after and not can_wait):
                    raise
                time.sleep(pause)
        return ask()
