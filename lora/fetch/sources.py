"""What a reference to a LoRA means: a URL, a file in a Hugging Face repo or on Civitai, or a cached name.

    https://host/path/file.safetensors             any URL
    user/repo, user/repo@revision                  a repo on the hub; its one adapter file
    user/repo/folder/file.safetensors              that file of the repo; hf://… means the same
    https://huggingface.co/user/repo/blob/main/…   the same, as the hub's pages link it
    civitai:MODEL, civitai:MODEL@VERSION           a model on Civitai, its newest or that version
    civitai:MODEL@VERSION+FILE                     that file of it
    urn:air:sdxl:lora:civitai:MODEL@VERSION        the same, as an AIR
    https://civitai.com/models/MODEL…              the same, as Civitai's pages and downloads link it
    name.safetensors, name, folder/name            a file that is already in the cache

A name that exists in the cache takes precedence over a hub repo of that name. This module only looks at the
text: no network, no disk. `lora.fetch.hub` and `lora.fetch.civitai` ask where a file is, `lora.volume.cache`
fetches it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from urllib.parse import SplitResult, unquote, urlsplit

from lora.errors import SourceInvalid
from lora.fetch.links import credential_of, identity_of, number_of, query_of, token_of
from lora.fetch.redaction import redact_url
from lora.formats.endings import EXTENSIONS

HUB, CIVITAI = "https://huggingface.co", "https://civitai.com"
ASK_TIMEOUT = 30.0
"""Seconds that the hub or Civitai may take to say which file it is."""

HUB_HOSTS = frozenset({"huggingface.co", "www.huggingface.co", "hf.co"})
CIVITAI_HOSTS = frozenset(
    f"{prefix}civitai.{ending}" for prefix in ("", "www.") for ending in ("com", "red", "green")
)
"""Civitai's names for one site: `.com` shows a part of what `.red` shows, by the same numbers."""

FILE_FACTS = ("type", "format", "size", "fp", "quantType")
"""What the query of a link to Civitai may say of the file, as Civitai calls it."""

AIR_FORMATS = {"safetensor": "SafeTensor", "safetensors": "SafeTensor"} | dict.fromkeys(
    ("ckpt", "pt", "pickle", "pickletensor"), "PickleTensor"
)
"""The format at the end of an AIR -> what Civitai calls it."""

GRAMMAR_HINT = (
    "Give an http(s) URL, a Hugging Face repo (user/repo), civitai:MODEL@VERSION, or the name of a "
    "cached file."
)

_REPO = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
_REVISION = r"refs/(?:convert/\w+|pr/\d+)|[\w.-]+"
_HUB_NAME = re.compile(
    rf"(?P<repo>{_REPO})(?:@(?P<revision>{_REVISION}))?(?:/(?P<file>[^@]+))?", re.ASCII
)
_CIVITAI_NAME = re.compile(
    r"(?:(?:urn:)?(?:air:)?[\w.-]*:[\w.-]*:)?civitai:(?P<model>\d{1,18})"
    r"(?:@(?P<version>\d{1,18}))?(?:\+(?P<file>\d{1,18}))?(?:\.(?P<format>\w+))?",
    re.ASCII | re.IGNORECASE,
)


@dataclass(frozen=True)
class Reference:
    """One LoRA as a request names it. `scale` is no part of it: it does not change which file it is."""

    path: str
    weight_name: str | None = None
    revision: str | None = None
    sha256: str | None = None
    refresh: bool = False
    """Ask the source again even if the cache has the file."""

    @property
    def shown(self) -> str:
        """The reference as it may be shown: a URL without user, query and fragment."""
        return redact_url(self.path)


@dataclass(frozen=True)
class CachedName:
    """A file that must already be in the cache: its path there, with or without extension."""

    name: str
    sha256: str | None = None


