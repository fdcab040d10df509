from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest

from lora.engine.modes import Mode
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


@pytest.mark.parametrize(
    ("env", "text", "fault"),
    [
        ("WORKER_CONCURRENCY", "2.7", "'2.7' is not a whole number"),
        ("WORKER_CONCURRENCY", "2.0", "'2.0' is not a whole number"),
        ("WORKER_CONCURRENCY", "two", "'two' is not a whole number"),
        ("WORKER_CONCURRENCY", "nan", "'nan' is not a whole number"),
        ("WORKER_CONCURRENCY", "0", "0 is not a number of at least 1"),
        ("WORKER_DEADLINE", "soon", "'soon' is not a number"),
        ("WORKER_DEADLINE", "nan", "nan is not a number of at least 0"),
        ("LORA_WARM_GB", "inf", "inf is not a number of at least 0"),
        ("LORA_WARM_GB", "-0.5", "-0.5 is not a number of at least 0"),
        ("LORA_ALLOW_PRIVATE_URLS", "yes", "'yes' is none of 0, 1, false, true"),
        ("LORA_ALLOW_PRIVATE_URLS", "2", "'2' is none of 0, 1, false, true"),
        ("WORKER_DTYPE", "float64", "'float64' is none of auto, float16, bfloat16, float32"),
        ("LORA_MODE", "MERGED", "'MERGED' is none of auto, dynamic, merged"),
        ("LORA_PRELOAD", "[1]", "it is not a JSON list of sources"),
    ],
)
def test_a_value_of_another_kind_is_refused(env: str, text: str, fault: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.from_env({env: text})
    assert str(caught.value) == f"{env}: {fault}"


def test_values_have_their_fields_types() -> None:
    environ = {"WORKER_CONCURRENCY": "3", "WORKER_DEADLINE": "9", "LORA_CACHE_DIR": "/x"}
    settings = Settings.from_env({**environ, "LORA_ALLOW_PRIVATE_URLS": "TRUE"})
    for setting in fields(Settings):
        value = getattr(settings, setting.name)
        assert setting.type in {kind.__name__ for kind in type(value).__mro__}, setting.name
    assert (settings.concurrency, settings.deadline) == (3, 9.0)
    assert settings.lora_allow_private_urls is True


def test_the_modes_are_those_of_the_engine() -> None:
    (setting,) = (setting for setting in fields(Settings) if setting.name == "lora_mode")
    assert setting.metadata["options"] == tuple(Mode)


def test_secrets_do_not_show_and_nothing_can_be_changed() -> None:
    names = [f.metadata["env"] for f in fields(Settings) if f.metadata["secret"]]
    settings = Settings.from_env(dict.fromkeys(names, "canary"))
    assert "canary" not in repr(settings)
    with pytest.raises(FrozenInstanceError):
        settings.model = "x"  # type: ignore[misc]


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
