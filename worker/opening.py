"""Opens what the settings name: the LoRA cache and the LoRAs of LORA_CONFIG."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from lora.errors import CodedError
from lora.fetch.rules import WebRules, auth_headers, origin_of
from lora.fetch.sources import CIVITAI, HUB, Reference, parse
from lora.volume.cache import Limits, VolumeCache
from lora.volume.opening import make_cache
from lora.volume.presets import cached_names, read_config
from pipelines.weights import DEMO_LORAS, hubs
from settings import Settings, split_list
from worker.pictures.endpoints import check_names, place_of

Kind = TypeVar("Kind", bound=Settings)


def read_settings(environ: Mapping[str, str], kind: type[Kind] = Settings) -> Kind:  # type: ignore[assignment]
    """The worker's settings, every one of which can be opened. Raises: SettingsError, with every fault."""
    return kind.from_env(environ, _faults)  # type: ignore[return-value]


def _faults(settings: Settings) -> Iterator[str]:
    """What `Settings` itself cannot know to be wrong."""
    if settings.lora_default_preset and settings.lora_config:
        yield "LORA_DEFAULT_PRESET and LORA_CONFIG: only one of them can be the default"
    checks: dict[str, Callable[[], object]] = {
        "HF_ENDPOINT": lambda: origin_of(settings.hf_endpoint or HUB),
        "CIVITAI_ENDPOINT": lambda: origin_of(settings.civitai_endpoint or CIVITAI),
        "LORA_CONFIG": lambda: default_loras(settings),
        "BUCKET_ENDPOINT_URL": lambda: _place(settings),
        "BUCKET_NAME": lambda: check_names(bucket=settings.bucket_name),
        "BUCKET_REGION": lambda: check_names(region=settings.bucket_region),
        "LORA_AUTH_HEADERS": lambda: auth_headers(settings.lora_auth_headers),
    }
    for env, check in checks.items():
        try:
            check()
        except ValueError as error:
            yield f"{env}: {error}"


def _place(settings: Settings) -> object:
    """Where pictures go; None where they go into the answer. Raises: ValueError."""
    url = settings.bucket_endpoint_url
    return place_of(url, settings.bucket_name) if url else None


def open_cache(settings: Settings) -> VolumeCache:
    """The LoRA cache on the volume, with the demo's LoRAs behind it for the demo model.

    Nothing is requested or written yet.
    """
    budget = settings.lora_cache_max_gb
    limits = Limits(
        file_bytes=int(settings.lora_max_file_mb * 1e6),
        total_bytes=int(budget * 1e9) if budget else None,
        timeout=settings.lora_download_timeout,
        ttl=settings.lora_ttl_hours * 3600,
    )
    cache = make_cache(
        settings.lora_cache_dir,
        limits,
        WebRules(
            allow_private=settings.lora_allow_private_urls,
            allowed_hosts=split_list(settings.lora_allowed_hosts),
            share_private=settings.lora_share_private,
            tokens=auth_headers(settings.lora_auth_headers),
        ),
        hub=(settings.hf_endpoint, settings.hf_token),
        civitai=(settings.civitai_endpoint, settings.civitai_token),
        family="SDXL",
        hub_caches=hubs(settings),
    )
    cache.shelf.behind = DEMO_LORAS if settings.model == "demo" else None
    return cache


def default_loras(settings: Settings) -> tuple[dict[str, Any], ...]:
    """The LoRAs of LORA_CONFIG, as entries of a job's `loras`. Raises: ValueError."""
    if not settings.lora_config:
        return ()
    try:
        entries = cached_names(read_config(Path(settings.lora_config)), settings.lora_cache_dir)
        for entry in entries:
            parse(Reference(entry["path"]))
    except CodedError as error:
        raise ValueError(f"{error.sentence}. {error.hint}".strip()) from error
    if not entries:
        raise ValueError("it names no LoRA")
    return entries
