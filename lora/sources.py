"""What a reference to a LoRA means: a URL, a file in a Hugging Face repo, or a name in the cache.

    https://host/path/file.safetensors        any URL
    user/repo                                 a repo on the hub; its one adapter file
    user/repo/folder/file.safetensors         that file of the repo
    name.safetensors, name, folder/name       a file that is already in the cache

A name that exists in the cache wins over reading it as a hub repo. Nothing here downloads a file; a hub
repo is asked which files it has, and which commit that is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

import httpx2
from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoSibling

from lora.errors import AccessDenied, DownloadFailed, LoraNotFound, SourceInvalid

EXTENSIONS = (".safetensors",)
"""File types that are read; the order is the order of preference."""

DEFAULT_WEIGHT_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""Which file of a hub repo is meant when none is named, in this order; else the only one there is."""

_HUB_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Reference:
    """One LoRA as a request names it. `scale` is not part of it: it changes nothing about the file."""

    path: str
    weight_name: str | None = None
    revision: str | None = None
    sha256: str | None = None

    @property
    def shown(self) -> str:
        """The reference as it may be shown: a URL without user, query and fragment."""
        return redact_url(self.path)


@dataclass(frozen=True)
class CachedName:
    """A file that must already be in the cache, by its path relative to it, with or without extension."""

    name: str
    sha256: str | None = None


@dataclass(frozen=True)
class RemoteFile:
    """A file to be fetched: where from, with what, and what is known of it beforehand."""

    url: str = field(repr=False)
    identity: str = field(repr=False)
    """What two requests for the same file have in common; the cache's name is made from its hash."""
    shown: str
    file_name: str
    headers: dict[str, str] = field(default_factory=dict, repr=False)
    sha256: str | None = None
    size: int | None = None


@dataclass(frozen=True)
class HubFile:
    """A hub repo, and perhaps the file in it, before the hub was asked."""

    repo: str
    file_name: str | None = None
    revision: str | None = None


def parse(reference: Reference) -> RemoteFile | HubFile | CachedName:
    """Reads a reference by its form alone, without the network or the disk.

    `user/repo` comes back as a HubFile though a cached file may have that path: the caller looks into
    its cache first. Raises SourceInvalid.
    """
    path = reference.path.strip()
    if "://" in path:
        _only_for_repos(reference, reference.weight_name, reference.revision)
        return _parse_url(path, reference)
    # What is no plain name may be a URL gone wrong, with a token in it: it is not repeated.
    if not path or not path.isprintable() or set(path) & set("?#:@\\") or len(path.encode()) > 240:
        raise SourceInvalid("a LoRA is named by neither a URL nor a plain name", GRAMMAR_HINT)
    parts = PurePosixPath(path).parts
    if path.startswith(("/", "~")) or ".." in parts:
        raise SourceInvalid(f"{path!r} leads out of the LoRA cache", GRAMMAR_HINT)
    is_file = path.endswith(EXTENSIONS)
    if len(parts) > 2 and is_file and _HUB_REPO.fullmatch("/".join(parts[:2])):
        _only_for_repos(reference, reference.weight_name)
        return HubFile("/".join(parts[:2]), "/".join(parts[2:]), reference.revision)
    if len(parts) == 2 and not is_file and _HUB_REPO.fullmatch(path):
        return HubFile(path, reference.weight_name, reference.revision)
    _only_for_repos(reference, reference.weight_name, reference.revision)
    return CachedName(path, reference.sha256)


def _only_for_repos(reference: Reference, *given: str | None) -> None:
    if any(given):
        raise SourceInvalid(
            f"weight_name and revision say nothing of {reference.shown}",
            "They choose a file and a version of a Hugging Face repo (user/repo).",
        )


GRAMMAR_HINT = "Give an http(s) URL, a Hugging Face repo (user/repo), or the name of a cached file."


