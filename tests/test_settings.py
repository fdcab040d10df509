from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from settings import STOCK_REFINER, STOCK_VAE, Settings, SettingsError


def test_an_empty_environment_is_stock_sdxl() -> None:
    settings = Settings.from_env({"PATH": "/bin", "LORA_CACHE_DIR": " "})
    assert settings.model == "stabilityai/stable-diffusion-xl-base-1.0"
    assert (settings.refiner_source, settings.vae_source) == (STOCK_REFINER, STOCK_VAE)
    assert settings.lora_cache_dir == Path("/models/loras")


def test_another_model_has_no_companions_unless_they_are_named() -> None:
    settings = Settings.from_env({"WORKER_MODEL": "demo"})
    assert (settings.refiner_source, settings.vae_source) == (None, None)
    settings = Settings.from_env(
        {"WORKER_MODEL": "demo", "WORKER_REFINER": "a/b", "WORKER_VAE": "none"}
    )
    assert (settings.refiner_source, settings.vae_source) == ("a/b", None)


def test_every_fault_is_told_at_once() -> None:
    environ = {
        "LORA_CACH_DIR": "/x",
        "LORA_MODE": "fast",
        "LORA_CACHE_MAX_GB": "much",
        "LORA_MAX_FILE_MB": "-1",
    }
    with pytest.raises(SettingsError) as caught:
        Settings.from_env(environ)
    text = str(caught.value)
    assert "LORA_CACH_DIR is not a setting (did you mean LORA_CACHE_DIR?)" in text
    assert "LORA_MODE: 'fast' is none of auto, dynamic, merged" in text
    assert "LORA_CACHE_MAX_GB: 'much' is not a number" in text
    assert "LORA_MAX_FILE_MB: -1 is not a number of at least 1" in text


def test_secrets_do_not_show_and_nothing_can_be_changed() -> None:
    settings = Settings.from_env({"HF_TOKEN": "hf_canary", "BUCKET_SECRET_ACCESS_KEY": "canary"})
    assert "canary" not in repr(settings)
    assert "canary" not in repr(settings.lora_cache)
    with pytest.raises(FrozenInstanceError):
        settings.model = "x"  # type: ignore[misc]


def test_limits_are_in_bytes() -> None:
    environ = {"LORA_CACHE_MAX_GB": "1.5", "LORA_MAX_FILE_MB": "10", "LORA_DOWNLOAD_TIMEOUT": "7"}
    _, limits, _ = Settings.from_env(environ).lora_cache
    assert (limits.total_bytes, limits.file_bytes, limits.timeout) == (
        1_500_000_000,
        10_000_000,
        7.0,
    )
    assert Settings().lora_cache[1].total_bytes is None
