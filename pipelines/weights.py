"""The base weights on the disk: which files they are, where they lie, whether they are whole.

The image's layer of base weights copies what this imports: nothing of ours but the settings, and no torch.
"""

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
from safetensors import SafetensorError, safe_open

from settings import STOCK_MODEL, Settings

log = logging.getLogger(__name__)

DEMO_MODEL = Path(__file__).resolve().parent.parent / "demo" / "model"
DEMO_LORAS = DEMO_MODEL.parent / "loras"
TRIES = 4
WEIGHTS = ".safetensors"


class WeightsMissing(RuntimeError):
    """Weights that the settings name are not on this machine; the text says what to run."""


class WeightsIncomplete(RuntimeError):
    """Weights are missing or not whole; the text says which."""


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


def bake(repo: str, token: str | None, pause: Callable[[float], None] = time.sleep) -> Path:
    """Downloads the files that the worker needs of a repo into the Hugging Face cache; tries four times.

    Raises: WeightsMissing if there is no such repo, or if the last try fails.
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
    names = [name for name, kind in parts.items() if isinstance(kind, list) and _is_network(kind)]
    for network in [folder / name for name in names] or [folder]:
        if not any(network.rglob(f"*{WEIGHTS}")):
            raise WeightsIncomplete(f"{network.name} holds no {WEIGHTS} file")
    for file in sorted(folder.rglob(f"*{WEIGHTS}")):
        try:
            with safe_open(file, framework="np"):  # compares the header with the file's length
                pass
        except (SafetensorError, OSError) as error:
            raise WeightsIncomplete(f"{file.relative_to(folder)} is not whole ({error})") from error


def _is_network(kind: list[str | None]) -> bool:
    """Whether a part of a pipeline, given as [library, class], has weights."""
    return str(kind[1]).endswith(("Model", "AutoencoderKL", "CLIPTextModelWithProjection"))


def repos_to_bake(settings: Settings) -> list[str]:
    """The hub repos that the settings name; folders, files and the demo need no baking."""
    sources = [
        settings.model,
        settings.refiner_source,
        settings.vae_source,
        settings.tiny_vae_source,
    ]
    if settings.model.endswith(WEIGHTS):
        sources.append(STOCK_MODEL)  # a single checkpoint is loaded with SDXL's configs
    return [
        source for source in sources if source and source != "demo" and not Path(source).exists()
    ]


def find_weights(source: str) -> Path:
    """The folder or file of a source on this machine; uses no network. Raises: WeightsMissing."""
    if source == "demo":
        return DEMO_MODEL
    path = Path(source)
    if path.exists():
        return path
    try:
        # Without patterns the client looks for all files of the repo, and only some are baked.
        index = ["model_index.json", "config.json"]
        return Path(snapshot_download(source, allow_patterns=index, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise WeightsMissing(
            f"{source} is neither a folder or file here nor a baked repo; fetch the weights with "
            "python download_weights.py (about 14 GB for SDXL with refiner and VAE in half "
            "precision), or set WORKER_MODEL=demo for the embedded model"
        ) from error
