"""Asks Civitai which file belongs to a model or version.

Its public API (https://developer.civitai.com): `GET /api/v1/models/ID` lists a model's versions, the newest
first; `GET /api/v1/model-versions/ID` has a version's files with their hashes and download URLs.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

import requests

from lora.errors import AccessDenied, DownloadFailed, LoraCorrupt, LoraNotFound
from lora.fetch.sources import ASK_TIMEOUT, CIVITAI, CivitaiFile, RemoteFile
from lora.fetch.web import Web
from lora.formats.endings import PICKLES, SAFETENSORS

MAX_ANSWER = 20_000_000
"""Bytes of an answer that are read."""


@dataclass(frozen=True)
class Civitai:
    """Civitai, or a server with the same API. Its token is among those of the web's rules."""

    web: Web
    endpoint: str = CIVITAI

    def ask(self, wanted: CivitaiFile) -> RemoteFile:
        """The wanted file, of the newest version if none is named.

        Raises: LoraNotFound (which lists the candidates if there are several), AccessDenied, DownloadFailed.
        """
        model, version_id = wanted.model, wanted.version
        shown = (
            f"civitai:{model}@{version_id}"
            if model is not None
            else f"civitai version {version_id}"
        )
        if version_id is None:
            shown = f"civitai:{model}"
            versions = self._get(f"models/{model}", shown).get("modelVersions")
            if not versions:
                raise LoraNotFound(f"{shown} has no version")
            version_id = versions[0].get("id")
        version = self._get(f"model-versions/{version_id}", shown)
        if model is not None and version.get("modelId") not in (None, model):
            raise LoraNotFound(
                f"version {version_id} is not one of civitai:{model}",
                f"It is one of civitai:{version['modelId']}.",
            )
        shown = f"civitai:{version.get('modelId', model)}@{version_id}"
        chosen = _choose(version, wanted, shown)
        name, url = str(chosen.get("name") or "lora"), chosen.get("downloadUrl")
        if not isinstance(url, str):
            raise LoraNotFound(f"{shown} has no download URL for {name}")
        sha256 = (chosen.get("hashes") or {}).get("SHA256")
        return RemoteFile(
            url=url,
            identity=f"{shown}/{chosen.get('id', name)}",
            shown=f"{shown}/{name}",
            file_name=name,
            sha256=str(sha256).lower() if sha256 else None,
            fixed=True,
        )

    def _get(self, path: str, shown: str) -> dict[str, Any]:
        """One answer of the API. Raises: LoraError."""
        deadline = time.monotonic() + ASK_TIMEOUT
        url = f"{self.endpoint.rstrip('/')}/api/v1/{path}"
        try:
            with self.web.open(url, stall=ASK_TIMEOUT, deadline=deadline) as body:
                status = body.status
                answer = json.loads(body.read(MAX_ANSWER)) if status == 200 else None
        except requests.RequestException as error:
            raise DownloadFailed(
                f"Civitai did not answer for {shown}", "Try again later."
            ) from error
        except ValueError as error:
            raise LoraCorrupt(f"Civitai's answer for {shown} is no JSON") from error
        if status == 404:
            raise LoraNotFound(f"{shown} does not exist on Civitai")
        if status in (401, 403):
            raise AccessDenied(f"Civitai refuses access to {shown}", "It may need CIVITAI_TOKEN.")
        if status != 200:
            raise DownloadFailed(f"Civitai answered HTTP {status} for {shown}", "Try again later.")
        if not isinstance(answer, dict):
            raise LoraCorrupt(f"Civitai's answer for {shown} is no JSON object")
        return answer


def _choose(version: dict[str, Any], wanted: CivitaiFile, shown: str) -> dict[str, Any]:
    """The version's file by its name or the download URL's query; else its primary model file, preferably
    .safetensors.
    """
    files = [file for file in version.get("files") or [] if isinstance(file, dict)]
    names = ", ".join(sorted(str(file.get("name")) for file in files)[:10])
    if wanted.file_name:
        matches = [file for file in files if file.get("name") == wanted.file_name]
    else:
        matches = [file for file in files if _matches_query(file, wanted)]
        for endings in ((SAFETENSORS,), PICKLES):
            of_kind = [file for file in matches if str(file.get("name")).endswith(endings)]
            if of_kind:
                matches = [file for file in of_kind if file.get("primary")] or of_kind
                break
    if not matches:
        raise LoraNotFound(f"{shown} has no such file", f"It has: {names or 'none'}.")
    if len(matches) > 1:
        hint = f"Choose one with weight_name: {names}."
        raise LoraNotFound(f"{shown} has several such files", hint)
    return matches[0]


def _matches_query(file: dict[str, Any], wanted: CivitaiFile) -> bool:
    """What Civitai says of the file does not contradict the query; without one, it must be a model."""
    facts = {"type": file.get("type"), **(file.get("metadata") or {})}
    query = dict(wanted.wanted) or {"type": "Model"}
    return all(str(facts.get(key, value)).lower() == value.lower() for key, value in query.items())
