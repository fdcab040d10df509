"""A cache by environment variables: what each means, and what is refused."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from lora.fetch.rules import WebRules
from lora.volume.opening import NUMBERS, VARIABLES, open_cache
from settings import Settings
from worker.opening import open_cache as worker_cache


def test_the_variables_mean_what_they_mean_to_the_worker(tmp_path: Path) -> None:
    environ = {
        "LORA_CACHE_DIR": str(tmp_path),
        "LORA_CACHE_MAX_GB": "2.5",
        "LORA_MAX_FILE_MB": "10",
        "LORA_TTL_HOURS": "1",
        "LORA_ALLOWED_HOSTS": "a.example, *.b.example",
        "LORA_AUTH_HEADERS": '{"a.example": "X-Key: secret"}',
        "HF_TOKEN": "hf_x",
    }
    cache = open_cache(environ=environ)
    assert cache.shelf.root == tmp_path
    limits = cache.limits
    assert (limits.total_bytes, limits.file_bytes, limits.ttl) == (2_500_000_000, 10_000_000, 3600)
    rules: WebRules = cache.web.rules
    assert rules.allowed_hosts == ("a.example", "*.b.example")
    assert rules.tokens["https://a.example:443"] == ("X-Key", "secret")
    assert rules.tokens["https://huggingface.co:443"] == ("Authorization", "Bearer hf_x")
    assert not list(tmp_path.iterdir())


def test_every_variable_is_a_setting_of_the_worker() -> None:
    assert set(VARIABLES) <= {one.metadata["env"] for one in fields(Settings)}


def test_defaults_and_bounds_are_the_workers() -> None:
    ours, theirs = open_cache(environ={}), worker_cache(Settings())
    assert (ours.shelf.root, ours.limits) == (theirs.shelf.root, theirs.limits)
    assert ours.web.rules == theirs.web.rules
    settings = {one.metadata["env"]: one for one in fields(Settings)}
    for name, (default, least) in NUMBERS.items():
        assert settings[name].default == default
        assert settings[name].metadata["minimum"] == least


@pytest.mark.parametrize(
    "name", ["HF_TOKENS", "HF_ENDPOINTS", "CIVITAI_TOKEN2", "MY_LORA_CACHE_DIR"]
)
def test_a_variable_of_another_program_may_have_nearly_our_name(tmp_path: Path, name: str) -> None:
    assert open_cache(tmp_path, {name: "x"}).shelf.root == tmp_path


@pytest.mark.parametrize(("text", "allowed"), [("True", True), ("0", False), ("FALSE", False)])
def test_private_urls_are_allowed_by_the_words_of_the_worker(text: str, allowed: bool) -> None:
    rules = open_cache(environ={"LORA_ALLOW_PRIVATE_URLS": text}).web.rules
    assert rules.allow_private is allowed


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("LORA_CACHE_MAX_GB", "canary", "LORA_CACHE_MAX_GB is not a number"),
        ("LORA_TTL_HOURS", "-1", "LORA_TTL_HOURS is not a number of at least 0"),
        ("LORA_MAX_FILE_MB", "inf", "LORA_MAX_FILE_MB is not a number"),
        ("LORA_DOWNLOAD_TIMEOUT", "0", "LORA_DOWNLOAD_TIMEOUT is not a number of at least 1"),
        ("LORA_ALLOW_PRIVATE_URLS", "canary", "LORA_ALLOW_PRIVATE_URLS is none of 0, 1"),
        ("LORA_AUTH_HEADERS", "canary", "LORA_AUTH_HEADERS: it is no JSON"),
        ("LORA_CACHE_DIRR", "canary", "did you mean LORA_CACHE_DIR?"),
    ],
)
def test_what_cannot_be_used_is_named_and_not_repeated(name: str, text: str, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        open_cache(environ={name: text})
    assert said in str(caught.value)
    assert "canary" not in str(caught.value)


def test_settings_of_the_worker_alone_are_let_pass(tmp_path: Path) -> None:
    names = {one.metadata["env"]: "x" for one in fields(Settings)}
    others = {name: text for name, text in names.items() if name not in VARIABLES}
    assert open_cache(tmp_path, others).shelf.root == tmp_path


def test_an_environment_that_is_empty_is_not_the_process_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_CACHE_MAX_GB", "3")
    assert open_cache(tmp_path, {}).limits.total_bytes is None
