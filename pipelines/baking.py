"""Fetches the base weights from the hub: what of a repo is needed, and where it is put."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

import httpx2
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from pipelines.weights import WEIGHTS, WeightsMissing
from settings import STOCK_MODEL, Settings

log = logging.getLogger(__name__)

TRIES = 4


def files_to_bake(names: Iterable[str]) -> list[str]:
    """Which files of a diffusers repo a worker needs: configs, tokenizers and one set of weights.

    The weights are those in half precision, if the repo has them. Other formats, and a checkpoint of all
    networks beside their folders, are left out.
    """
    paths = [PurePosixPath(name) for name in sorted(names)]
    wanted = [path for path in paths if path.suffix in (".json", ".txt") and "/." not in str(path)]
    weights = [
        path
        for path in paths
        if path.suffix == WEIGHTS and path.name.startswith(("diffusion_pytorch_model", "model"))
    ]
    for folder in sorted({str(path.parent) for path in weights}):
        here = [path for path in weights if str(path.parent) == folder]
        wanted += [path for path in here if ".fp16" in path.name] or here
    return [str(path) for path in wanted]


def bake(
    repo: str,
    token: str | None,
    place: Path | None = None,
    pause: Callable[[float], None] = time.sleep,
    *,
    revision: str | None = None,
    files: Sequence[str] = (),
) -> Path:
    """Downloads the files that the worker needs of a repo; tries four times. Returns their folder.

    `place`: a folder in the layout of the hub's cache, by default the one that the image holds. `files`:
    patterns of names, in place of `files_to_bake`. Several workers may do so at once.
    Raises: WeightsMissing if there is no such repo or revision, or if the last try fails.
    """
    for attempt in range(1, TRIES + 1):
        try:
            info = HfApi(token=token or False).model_info(repo, revision=revision)
            names = [sibling.rfilename for sibling in info.siblings or []]
            wanted = [n for n in names if any(fnmatch(n, one) for one in files)]
            return Path(
                snapshot_download(
                    repo,
                    revision=revision,
                    allow_patterns=wanted if files else files_to_bake(names),
                    token=token or False,
                    cache_dir=place,
                )
            )
        except (RepositoryNotFoundError, HFValidationError) as error:
            hint = "check the name, or set HF_TOKEN if it is private"
            raise WeightsMissing(f"there is no repo {repo} on the hub", hint) from error
        except RevisionNotFoundError as error:
            raise WeightsMissing(f"{repo} has no revision {revision} on the hub") from error
        except OfflineModeIsEnabled as error:
            sentence = (
                f"{repo} is not on this machine, and HF_HUB_OFFLINE keeps it from being fetched"
            )
            raise WeightsMissing(sentence) from error
        except (HfHubHTTPError, httpx2.HTTPError, LocalEntryNotFoundError, OSError) as error:
            kind = type(error).__name__
            log.warning("%s: %s (try %d of %d)", repo, kind, attempt, TRIES)
            if attempt < TRIES:
                pause(5.0 * 2 ** (attempt - 1))
    raise WeightsMissing(f"{repo} could not be downloaded in {TRIES} tries")


def repos_to_bake(settings: Settings) -> list[str]:
    """The hub repos that the settings name; folders, files and the demo need no baking."""
    sources = [*settings.weight_sources]
    if settings.model.endswith(WEIGHTS):
        sources.append(STOCK_MODEL)  # a single checkpoint is loaded with SDXL's configs
    return [source for source in sources if source != "demo" and not Path(source).exists()]
