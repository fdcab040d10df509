"""Asks Civitai which file belongs to a model or version.

Its public API (https://developer.civitai.com): `GET /api/v1/models/ID` lists a model's versions, the newest
first, each with its base model; `GET /api/v1/model-versions/ID` has a version's files with their hashes and
download URLs. A token goes with both as `Authorization: Bearer`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora.errors import LoraIncompatible, LoraNotFound
from lora.fetch.asking import ask, is_sha256, table, tables, text
from lora.fetch.sources import CIVITAI, CivitaiFile, RemoteFile
from lora.fetch.web import Web
from lora.formats.endings import PICKLES, SAFETENSORS

MAX_LISTED = 10
"""Most files or versions that an error lists."""

BASE_MODELS = {"SDXL": re.compile(r"SDXL\b.*|Pony|Illustrious\b.*|NoobAI\b.*|Playground v2", re.I)}
"""A family of models -> what Civitai calls the base models whose adapters fit it. (Pony V7 is no SDXL.)"""

SAYS_NO_BASE = (None, "", "Other")


@dataclass(frozen=True)
class Civitai:
    """Civitai, or a server with the same API. Its token is among those of the web's rules."""

    web: Web
    endpoint: str = CIVITAI
    family: str | None = None
    """The family of models that adapters are for, one of BASE_MODELS; None if it is not known."""

    def ask(self, wanted: CivitaiFile) -> RemoteFile:
        """The wanted file, of the newest version if none is named. It holds no token.

        Raises: LoraNotFound (which lists the candidates if there are several), LoraIncompatible (the newest
        version is for another family; lists those that fit), AccessDenied, DownloadFailed.
        """
        model, version_id = wanted.model, wanted.version
        shown = (
            f"civitai:{model}@{version_id}"
            if model is not None
            else f"civitai version {version_id}"
        )
        if version_id is None:
            shown = f"civitai:{model}"
            versions = tables(
                self._get(f"models/{model}", shown, wanted.token).get("modelVersions")
            )
            if not versions or type(version_id := versions[0].get("id")) is not int:
                raise LoraNotFound(f"{shown} has no version")
            self._check_family(versions, shown)
        version = self._get(f"model-versions/{version_id}", shown, wanted.token)
        owner = version.get("modelId", model)
        owner = owner if type(owner) is int else model
        if model is not None and owner != model:
            raise LoraNotFound(
                f"version {version_id} is not one of civitai:{model}",
                f"It is one of civitai:{owner}.",
            )
        shown = f"civitai:{owner}@{version_id}"
        chosen = _choose(version, wanted, shown)
        name, url = text(chosen.get("name")) or "lora", chosen.get("downloadUrl")
        if not isinstance(url, str):
            raise LoraNotFound(f"{shown} has no download URL for {name}")
        sha256 = text(table(chosen.get("hashes")).get("SHA256")).lower()
        return RemoteFile(
            url=url,
            identity=f"{shown}/{chosen.get('id', name)}",
            shown=f"{shown}/{name}",
            file_name=name,
            sha256=sha256 if is_sha256(sha256) else None,
            fixed=True,
        )

    def _check_family(self, versions: Sequence[dict[str, Any]], shown: str) -> None:
        """Raises: LoraIncompatible if the newest version is for another family and an older one fits."""
        base, fits = versions[0].get("baseModel"), BASE_MODELS.get(self.family or "")
        if fits is None or base in SAYS_NO_BASE or fits.fullmatch(str(base)):
            return
        fitting = [one for one in versions if fits.fullmatch(str(one.get("baseModel")))]
        if fitting:
            listed = [f"{shown}@{one.get('id')} ({one['baseModel']})" for one in fitting]
            raise LoraIncompatible(
                f"the newest version of {shown} is for {base}, not for {self.family}",
                f"Name one that fits: {', '.join(listed[:MAX_LISTED])}.",
            )

    def _get(self, path: str, shown: str, token: str | None) -> Mapping[str, Any]:
        """One answer of the API. Raises: LoraError."""
        url = f"{self.endpoint.rstrip('/')}/api/v1/{path}"
        answer = ask(self.web, url, "Civitai", shown, token)
        if answer.refusal:
            raise answer.refusal
        if answer.status != 200:
            raise LoraNotFound(f"{shown} does not exist on Civitai")
        return answer.fields


def _choose(version: Mapping[str, Any], wanted: CivitaiFile, shown: str) -> dict[str, Any]:
    """The version's one file that is all that the link and weight_name say; where they say nothing, its
    primary model file, preferably .safetensors. Raises: LoraNotFound, with the files that are there.
    """
    files = tables(version.get("files"))
    matches = [file for file in files if wanted.file_name in (None, file.get("name"))]
    said = wanted.wanted or (() if wanted.file_name else (("type", "Model"),))
    for name, value in said:
        matches = _with_fact(matches, name, value)
    if not wanted.file_name and not dict(wanted.wanted).get("fileId"):
        for endings in ((SAFETENSORS,), PICKLES):
            of_kind = [file for file in matches if str(file.get("name")).endswith(endings)]
            if of_kind:
                matches = [file for file in of_kind if file.get("primary")] or of_kind
                break
    if len(matches) == 1:
        return matches[0]
    names = [str(file.get("name")) for file in files]
    listed = ", ".join(sorted(names)[:MAX_LISTED]) or "none"
    if not matches:
        raise LoraNotFound(f"{shown} has no such file", f"It has: {listed}.")
    hint = f"Choose one with weight_name: {listed}."
    if len(set(names)) < len(names):
        numbers = (f"{file.get('id')} ({file.get('name')})" for file in matches[:MAX_LISTED])
        hint = f"Choose one by fileId in its link's query: {', '.join(numbers)}."
    raise LoraNotFound(f"{shown} has several such files", hint)


def _with_fact(files: list[dict[str, Any]], name: str, value: str) -> list[dict[str, Any]]:
    """The files of which Civitai says this; if there are none, those of which it says nothing about it."""

    def said(file: dict[str, Any]) -> str:
        fact = file.get("id" if name == "fileId" else name)
        fact = table(file.get("metadata")).get(name) if fact is None else fact
        return "" if fact is None else str(fact).lower()

    exact = [file for file in files if said(file) == value.lower()]
    return exact or [file for file in files if not said(file)]
