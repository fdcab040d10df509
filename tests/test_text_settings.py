"""A text worker's settings: worker-vllm's names, and the LoRA settings of every worker."""

from __future__ import annotations

import pytest

from settings import Settings, SettingsError
from text_settings import TextSettings


def test_worker_vllms_names_mean_what_they_mean_there() -> None:
    settings = TextSettings.from_env(
        {
            "WORKER_KIND": "text",
            "MODEL_NAME": "someone/model",
            "OPENAI_SERVED_MODEL_NAME_OVERRIDE": "mine",
            "MAX_MODEL_LEN": "4096",
            "MAX_NUM_SEQS": "8",
            "MAX_CONCURRENCY": "5",
            "REQUEST_TIMEOUT": "60",
            "DTYPE": "half",
            "ENABLE_LORA": "true",
            "MAX_LORA_RANK": "16",
            "LORA_MODULES": '[{"name": "a", "path": "user/repo", "base_model_name": "x"}]',
            "LORA_CACHE_DIR": "/somewhere",
        }
    )
    assert (settings.model, settings.name, settings.context) == ("someone/model", "mine", 4096)
    assert (settings.most_rows, settings.concurrency, settings.deadline) == (8, 5, 60)
    assert settings.modules == {"a": "user/repo"}
    assert str(settings.lora_cache_dir) == "/somewhere"


def test_the_names_of_an_image_worker_are_passed_over_and_misspelt_ones_are_not() -> None:
    assert TextSettings.from_env({"WORKER_MODEL": "x", "WORKER_CONCURRENCY": "3"}).model == "demo"
    with pytest.raises(SettingsError, match=r"LORA_MODULS is not a setting .*LORA_MODULES"):
        TextSettings.from_env({"LORA_MODULS": "[]"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LORA_MODULES", "pirate=path"),
        ("LORA_MODULES", '[{"name": "a"}]'),
        ("QUANTIZATION", "awq"),
        ("DTYPE", "float8"),
        ("MAX_NUM_SEQS", "0"),
        ("WORKER_KIND", "texts"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=name):
        TextSettings.from_env({name: value})


def test_a_secret_of_lora_modules_is_in_no_repr() -> None:
    text = '[{"name": "a", "path": "https://host/x.safetensors?token=abc"}]'
    assert "abc" not in repr(TextSettings.from_env({"LORA_MODULES": text}))


def test_an_image_worker_is_the_default_kind() -> None:
    assert Settings.from_env({}).kind == "image"
