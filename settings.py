"""Every setting of the worker, read once from the environment into one frozen object."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

STOCK_MODEL = "stabilityai/stable-diffusion-xl-base-1.0"
STOCK_REFINER = "stabilityai/stable-diffusion-xl-refiner-1.0"
STOCK_VAE = "madebyollin/sdxl-vae-fp16-fix"
DEMO_TINY_VAE = Path(__file__).resolve().parent / "demo" / "tiny_vae"

OWN_PREFIXES = ("LORA_", "WORKER_")
"""An unknown variable with one of these is refused: it is a misspelt setting."""

BOOLEANS = {"0": False, "1": True, "false": False, "true": True}


class SettingsError(ValueError):
    """The environment is not usable; the text lists every fault."""


def _setting(env: str, default: Any, description: str, **about: Any) -> Any:
    """A field, its variable, and what the docs and `.runpod/hub.json` say of it.

    `about`: `secret` (not in the repr), `minimum` (of a number), `options` (of a text), `token` (a header
    must be able to carry it).
    """
    about = {"env": env, "description": description, "secret": False, **about}
    return field(default=default, metadata=about, repr=not about["secret"])


# fmt: off
@dataclass(frozen=True)
class Settings:
    """The worker's settings. A test holds docs/settings.md and `.runpod/hub.json` to these fields."""

    kind: str = _setting("WORKER_KIND", "image",
        "What the worker makes: `image`; `live`, images and streams of frames (docs/live.md); or `text` "
        "from a language model (docs/text.md)", options=("image", "live", "text"))
    serve: str = _setting("WORKER_SERVE", "queue",
        "How the worker is reached: `queue` takes RunPod's jobs; `http` is a server of its own, for "
        "load-balancing endpoints, pods and laptops (docs/http.md)", options=("queue", "http"))
    host: str = _setting("WORKER_HOST", "0.0.0.0",
        "Address at which the server listens; `127.0.0.1` is this machine alone")
    port: int = _setting("PORT", 8000,
        "Port of the server; 0 takes a free one. On RunPod it must be exposed", minimum=0)
    port_health: int = _setting("PORT_HEALTH", 0,
        "Port that answers `/ping` besides; 0 for none", minimum=0)
    api_key: str = _setting("WORKER_API_KEY", "",
        "What the server's clients must send as `Authorization: Bearer`; only `/ping` is open without. "
        "If it is empty, everybody may ask. A load-balancing endpoint checks RunPod's key itself, and needs "
        "none", secret=True, token=True)
    waiting: int = _setting("WORKER_WAITING", 16,
        "Requests that wait at most for those that the server works on; more get 429 with Retry-After",
        minimum=0)
    max_body_mb: float = _setting("WORKER_MAX_BODY_MB", 30.0,
        "Largest body of a request to the server, in MB; a larger one gets 413 (RunPod carries 30)",
        minimum=0.001)
    model: str = _setting("WORKER_MODEL", STOCK_MODEL,
        "Base model: a Hugging Face repo, a folder in diffusers layout, a single .safetensors "
        "checkpoint, or `demo` for the embedded model")
    refiner: str = _setting("WORKER_REFINER", "auto",
        "Refiner: a Hugging Face repo or a folder; `none` for none; `auto` is SDXL's refiner with "
        "SDXL's own base and none with any other")
    vae: str = _setting("WORKER_VAE", "auto",
        "VAE in place of the model's own: a Hugging Face repo or a folder; `none` for none; `auto` "
        "is the fp16-fix VAE with SDXL's own base and none with any other")
    tiny_vae: str = _setting("WORKER_TINY_VAE", "none",
        "Small VAE for live frames (docs/live.md), in place of the model's: a Hugging Face repo or a folder "
        "of diffusers' AutoencoderTiny, such as `madebyollin/taesdxl`; `demo` is the demo model's; `none` "
        "for none")
    weights: str = _setting("WORKER_WEIGHTS", "auto",
        "Where base weights lie that are named by a Hugging Face repo, and LoRAs that need not be asked for "
        "(docs/sources.md): `baked` into the image, `cached` by "
        "RunPod (the endpoint's setting *Model*), or on the network `volume`; `auto` looks in this order. "
        "`download` does the same, and what is nowhere is downloaded to the volume when the worker starts; a "
        "worker for text does so with `auto`, too",
        options=("auto", "baked", "cached", "volume", "download"))
    weights_dir: Path = _setting("WORKER_WEIGHTS_DIR", Path("/runpod-volume/huggingface/hub"),
        "Folder of the base weights on the network volume, in the layout of Hugging Face's own cache")
    device: str = _setting("WORKER_DEVICE", "auto", "`cuda`, `cpu`, or `auto`: cuda if there is one")
    dtype: str = _setting("WORKER_DTYPE", "auto",
        "Precision of the weights; `auto` is float16 on cuda and float32 on cpu",
        options=("auto", "float16", "bfloat16", "float32"))
    max_answer_mb: float = _setting("WORKER_MAX_ANSWER_MB", 10.0,
        "Largest answer in MB; a larger one fails with OUTPUT_TOO_LARGE (RunPod carries 10 for /run, "
        "20 for /runsync)", minimum=0.001)
    concurrency: int = _setting("WORKER_CONCURRENCY", 2,
        "Jobs that the worker has at most: one draws, the others fetch and parse their LoRAs. Another "
        "is taken only when the drawing is nearly done, or all jobs are fetching; until then it waits "
        "in the endpoint's queue, where an idle worker can take it",
        minimum=1)
    live_sessions: int = _setting("WORKER_LIVE_SESSIONS", 1,
        "Live sessions at once; they share the model frame by frame, and with other jobs", minimum=1)
    live_seconds: float = _setting("WORKER_LIVE_SECONDS", 300.0,
        "Seconds after which a live session ends; 0 sets no limit", minimum=0)
    deadline: float = _setting("WORKER_DEADLINE", 0.0,
        "Seconds of its own fetching and drawing after which a job ends with DEADLINE_EXCEEDED, unless "
        "its own executionTimeout comes first; 0 sets no limit of the worker's own. Waiting for another "
        "job's drawing does not count", minimum=0)
    lora_cache_dir: Path = _setting("LORA_CACHE_DIR", Path("/models/loras"),
        "Folder of the LoRA cache; on RunPod a folder of the network volume, such as "
        "/runpod-volume/loras. Without a volume there, every answer warns that LoRAs are lost when the "
        "worker stops")
    lora_cache_max_gb: float = _setting("LORA_CACHE_MAX_GB", 0.0,
        "Most GB that downloaded LoRAs may take; those used least recently are removed first; 0 sets no "
        "limit", minimum=0)
    lora_max_file_mb: float = _setting("LORA_MAX_FILE_MB", 2048.0,
        "Largest LoRA file, in MB, that is downloaded", minimum=1)
    lora_download_timeout: float = _setting("LORA_DOWNLOAD_TIMEOUT", 300.0,
        "Seconds that one download may take", minimum=1)
    lora_ttl_hours: float = _setting("LORA_TTL_HOURS", 24.0,
        "Hours until the worker asks again which commit a repo's branch has, which version is the newest "
        "on Civitai, and whether a URL's file has changed", minimum=0)
    lora_preload: str = _setting("LORA_PRELOAD", "",
        "LoRAs that are fetched and parsed when the worker starts, in the background: sources, "
        "separated by commas, or a JSON list of them", secret=True)
    lora_training_dir: str = _setting("LORA_TRAINING_DIR", "",
        "Folder that trainers write adapters to, in sub-folders too; `library.activate` copies an adapter "
        "from there into the cache")
    lora_default_preset: str = _setting("LORA_DEFAULT_PRESET", "",
        "Preset that applies to each job without `loras` and `lora_selection`")
    lora_config: str = _setting("LORA_CONFIG", "",
        "Config file in LightX2V's form; its LoRAs apply to each job without `loras` and "
        "`lora_selection`")
    lora_allowed_hosts: str = _setting("LORA_ALLOWED_HOSTS", "",
        "Hosts that URLs may name or redirect to, separated by commas; all others are refused. "
        "`*.example.com` means every host below example.com. Empty allows all public hosts")
    lora_allow_private_urls: bool = _setting("LORA_ALLOW_PRIVATE_URLS", False,
        "`1` allows URLs with hosts in the worker's own network, which are refused otherwise")
    lora_share_private: bool = _setting("LORA_SHARE_PRIVATE", False,
        "`1` lets a LoRA that the signature, token or password in one request's link opened serve requests "
        "without it. Otherwise its source is asked with each request's own")
    lora_auth_headers: str = _setting("LORA_AUTH_HEADERS", "",
        'Tokens for other hosts, as JSON: `{"models.example.com": "Authorization: Bearer …"}`; each is '
        "sent to its own host alone, over https unless the key says `http://…`", secret=True)
    lora_mode: str = _setting("LORA_MODE", "auto",
        "How LoRAs are applied: `dynamic` adds them in each layer's forward and is ready in milliseconds; "
        "`merged` writes them into the weights and slows no step down; `auto` merges where steps and "
        "memory make it pay", options=("auto", "dynamic", "merged"))
    lora_warm_gb: float = _setting("LORA_WARM_GB", 2.0,
        "Memory in GB that keeps the LoRA files of earlier jobs read, so that they need not be read again",
        minimum=0)
    lora_prepared_gb: float = _setting("LORA_PREPARED_GB", 2.0,
        "Memory in GB, on the device, that keeps LoRA stacks of earlier jobs ready, so that using one "
        "again builds nothing (a merged stack over all of SDXL takes 4.4)", minimum=0)
    lora_originals_gb: float = _setting("LORA_ORIGINALS_GB", 5.0,
        "Memory in GB, on the device, that keeps the original values of merged weights between jobs (4.4 "
        "for all of SDXL); what does not fit is copied again in each job", minimum=0)
    hf_token: str = _setting("HF_TOKEN", "", "Hugging Face token for gated and private repos",
        secret=True, token=True)
    hf_endpoint: str = _setting("HF_ENDPOINT", "", "Address of another hub with Hugging Face's API")
    civitai_token: str = _setting("CIVITAI_TOKEN", "",
        "Civitai token for models that need a login; the `token` in a request's own link comes first",
        secret=True, token=True)
    civitai_endpoint: str = _setting("CIVITAI_ENDPOINT", "",
        "Address of another server with Civitai's API")
    bucket_endpoint_url: str = _setting("BUCKET_ENDPOINT_URL", "",
        "S3 endpoint, in any of the forms in which its store writes it; if it is set, pictures are uploaded "
        "there and the answer has their URLs, which are valid for a week")
    bucket_name: str = _setting("BUCKET_NAME", "",
        "S3 bucket for the pictures; if it is empty, the one that the endpoint names, else the bucket that "
        "is named for the month, such as `11-26`")
    bucket_access_key_id: str = _setting("BUCKET_ACCESS_KEY_ID", "", "S3 access key id", secret=True)
    bucket_secret_access_key: str = _setting("BUCKET_SECRET_ACCESS_KEY", "", "S3 secret access key",
        secret=True)
    bucket_region: str = _setting("BUCKET_REGION", "",
        "The bucket's region; if empty, as the endpoint says, and then as the store says")
    bucket_prefix: str = _setting("BUCKET_PREFIX", "",
        "What each picture's key begins with, such as `pictures/2026`")
    bucket_addressing: str = _setting("BUCKET_ADDRESSING", "auto",
        "Where the bucket stands in URLs: `path` after the host, `virtual` in the host's name; `auto` as the "
        "endpoint shows it, or as its store wants it", options=("auto", "path", "virtual"))
    # fmt: on

    def __post_init__(self) -> None:
        if faults := list(self._faults()):
            raise SettingsError("; ".join(faults))

    def _faults(self) -> Iterator[str]:
        for setting in fields(self):
            if fault := _fault_of(setting.metadata, getattr(self, setting.name)):
                yield f"{setting.metadata['env']}: {fault}"
        try:
            _ = self.preload
        except ValueError as error:
            yield f"LORA_PRELOAD: {error}"

    @classmethod
    def from_env(
        cls,
        environ: Mapping[str, str],
        more_faults: Callable[[Settings], Iterable[str]] = lambda settings: (),
    ) -> Settings:
        """Reads and checks the environment; an empty variable counts as not set.

        `more_faults` checks what the values mean; for a variable that is wrong, it sees the default.
        Raises: SettingsError with every fault at once, unknown LORA_* and WORKER_* names included.
        """
        by_env = {setting.metadata["env"]: setting for setting in fields(cls)}
        faults = [
            f"{name} is not a setting{_did_you_mean(name, by_env)}"
            for name in environ
            if name.startswith(OWN_PREFIXES) and name not in by_env
        ]
        values: dict[str, Any] = {}
        for env, setting in by_env.items():
            if text := environ.get(env, "").strip():
                try:
                    value = _parsed(text, type(setting.default))
                    cls(**{setting.name: value})
                except SettingsError as error:
                    faults.append(str(error))
                except ValueError as error:
                    faults.append(f"{env}: {error}")
                else:
                    values[setting.name] = value
        settings = cls(**values)
        if faults := [*faults, *more_faults(settings)]:
            raise SettingsError("; ".join(faults))
        return settings

    @property
    def weight_sources(self) -> tuple[str, ...]:
        """Where the networks come from that are loaded."""
        return tuple(filter(
                None,
                (self.model, self.refiner_source, self.vae_source, self.tiny_vae_source),
            ))

    @property
    def downloads(self) -> bool:
        """Whether base weights that are nowhere are downloaded."""
        return self.weights == "download"

    @property
    def model_revision(self) -> str | None:
        """The branch, tag or commit of the base model's repo; None for its `main`."""
        return None

    @property
    def refiner_source(self) -> str | None:
        """The refiner to load, `auto` resolved; None for none."""
        return self._companion(self.refiner, STOCK_REFINER)

    @property
    def vae_source(self) -> str | None:
        """The VAE to load in place of the model's own, `auto` resolved; None for none."""
        return self._companion(self.vae, STOCK_VAE)

    @property
    def tiny_vae_source(self) -> str | None:
        """The tiny VAE to load; None for none."""
        if self.tiny_vae == "demo":
            return str(DEMO_TINY_VAE)
        return None if self.tiny_vae == "none" else self.tiny_vae

    @property
    def preload(self) -> tuple[str, ...]:
        """The sources of LORA_PRELOAD."""
        text = self.lora_preload.strip()
        if not text.startswith("["):
            return split_list(text)
        sources = _parse_json(text)
        if not all(isinstance(source, str) for source in sources):
            raise ValueError("it is not a JSON list of sources")
        return tuple(sources)

    def _companion(self, value: str, stock: str) -> str | None:
        if value == "auto":
            return stock if self.model == STOCK_MODEL else None
        return None if value == "none" else value


