"""The base weights on the disk: which files they are, where, and whether they are whole. Without torch."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

import httpx2
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from lora.errors import CodedError
from lora.formats.header import read_header
from settings import STOCK_MODEL, Settings

log = logging.getLogger(__name__)

DEMO_MODEL = Path(__file__).resolve().parent.parent / "demo" / "model"
TRIES = 4
WEIGHTS = ".safetensors"


class WeightsMissing(RuntimeError):
    """The weights that the settings name are not on this machine; the text says what to run."""


class WeightsIncomplete(RuntimeError):
    """Weights are missing or not whole; the text says which."""


def files_to_bake(names: Iterable[str]) -> list[str]:
    """Which files of a diffusers repo a worker needs: configs, tokenizers and one set of weights.

    Half precision where the repo has it; no weights in other formats, and no single-file checkpoint
    beside the folders.
    """
    listed = sorted(names)
    wanted = [n for n in listed if n.endswith((".json", ".txt")) and "/." not in n]
    folders = {str(PurePosixPath(n).parent) for n in listed}
    for folder in sorted(folders):
        here = [n for n in listed if str(PurePosixPath(n).parent) == folder and n.endswith(WEIGHTS)]
        known = [
            n
            for n in here
            if PurePosixPath(n).name.startswith(("diffusion_pytorch_model", "model"))
        ]
        half = [n for n in known if ".fp16" in PurePosixPath(n).name]
        wanted += half or known
    return wanted


def bake(repo: str, token: str | None, pause: Callable[[float], None] = time.sleep) -> Path:
    """Downloads what the worker needs of a repo into the Hugging Face cache; tries four times.

    Raises: WeightsMissing if there is no such repo, or after the last try.
    """
    for attempt in range(1, TRIES + 1):
        try:
            siblings = HfApi(token=token or False).model_info(repo).siblings or []
            files = files_to_bake(sibling.rfilename for sibling in siblings)
            return Path(snapshot_download(repo, allow_patterns=files, token=token or False))
        except (RepositoryNotFoundError, HFValidationError) as error:
            hint = "check the name, or set HF_TOKEN if it is private"
            raise WeightsMissing(f"there is no repo {repo} on the hub; {hint}") from error
        except (HfHubHTTPError, httpx2.HTTPError, LocalEntryNotFoundError, OSError) as error:
            kind = type(error).__name__
            log.warning("%s: %s (try %d of %d)", repo, kind, attempt, TRIES)
            if attempt < TRIES:
                pause(5.0 * 2 ** (attempt - 1))
    raise WeightsMissing(f"{repo} could not be downloaded in {TRIES} tries")


def check(folder: Path) -> None:
    """Raises WeightsIncomplete unless every network has weights and each weight file is whole.

    The networks are those that `model_index.json` names; without one, the folder itself is one.
    """
    index = folder / "model_index.json"
    parts = json.loads(index.read_text()) if index.exists() else {}
    networks = [n for n, kind in parts.items() if isinstance(kind, list) and _is_network(kind)]
    for part in [folder / name for name in networks] or [folder]:
        if not any(part.rglob(f"*{WEIGHTS}")):
            raise WeightsIncomplete(f"{part.name} holds no {WEIGHTS} file")
    files = sorted(folder.rglob(f"*{WEIGHTS}"))
    for file in files:
        try:
            read_header(file)
        except CodedError as error:
            raise WeightsIncomplete(f"{file.relative_to(folder)}: {error.sentence}") from error


def _is_network(kind: list[str | None]) -> bool:
    """Whether a part of a pipeline, as (library, class), has weights."""
    return str(kind[1]).endswith(("Model", "AutoencoderKL", "CLIPTextModelWithProjection"))


def repos_to_bake(settings: Settings) -> list[str]:
    """The hub repos that the settings name; folders, files and the demo need no baking."""
    sources = [settings.model, settings.refiner_source, settings.vae_source]
    if settings.model.endswith(WEIGHTS):
        sources.append(STOCK_MODEL)  # a single checkpoint is loaded with SDXL's configs
    return [s for s in sources if s and s != "demo" and not Path(s).exists()]


def find_weights(source: str) -> Path:
    """The folder or file that a source means on this machine; asks no network.

    Raises: WeightsMissing.
    """
    if source == "demo":
        return DEMO_MODEL
    path = Path(source)
    if path.exists():
        return path
    try:
        # Only part of a repo is baked, and without patterns the client asks for all of it.
        index = ["model_index.json", "config.json"]
        return Path(snapshot_download(source, allow_patterns=index, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise WeightsMissing(
            f"{source} is neither a folder or file here nor a baked repo; "
            "run python download_weights.py first"
        ) from error