def _parse_url(path: str, reference: Reference) -> RemoteFile:
    try:
        parts = urlsplit(path)
        host = parts.hostname
    except ValueError as error:
        raise SourceInvalid(f"{reference.shown!r} is not a valid URL", GRAMMAR_HINT) from error
    if parts.scheme not in ("http", "https") or not host:
        raise SourceInvalid(
            f"{reference.shown!r} is not an http(s) URL with a host name", GRAMMAR_HINT
        )
    name = PurePosixPath(unquote(parts.path)).name
    return RemoteFile(path, path, reference.shown, name or host, sha256=reference.sha256)


@dataclass(frozen=True)
class Hub:
    """The Hugging Face hub, or a server that speaks like it."""

    token: str | None = field(default=None, repr=False)
    endpoint: str | None = None
    """None: the client's own, which HF_ENDPOINT changes."""

    def ask(self, hub_file: HubFile, sha256: str | None = None) -> RemoteFile:
        """Asks for the commit and the one adapter file that a reference means.

        Raises: LoraNotFound (no such repo, revision or file; several candidates are listed),
        AccessDenied (gated or private), DownloadFailed (the hub does not answer).
        """
        shown = hub_file.repo + (f"/{hub_file.file_name}" if hub_file.file_name else "")
        # token=False keeps the client from looking for a token of its own on this machine.
        api = HfApi(endpoint=self.endpoint, token=self.token or False)
        try:
            info = api.model_info(hub_file.repo, revision=hub_file.revision, files_metadata=True)
        except GatedRepoError as error:
            raise AccessDenied(f"{shown} is gated", "Accept its terms and set HF_TOKEN.") from error
        except RevisionNotFoundError as error:
            raise LoraNotFound(f"{shown} has no revision {hub_file.revision!r}") from error
        except (RepositoryNotFoundError, HFValidationError) as error:
            hint = "Check the name; for a private repo, set HF_TOKEN."
            raise LoraNotFound(f"there is no repo {hub_file.repo} on the hub", hint) from error
        except (HfHubHTTPError, httpx2.HTTPError, OSError) as error:
            raise DownloadFailed(
                f"the hub did not answer for {shown}", "Try again later."
            ) from error
        chosen = _choose(info.siblings or [], hub_file)
        commit = info.sha or hub_file.revision or "main"
        endpoint = api.endpoint
        return RemoteFile(
            url=hf_hub_url(hub_file.repo, chosen.rfilename, revision=commit, endpoint=endpoint),
            identity=f"hf://{hub_file.repo}@{commit}/{chosen.rfilename}",
            shown=f"{hub_file.repo}/{chosen.rfilename}",
            file_name=PurePosixPath(chosen.rfilename).name,
            headers={"Authorization": f"Bearer {self.token}"} if self.token else {},
            sha256=sha256 or (chosen.lfs.sha256 if chosen.lfs else None),
            size=chosen.size,
        )


def _choose(siblings: list[RepoSibling], hub_file: HubFile) -> RepoSibling:
    """The repo's file that is meant."""
    files = {s.rfilename: s for s in siblings if s.rfilename.endswith(EXTENSIONS)}
    names = (hub_file.file_name,) if hub_file.file_name else DEFAULT_WEIGHT_NAMES
    for name in names:
        if name in files:
            return files[name]
    listed = ", ".join(sorted(files)[:10]) or "no .safetensors file"
    if hub_file.file_name:
        raise LoraNotFound(
            f"{hub_file.repo} has no file {hub_file.file_name}", f"It has: {listed}."
        )
    if len(files) == 1:
        return next(iter(files.values()))
    if not files:
        raise LoraNotFound(f"{hub_file.repo} has no .safetensors file")
    raise LoraNotFound(
        f"{hub_file.repo} has several adapter files", f"Choose one with weight_name: {listed}."
    )


def redact_url(text: str) -> str:
    """A URL without user, password, query and fragment, which may carry secrets.

    Text that is no URL, but may have been meant as one, loses them too.
    """
    scheme, separator, rest = text.rpartition("://")
    bare = re.split(r"[?#]", rest)[0]
    host, slash, path = bare.partition("/")
    if not separator and "@" in bare:
        return bare.rpartition("@")[2]
    return f"{scheme}{separator}{host.rpartition('@')[2]}{slash}{path}"