def _parsed(text: str, kind: type) -> Any:
    """The text as a value of a field's type. Raises: ValueError."""
    if kind is bool:
        if text.lower() not in BOOLEANS:
            raise ValueError(f"{text!r} is none of {', '.join(BOOLEANS)}")
        return BOOLEANS[text.lower()]
    try:
        return kind(text)
    except ValueError:
        whole = "whole " if kind is int else ""
        raise ValueError(f"{text!r} is not a {whole}number") from None


def _fault_of(about: Mapping[str, Any], value: Any) -> str:
    """What is wrong with one value; empty if nothing is."""
    if value not in about.get("options", (value,)):
        return f"{value!r} is none of {', '.join(about['options'])}"
    if "minimum" in about and not about["minimum"] <= value < float("inf"):
        return f"{value:g} is not a number of at least {about['minimum']}"
    if about.get("token") and not (value.isascii() and value.isprintable()):
        return "it holds a character that no token may"
    return ""


def _did_you_mean(name: str, by_env: Mapping[str, Any]) -> str:
    close = get_close_matches(name, list(by_env), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def split_list(text: str) -> tuple[str, ...]:
    """The parts of a list that is separated by commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _parse_json(text: str) -> Any:
    """Raises: ValueError that repeats nothing of the text, which may hold secrets."""
    try:
        return json.loads(text)
    except ValueError:
        raise ValueError("it is no JSON") from None
