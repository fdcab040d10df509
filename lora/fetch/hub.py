"""Asks the Hugging Face hub which file of a repo is the adapter, and at which commit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import quote

from lora.errors import AccessDenied, LoraError, LoraNotFound
from lora.fetch.asking import Answer, ask, table, tables, text
from lora.fetch.redaction import redact_url
from lora.fetch.rules import WebRules, origin_of
from lora.fetch.sources import HUB, HubFile, RemoteFile
from lora.fetch.web import Web
from lora.formats.endings import EXTENSIONS, PICKLES, SAFETENSORS
from lora.formats.peft import PEFT_CONFIG, PEFT_STEM, STEMS, TEMPLATES


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

    def ask(self, hub_file: HubFile) -> RemoteFile:
        """The adapter's file, at a fixed commit.

        Raises: LoraNotFound (no such repo, revision or file, or several candidates, which it lists);
        AccessDenied (gated or private); DownloadFailed (the hub does not answer); LoraCorrupt (what it
        answers is not its API's).
        """
        info = self._model_info(hub_file)
        files = {one.name: one for one in map(_sibling, tables(info.get("siblings"))) if one.name}
        chosen = _choose(files, hub_file)
        path = PurePosixPath(chosen.name)
        commit = text(info.get("sha")) or hub_file.revision or "main"

        def url(name: str) -> str:
            return f"{self._base}/{hub_file.repo}/resolve/{quote(commit, safe='')}/{quote(name)}"

        is_peft = path.stem == PEFT_STEM
        others = (
            [str(path.with_name(name)) for name in (PEFT_CONFIG, *TEMPLATES)] if is_peft else []
        )
        urls = {name: url(name) for name in others if name in files}
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


def _sibling(said: Mapping[str, Any]) -> _Sibling:
    """A file as the hub says it; what it says in another form than its API's counts as not said."""
    lfs, size = table(said.get("lfs")), said.get("size")
    sha256 = text(lfs.get("sha256"))
    return _Sibling(
        text(said.get("rfilename")),
        sha256 if re.fullmatch("[0-9a-f]{64}", sha256) else None,
        size if type(size) is int and size >= 0 else None,
    )


def _choose(files: dict[str, _Sibling], hub_file: HubFile) -> _Sibling:
    """The named file; else the one adapter file of the named folder or of the repo, a .safetensors one rather
    than a pickle. Raises: LoraNotFound.
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
            raise LoraNotFound(f"{where} has several adapter files", hint)
    raise LoraNotFound(f"{where} has no .safetensors file")
