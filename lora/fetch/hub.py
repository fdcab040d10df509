"""Asks the Hugging Face hub which file of a repo is the adapter, and at which commit."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import PurePosixPath

import httpx2
from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo, RepoSibling

from lora.errors import AccessDenied, DownloadFailed, LoraError, LoraNotFound
from lora.fetch.answers import later, status_in_words, wait_of
from lora.fetch.sources import ASK_TIMEOUT, HUB, HubFile, RemoteFile
from lora.fetch.web import USER_AGENT
from lora.formats.endings import EXTENSIONS, PICKLES, SAFETENSORS
from lora.formats.peft import PEFT_CONFIG, PEFT_STEM, STEMS


@dataclass(frozen=True)
class Hub:
    """The Hugging Face hub, or a server with the same API."""

    token: str | None = field(default=None, repr=False)
    endpoint: str = HUB

    def ask(self, hub_file: HubFile) -> RemoteFile:
        """The adapter's file, at a fixed commit.

        Raises: LoraNotFound (no such repo, revision or file, or several candidates, which it lists);
        AccessDenied (gated or private); DownloadFailed (the hub does not answer).
        """
        info = self._model_info(hub_file)
        files = {sibling.rfilename: sibling for sibling in info.siblings or []}
        chosen = _choose(files, hub_file)
        path = PurePosixPath(chosen.rfilename)
        commit = info.sha or hub_file.revision or "main"

        def url(name: str) -> str:
            return hf_hub_url(hub_file.repo, name, revision=commit, endpoint=self.endpoint)

        config = str(path.with_name(PEFT_CONFIG))
        return RemoteFile(
            url=url(chosen.rfilename),
            identity=f"hf://{hub_file.repo}@{commit}/{chosen.rfilename}",
            shown=f"{hub_file.repo}@{commit[:12]}/{chosen.rfilename}",
            file_name=path.name,
            sha256=chosen.lfs.sha256 if chosen.lfs else None,
            size=chosen.size,
            fixed=True,
            config_url=url(config) if path.stem == PEFT_STEM and config in files else None,
        )

    def _model_info(self, hub_file: HubFile) -> ModelInfo:
        """What the hub says of the repo, its files included. Raises: as `ask`."""
        shown = hub_file.repo + (f"/{hub_file.file_name}" if hub_file.file_name else "")
        # token=False keeps the client from using a token that it finds on this machine.
        api = HfApi(
            endpoint=self.endpoint, token=self.token or False, headers={"user-agent": USER_AGENT}
        )
        try:
            return api.model_info(
                hub_file.repo, revision=hub_file.revision, files_metadata=True, timeout=ASK_TIMEOUT
            )
        except GatedRepoError as error:
            raise AccessDenied(f"{shown} is gated", "Accept its terms and set HF_TOKEN.") from error
        except RevisionNotFoundError as error:
            raise LoraNotFound(f"{shown} has no revision {hub_file.revision!r}") from error
        except (RepositoryNotFoundError, HFValidationError) as error:
            hint = "Check the name; for a private repo, set HF_TOKEN."
            raise LoraNotFound(f"there is no repo {hub_file.repo} on the hub", hint) from error
        except HfHubHTTPError as error:
            raise _refusal(error, shown, has_token=bool(self.token)) from error
        except (httpx2.HTTPError, OSError) as error:
            raise DownloadFailed(f"the hub did not answer for {shown}", later(None)) from error


def _refusal(error: HfHubHTTPError, shown: str, *, has_token: bool) -> LoraError:
    """The error of ours for an answer that huggingface_hub has no name for."""
    status, after = error.response.status_code, wait_of(error.response.headers)
    if status == 401 and has_token:
        sentence = f"the hub does not accept HF_TOKEN, with which it was asked for {shown}"
        return AccessDenied(sentence, "It may be wrong, or have expired.")
    if status in (401, 403):
        return AccessDenied(f"the hub refuses access to {shown}", "Check HF_TOKEN.")
    said = status_in_words(status)
    return DownloadFailed(f"the hub did not answer for {shown} ({said})", later(after), after)


def _choose(files: dict[str, RepoSibling], hub_file: HubFile) -> RepoSibling:
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
