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
from lora.fetch.sources import CIVITAI, CivitaiFile, RemoteFile
from lora.fetch.web import Web
from lora.formats.endings import PICKLES, SAFETENSORS

TIMEOUT = 30.0
"""Seconds that Civitai may take for an answer."""

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
        shown = f"civitai:{model}" + (f"@{version_id}" if version_id else "")
        if version_id is None:
            shown = f"civitai:{model}"
            versions = self._get(f"models/{model}", shown).get("modelVersions")
            if not versions:
                raise LoraNotFound(f"{shown} has no version")
            version_id = versions[0].get("id")
        elif model is None:
            shown = f"civitai version {version_id}"
        version = self._get(f"model-versions/{version_id}", shown)
        if model is not None and version.get("modelId") not in (None, model):
            raise LoraNotFound(
                f"version {version_id} is not one of civitai:{model}",
                f"It is one of civitai:{version['modelId']}.",
            )
        return _remote(version, wanted, f"civitai:{version.get('modelId', model)}@{version_id}")

    def _get(self, path: str, shown: str) -> dict[str, Any]:
        """One answer of the API. Raises: LoraError."""
        deadline = time.monotonic() + TIMEOUT
        url = f"{self.endpoint.rstrip('/')}/api/v1/{path}"
        try:
            with self.web.open(url, stall=TIMEOUT, deadline=deadline) as body:
                if body.status == 404:
                    raise LoraNotFound(f"{shown} does not exist on Civitai")
                if body.status in (401, 403):
                    raise AccessDenied(
                        f"Civitai refuses access to {shown}", "It may need CIVITAI_TOKEN."
                    )
                if body.status != 200:
                    raise DownloadFailed(
                        f"Civitai answered HTTP {body.status} for {shown}", "Try again later."
                    )
                answer = json.loads(body.read(MAX_ANSWER))
        except requests.RequestException as error:
            raise DownloadFailed(
                f"Civitai did not answer for {shown}", "Try again later."
            ) from error
        except ValueError as error:
            raise LoraCorrupt(f"Civitai's answer for {shown} is no JSON") from error
        if not isinstance(answer, dict):
            raise LoraCorrupt(f"Civitai's answer for {shown} is no JSON object")
        return answer


def _remote(version: dict[str, Any], wanted: CivitaiFile, shown: str) -> RemoteFile:
    """The wanted file among those of a version."""
    files = [file for file in version.get("files") or [] if isinstance(file, dict)]
    chosen = _choose(files, wanted, shown)
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


def _choose(files: list[dict[str, Any]], wanted: CivitaiFile, shown: str) -> dict[str, Any]:
    """The file by its name or by the download URL's query; else the primary model file, preferably
    .safetensors.
    """
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
        raise LoraNotFound(
            f"{shown} has several such files", f"Choose one with weight_name: {names}."
        )
    return matches[0]


def _matches_query(file: dict[str, Any], wanted: CivitaiFile) -> bool:
    """What Civitai says of the file does not contradict the query; without one, it must be a model."""
    facts = {"type": file.get("type"), **(file.get("metadata") or {})}
    query = dict(wanted.wanted) or {"type": "Model"}
    return all(str(facts.get(key, value)).lower() == value.lower() for key, value in query.items())