@dataclass(frozen=True)
class RemoteFile:
    """A file to be fetched: its URL, and what is known of it before the download. Holds no token of ours."""

    url: str = field(repr=False)
    identity: str = field(repr=False)
    """The same for any two requests for one file; its name in the cache contains a hash of this."""
    shown: str
    file_name: str
    sha256: str | None = None
    size: int | None = None
    fixed: bool = False
    """Whether the content can never change (a commit, a version), so that it need not be asked for again."""
    config_url: str | None = field(default=None, repr=False)
    """The URL of a PEFT adapter's adapter_config.json."""
    template_url: str | None = field(default=None, repr=False)
    """The URL of the file that holds its chat template; None if it is known to have none."""
    token: str | None = field(default=None, repr=False, compare=False)
    """The bearer token that the request's link named, for the URL's own origin; never written down."""

    @property
    def credential(self) -> str | None:
        """What of the request's link opens the file, such as a signature; None if nothing does."""
        return credential_of(self.url, self.token)


@dataclass(frozen=True)
class HubFile:
    """A hub repo, and the file in it if it is named, before the hub was asked."""

    repo: str
    file_name: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class CivitaiFile:
    """A model on Civitai, or a version of one, before Civitai was asked."""

    model: int | None
    version: int | None
    file_name: str | None = None
    wanted: tuple[tuple[str, str], ...] = ()
    """What the link says of the file: pairs of (one of FILE_FACTS or fileId, value)."""
    token: str | None = field(default=None, repr=False, compare=False)
    """The token in the link; it does not change which file it is."""


Location = RemoteFile | HubFile | CivitaiFile | CachedName


def parse(reference: Reference, hub: str = HUB, civitai: str = CIVITAI) -> Location:
    """The location that a reference's text means. `hub` and `civitai` are the URLs of the servers in use.

    `user/repo` gives a HubFile, although a cached file may have that path: the caller looks into its cache
    first. Raises: SourceInvalid.
    """
    path = reference.path.strip()
    if path.startswith("hf://"):
        path = path.removeprefix("hf://").removeprefix("models/")
        if hub_file := _hub_name(path, reference, whole=True):
            return hub_file
        raise SourceInvalid("hf:// is not followed by user/repo", GRAMMAR_HINT)
    if "://" in path:
        return _parse_url(path, reference, hub, civitai)
    if match := _CIVITAI_NAME.fullmatch(path):
        _only_for_repos(reference, reference.revision)
        return _civitai_name(match, reference)
    # Anything but a plain name may be a misspelt URL with a token in it, so the error does not repeat it.
    plain = path.isprintable() and not set(path) & set("?#:\\") and len(path.encode()) <= 240
    if not path or not plain or path.startswith("//"):
        raise SourceInvalid("the LoRA's source is neither a URL nor a plain name", GRAMMAR_HINT)
    parts = PurePosixPath(path).parts
    if path.startswith(("/", "~")) or ".." in parts:
        raise SourceInvalid(f"{reference.shown!r} leads out of the LoRA cache", GRAMMAR_HINT)
    if hub_file := _hub_name(path, reference, whole=False):
        return hub_file
    if "@" in path:
        raise SourceInvalid("the LoRA's source is neither a URL nor a plain name", GRAMMAR_HINT)
    _only_for_repos(reference, reference.weight_name, reference.revision)
    return CachedName(path, reference.sha256)


def _hub_name(path: str, reference: Reference, *, whole: bool) -> HubFile | None:
    """`user/repo[@revision][/file]`; None for what is more likely the name of a cached file.

    `whole`: the text began with hf://, so the file may have any name.
    """
    match = _HUB_NAME.fullmatch(path)
    if match is None or ".." in PurePosixPath(path).parts:
        return None
    file, revision = match["file"], match["revision"]
    is_file = (file or match["repo"]).endswith(EXTENSIONS)
    if not whole and is_file != bool(file):
        return None
    _only_for_repos(reference, file and reference.weight_name, revision and reference.revision)
    return HubFile(match["repo"], file or reference.weight_name, revision or reference.revision)


def _only_for_repos(reference: Reference, *values: str | None) -> None:
    """Raises: SourceInvalid if one of these fields is set, where it has no meaning."""
    if any(values):
        raise SourceInvalid(
            f"weight_name and revision do not apply to {reference.shown}",
            "They choose a file and a version of a Hugging Face repo (user/repo).",
        )


