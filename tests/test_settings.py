from dataclasses import FrozenInstanceError, fields
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
    names = [f.metadata["env"] for f in fields(Settings) if f.metadata["secret"]]
    environ = dict.fromkeys(names, "canary")
    environ["LORA_AUTH_HEADERS"] = '{"models.example.com": "X-Key: canary"}'
    settings = Settings.from_env(environ)
    assert "canary" not in repr(settings)
    assert "canary" not in repr(settings.open_cache().web.rules)
    with pytest.raises(FrozenInstanceError):
        settings.model = "x"  # type: ignore[misc]


def test_limits_are_in_bytes() -> None:
    environ = {"LORA_CACHE_MAX_GB": "1.5", "LORA_MAX_FILE_MB": "10", "LORA_DOWNLOAD_TIMEOUT": "7"}
    limits = Settings.from_env(environ).open_cache().limits
    assert (limits.total_bytes, limits.file_bytes, limits.timeout) == (
        1_500_000_000,
        10_000_000,
        7.0,
    )
    assert Settings().open_cache().limits.total_bytes is None


def test_tokens_belong_to_origins() -> None:
    environ = {
        "HF_TOKEN": "hf",
        "HF_ENDPOINT": "http://10.0.0.7:8080",
        "CIVITAI_TOKEN": "civ",
        "LORA_AUTH_HEADERS": '{"Models.example.com": "X-Key: a:b", "http://10.0.0.8": "Cookie: c"}',
        "LORA_ALLOWED_HOSTS": "*.example.com, huggingface.co",
    }
    rules = Settings.from_env(environ).open_cache().web.rules
    assert rules.tokens == {
        "http://10.0.0.7:8080": ("Authorization", "Bearer hf"),
        "https://civitai.com:443": ("Authorization", "Bearer civ"),
        "https://models.example.com:443": ("X-Key", "a:b"),
        "http://10.0.0.8:80": ("Cookie", "c"),
    }
    assert rules.own == {"http://10.0.0.7:8080"}
    assert rules.allowed_hosts == ("*.example.com", "huggingface.co")
    assert not rules.allow_private


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("canary", "it is no JSON"),
        ('["canary"]', "no JSON object"),
        ('{"h.example": "canary"}', "not written as 'Name: value'"),
        ('{"h.example": 5}', "not written as 'Name: value'"),
        ('{"ftp://canary": "A: b"}', "no host name"),
        ('{"h.example": "A: canary\\r\\nB: c"}', "no header may"),
    ],
)
def test_bad_auth_headers_are_refused_without_repeating_them(text: str, said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.from_env({"LORA_AUTH_HEADERS": text})
    assert said in str(caught.value)
    assert "canary" not in str(caught.value)


def test_a_bad_endpoint_is_refused_at_start() -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.from_env({"HF_ENDPOINT": "ftp://x", "CIVITAI_ENDPOINT": "://"})
    assert str(caught.value).count("is no http(s) URL") == 2


def test_preload_is_a_list_in_either_form() -> None:
    assert Settings.from_env({"LORA_PRELOAD": "a/b, https://h/x"}).preload == ("a/b", "https://h/x")
    both = Settings.from_env({"LORA_PRELOAD": '["https://h/x,y", "name"]'})
    assert both.preload == ("https://h/x,y", "name")
    for text in ("[canary", "[1]", '["canary", {}]'):
        with pytest.raises(SettingsError) as caught:
            Settings.from_env({"LORA_PRELOAD": text})
        assert "canary" not in str(caught.value)


def test_a_token_that_no_header_can_carry_is_refused_at_start() -> None:
    for env in ("HF_TOKEN", "CIVITAI_TOKEN"):
        with pytest.raises(SettingsError) as caught:
            Settings.from_env({env: "canary\u20ac"})
        assert str(caught.value) == f"{env}: it holds a character that no token may"
