"""Asks the Hugging Face hub which file of a repo is the adapter, and at which commit; or its cache here."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import quote

from lora.durable import leads_out
from lora.errors import AccessDenied, LoraError, LoraNotFound
from lora.fetch.asking import Answer, ask, is_sha256, table, tables, text
from lora.fetch.redaction import redact_url
from lora.fetch.rules import WebRules, origin_of
from lora.fetch.snapshots import SnapshotMissing, find_snapshot, is_being_filled, names_in
from lora.fetch.sources import HUB, HubFile, RemoteFile
from lora.fetch.web import Web
from lora.formats.endings import EXTENSIONS, PICKLES, SAFETENSORS
from lora.formats.peft import PEFT_CONFIG, PEFT_STEM, STEMS, TEMPLATES

log = logging.getLogger(__name__)


@dataclass
class SeveralAdapters(Exception):
    """No file was named, and it cannot be told which is meant; `error` lists them."""

    error: LoraNotFound


class Copy(NamedTuple):
    """A file of the hub that lies on this machine."""

    remote: RemoteFile
    path: Path
    """A file in a snapshot; what belongs to it lies beside it."""


class _NoCopy(Exception):
    """A cache has the repo, and its file cannot be taken from there; the text says why."""


class _Sibling(NamedTuple):
    """A file of a repo."""

    name: str
    sha256: str | None
    size: int | None


@dataclass(frozen=True)
class Hub:
    """The Hugging Face hub, or a server with the same API."""

    token: str | None = field(default=None, repr=False)
    endpoint: str = HUB
    web: Web | None = field(default=None, repr=False)
    """What asks it; by default only this endpoint may lie in the private network."""
    caches: tuple[Path, ...] = ()
    """Caches of the hub on this machine, looked into in this order: see `lora.fetch.snapshots`."""

    def cached(self, hub_file: HubFile) -> Copy | None:
        """The adapter's file from the first of `caches` that has it; asks no network.

        A revision that is named must be there under its name, else `main`. The file is chosen as `ask`
        chooses it, from what the snapshot holds. None if there is none that can be taken, which is logged
        if a cache has the repo. Raises: SeveralAdapters if one has several, and no other has it.
        """
        shown, several = redact_url(hub_file.repo), None
        for cache in self.caches:
            try:
                if folder := find_snapshot(cache, hub_file.repo, hub_file.revision):
                    return self._copy(cache, folder, hub_file)
            except (SnapshotMissing, _NoCopy) as error:
                log.warning("%s is not taken from %s: %s", shown, cache, redact_url(str(error)))
            except LoraNotFound as error:
                log.warning("%s is not taken from %s: %s", shown, cache, error.sentence)
            except SeveralAdapters as error:
                several = several or error
        if several:
            raise several
        return None

    def _copy(self, cache: Path, folder: Path, hub_file: HubFile) -> Copy:
        """Raises: LoraNotFound; SeveralAdapters; _NoCopy."""
        if not hub_file.file_name and is_being_filled(cache, hub_file.repo):
            raise _NoCopy("not all of it is there yet")
        files = {name: _Sibling(name, None, None) for name in names_in(folder)}
        chosen = _choose(files, hub_file)
        others = list(_beside(chosen.name))
        if others and others[0] not in files:
            raise _NoCopy(f"{others[0]} is not there, and says the adapter's scale")
        for name in (chosen.name, *(name for name in others if name in files)):
            if leads_out(folder / name, cache):
                raise _NoCopy(f"{name} leads out of it")
            if not (folder / name).is_file():
                raise _NoCopy(f"{name} is a link to nothing")
        # A large file's blob has the name of its content.
        blob = (folder / chosen.name).resolve().name
        known = chosen._replace(sha256=blob if is_sha256(blob) else None)
        return Copy(self._remote(hub_file, folder.name, known, files), folder / chosen.name)

    def ask(self, hub_file: HubFile) -> RemoteFile:
        """The adapter's file, at a fixed commit.

        Raises: LoraNotFound (no such repo, revision or file, or several candidates, which it lists);
        AccessDenied (gated or private); DownloadFailed (the hub does not answer); LoraCorrupt (what it
        answers is not its API's).
        """
        info = self._model_info(hub_file)
        files = {one.name: one for one in map(_sibling, tables(info.get("siblings"))) if one.name}
        commit = text(info.get("sha")) or hub_file.revision or "main"
        try:
            chosen = _choose(files, hub_file)
        except SeveralAdapters as several:
            raise several.error from None
        return self._remote(hub_file, commit, chosen, files)

    def _remote(
        self, hub_file: HubFile, commit: str, chosen: _Sibling, files: Mapping[str, _Sibling]
    ) -> RemoteFile:
        path = PurePosixPath(chosen.name)

        def url(name: str) -> str:
            return f"{self._base}/{hub_file.repo}/resolve/{quote(commit, safe='')}/{quote(name)}"

        urls = {name: url(name) for name in _beside(chosen.name) if name in files}
        return RemoteFile(
            url=url(chosen.name),
            identity=f"hf://{hub_file.repo}@{commit}/{chosen.name}",
            shown=f"{hub_file.repo}@{commit[:12]}/{chosen.name}",
            file_name=path.name,
            sha256=chosen.sha256,
            size=chosen.size,
            fixed=True,
            config_url=urls.pop(str(path.with_name(PEFT_CONFIG)), None),
            template_url=next(iter(urls.values()), None),
        )

    @property
    def _base(self) -> str:
        return self.endpoint.rstrip("/")

    def _model_info(self, hub_file: HubFile) -> Mapping[str, Any]:
        """What the hub says of the repo, its files included. Raises: as `ask`."""
        shown = hub_file.repo + (f"/{hub_file.file_name}" if hub_file.file_name else "")
        revision = f"/revision/{quote(hub_file.revision, safe='')}" if hub_file.revision else ""
        url = f"{self._base}/api/models/{hub_file.repo}{revision}?blobs=true"
        web = self.web or Web(WebRules(own=frozenset({origin_of(self.endpoint)})))
        answer = ask(web, url, "the hub", redact_url(shown), self.token)
        if answer.status != 200:
            raise self._refusal(answer, hub_file, redact_url(shown))
        return answer.fields

    def _refusal(self, answer: Answer, hub_file: HubFile, shown: str) -> LoraError:
        """The error of ours for an answer that is no repo."""
        why = answer.headers.get("X-Error-Code", "")
        if why == "GatedRepo":
            return AccessDenied(f"{shown} is gated", "Accept its terms and set HF_TOKEN.")
        if why == "RevisionNotFound":
            return LoraNotFound(f"{shown} has no revision {redact_url(hub_file.revision or '')!r}")
        if answer.refusal and why != "RepoNotFound":
            if answer.status == 401 and self.token:
                sentence = f"the hub does not accept HF_TOKEN, with which it was asked for {shown}"
                return AccessDenied(sentence, "It may be wrong, or have expired.")
            return AccessDenied(f"the hub refuses access to {shown}", "Check HF_TOKEN.")
        hint = "Check the name; for a private repo, set HF_TOKEN."
        return LoraNotFound(f"there is no repo {hub_file.repo} on the hub", hint)


def _beside(name: str) -> Iterator[str]:
    """The names of what belongs to a file that PEFT saved, its config first; of another file none."""
    path = PurePosixPath(name)
    if path.stem == PEFT_STEM:
        yield from (str(path.with_name(other)) for other in (PEFT_CONFIG, *TEMPLATES))


def _sibling(said: Mapping[str, Any]) -> _Sibling:
    """A file as the hub says it; what it says in another form than its API's counts as not said."""
    lfs, size = table(said.get("lfs")), said.get("size")
    sha256 = text(lfs.get("sha256"))
    return _Sibling(
        text(said.get("rfilename")),
        sha256 if is_sha256(sha256) else None,
        size if type(size) is int and size >= 0 else None,
    )


def _choose(files: dict[str, _Sibling], hub_file: HubFile) -> _Sibling:
    """The named file; else the one adapter file of the named folder or of the repo, a .safetensors one rather
    than a pickle. Raises: LoraNotFound; SeveralAdapters.
    """
    name, where = hub_file.file_name, hub_file.repo
    if name in files:
        return files[name]
    if name:
        folder = f"{name.rstrip('/')}/"
        inside = {n.removeprefix(folder): f for n, f in files.items() if n.startswith(folder)}
        if not inside:
            listed = ", ".join(sorted(n for n in files if n.endswith(EXTENSIONS))[:10]) or "none"
            raise LoraNotFound(f"{where} has no file {name}", f"Adapter files there: {listed}.")
        files, where = inside, f"{where}/{name}"
    for endings in ((SAFETENSORS,), PICKLES):
        usual = [stem + ending for stem in STEMS for ending in endings if stem + ending in files]
        candidates = usual[:1] or sorted(name for name in files if name.endswith(endings))
        if len(candidates) == 1:
            return files[candidates[0]]
        if candidates:
            hint = f"Choose one with weight_name: {', '.join(candidates[:10])}."
            raise SeveralAdapters(LoraNotFound(f"{where} has several adapter files", hint))
    raise LoraNotFound(f"{where} has no .safetensors file")