def _parse_url(path: str, reference: Reference, hub: str, civitai: str) -> Location:
    shown = reference.shown
    try:
        parts = urlsplit(path)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise SourceInvalid(f"{shown!r} is not a valid URL", GRAMMAR_HINT) from error
    if parts.scheme not in ("http", "https") or not host:
        raise SourceInvalid(f"{shown!r} is not an http(s) URL with a host name", GRAMMAR_HINT)
    location: HubFile | CivitaiFile | None = None
    if host in HUB_HOSTS or parts.netloc == urlsplit(hub).netloc:
        location = _hub_url(parts, reference)
    elif host in CIVITAI_HOSTS or parts.netloc == urlsplit(civitai).netloc:
        location = _civitai_url(parts, reference)
    if location:
        return location
    _only_for_repos(reference, reference.weight_name, reference.revision)
    name = PurePosixPath(unquote(parts.path)).name or host
    return RemoteFile(path, identity_of(parts), shown, name, reference.sha256)


def _civitai_name(match: re.Match[str], reference: Reference) -> CivitaiFile:
    model, version, file, ending = match.groups()
    if ending and ending.lower() not in AIR_FORMATS:
        raise SourceInvalid(
            f"{reference.shown} names a file in the format {ending}, which is no adapter's",
            "Leave the ending out, or say .safetensors.",
        )
    wanted = [("format", AIR_FORMATS[ending.lower()])] if ending else []
    wanted += [("fileId", str(int(file)))] if file else []
    number = int(version) if version else None
    return CivitaiFile(int(model), number, reference.weight_name, tuple(wanted))


def _hub_url(parts: SplitResult, reference: Reference) -> HubFile | None:
    """/user/repo, and /user/repo/(blob|resolve|raw|tree)/revision/file; None for any other page.

    Raises: SourceInvalid if its query says what cannot be used.
    """
    path = "/".join(step for step in parts.path.split("/") if step)
    page = re.fullmatch(rf"({_REPO})(?:/(blob|resolve|raw|tree)/(.+))?", path, re.ASCII)
    if page is None or (not page[3] and page[1].endswith(EXTENSIONS)):
        return None
    rest = unquote(page[3] or "")
    match = re.fullmatch(rf"({_REVISION})(?:/(.+))?", rest, re.ASCII)
    if (rest and match is None) or ".." in PurePosixPath(rest).parts:
        return None
    said = query_of(parts, {"show_file_info"}, reference.shown)
    revision, file = (match[1], match[2]) if match else (None, None)
    shown_file, name = said.get("show_file_info"), reference.weight_name
    is_folder = page[2] == "tree" and file and not file.endswith(EXTENSIONS)
    _only_for_repos(
        reference, None if is_folder else file and name, revision and reference.revision
    )
    if shown_file and (file or name):
        raise SourceInvalid(f"{reference.shown}: it names a file, and show_file_info another")
    if is_folder and name:
        file = f"{file}/{name}"
    return HubFile(page[1], file or shown_file or name, revision or reference.revision)


def _civitai_url(parts: SplitResult, reference: Reference) -> CivitaiFile | None:
    """/models/M[/name][?modelVersionId=V], /model-versions/V and /api/download/models/V, also as /api/v1/…;
    None for any other page. Raises: SourceInvalid if its query says what cannot be used.
    """
    download = re.fullmatch(
        r"/(?:api/download/models|(?:api/v1/)?model-versions)/(\d{1,18})/?", parts.path, re.ASCII
    )
    page = re.fullmatch(r"/(?:api/v1/)?models/(\d{1,18})(?:/[^/]*)?/?", parts.path, re.ASCII)
    if not download and not page:
        return None
    shown = reference.shown
    _only_for_repos(reference, reference.revision)
    said = query_of(parts, {*FILE_FACTS, "fileId", "modelVersionId", "token"}, shown)
    wanted = [(name, said[name]) for name in FILE_FACTS if name in said]
    if file := number_of(said, "fileId", shown):
        wanted.append(("fileId", str(file)))
    version = number_of(said, "modelVersionId", shown)
    if download:
        if version not in (None, int(download[1])):
            raise SourceInvalid(f"{shown} and its modelVersionId are two versions")
        version = int(download[1])
    model = int(page[1]) if page else None
    return CivitaiFile(model, version, reference.weight_name, tuple(wanted), token_of(said, shown))
