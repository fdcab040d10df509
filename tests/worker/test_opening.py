"""What the settings mean, once it is opened."""

from pathlib import Path

import pytest

from lora.errors import LoraNotFound
from lora.fetch.sources import CachedName, Reference
from pipelines.weights import DEMO_LORAS
from settings import Settings, SettingsError
from tests.hub_caches import put
from worker.opening import open_cache, read_settings


def test_secrets_do_not_show_in_what_is_opened() -> None:
    headers = '{"models.example.com": "X-Key: canary"}'
    settings = read_settings({"LORA_AUTH_HEADERS": headers, "HF_TOKEN": "canary"})
    assert "canary" not in repr(settings)
    assert "canary" not in repr(open_cache(settings).web.rules)


def test_a_lora_is_looked_for_where_base_weights_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "baked"))
    monkeypatch.setattr("pipelines.weights.CACHED", tmp_path / "cached")
    for number, name in enumerate(("volume", "cached", "baked")):
        put(tmp_path / name, "u/r", {"x.safetensors": name.encode()}, str(number) * 40)
        for weights in ("auto", "download", name):
            settings = Settings(weights=weights, weights_dir=tmp_path / "volume")
            copy = open_cache(settings).resolve(Reference("u/r")).copy
            assert copy is not None and copy.read_bytes() == name.encode()


def test_limits_are_in_bytes() -> None:
    environ = {"LORA_CACHE_MAX_GB": "1.5", "LORA_MAX_FILE_MB": "10", "LORA_DOWNLOAD_TIMEOUT": "7"}
    limits = open_cache(Settings.from_env(environ)).limits
    assert (limits.total_bytes, limits.file_bytes) == (1_500_000_000, 10_000_000)
    assert limits.timeout == 7.0
    assert open_cache(Settings()).limits.total_bytes is None


def test_tokens_belong_to_origins() -> None:
    environ = {
        "HF_TOKEN": "hf",
        "HF_ENDPOINT": "http://10.0.0.7:8080",
        "CIVITAI_TOKEN": "civ",
        "LORA_AUTH_HEADERS": '{"Models.example.com": "X-Key: a:b", "http://10.0.0.8": "Cookie: c"}',
        "LORA_ALLOWED_HOSTS": "*.example.com, huggingface.co",
    }
    rules = open_cache(read_settings(environ)).web.rules
    assert rules.tokens == {
        "http://10.0.0.7:8080": ("Authorization", "Bearer hf"),
        "https://civitai.com:443": ("Authorization", "Bearer civ"),
        "https://models.example.com:443": ("X-Key", "a:b"),
        "http://10.0.0.8:80": ("Cookie", "c"),
    }
    assert rules.own == {"http://10.0.0.7:8080"}
    assert rules.allowed_hosts == ("*.example.com", "huggingface.co")
    assert not rules.allow_private


def test_the_demo_models_loras_are_found_behind_the_cache_and_left_alone(tmp_path: Path) -> None:
    def listing() -> list[tuple[str, int]]:
        return sorted((path.name, path.stat().st_mtime_ns) for path in DEMO_LORAS.iterdir())

    before, name = listing(), "demo-stripes.safetensors"
    cache = open_cache(Settings(model="demo", lora_cache_dir=tmp_path))
    resolved = cache.resolve(Reference("demo-stripes"))
    entry = cache.get(resolved)
    assert (entry.name, entry.path, entry.downloaded) == (name, DEMO_LORAS / name, False)
    assert cache.shelf.describe() == []
    for change in (cache.pin, cache.unpin, cache.delete):
        with pytest.raises(LoraNotFound) as caught:
            change("demo-stripes")
        assert caught.value.hint == "The cache holds 0 files."
    assert (list(tmp_path.iterdir()), listing()) == ([], before)
    (tmp_path / name).write_bytes((DEMO_LORAS / "demo-night.safetensors").read_bytes())
    assert cache.get(resolved).path == tmp_path / name


def test_a_name_near_one_of_the_demos_loras_is_answered_with_it(tmp_path: Path) -> None:
    (tmp_path / "demo-stripe.safetensors").touch()
    cache = open_cache(Settings(model="demo", lora_cache_dir=tmp_path))
    for name in ("demo-nigt", "demo-nite.safetensors"):
        with pytest.raises(LoraNotFound) as caught:
            cache.find(CachedName(name))
        assert caught.value.hint.startswith("Did you mean demo-night"), name
    with pytest.raises(LoraNotFound) as caught:
        cache.pin("demo-strip")
    assert caught.value.hint == "Did you mean demo-stripe?"


def test_other_models_do_not_find_the_demos_loras(tmp_path: Path) -> None:
    cache = open_cache(Settings(lora_cache_dir=tmp_path))
    with pytest.raises(LoraNotFound) as caught:
        cache.find(CachedName("demo-stripes"))
    assert caught.value.sentence == "the cache has no file 'demo-stripes'"


def test_private_urls_are_allowed_by_a_boolean() -> None:
    for text, allowed in {"1": True, "true": True, "0": False, "False": False}.items():
        rules = open_cache(read_settings({"LORA_ALLOW_PRIVATE_URLS": text})).web.rules
        assert rules.allow_private is allowed


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
        read_settings({"LORA_AUTH_HEADERS": text})
    assert said in str(caught.value)
    assert "canary" not in str(caught.value)


def test_a_bad_endpoint_is_refused_at_start() -> None:
    with pytest.raises(SettingsError) as caught:
        read_settings({"HF_ENDPOINT": "ftp://x", "CIVITAI_ENDPOINT": "://"})
    assert str(caught.value).count("is no http(s) URL") == 2


def test_faults_of_values_and_of_their_meaning_come_together() -> None:
    environ = {
        "WORKER_CONCURRENCY": "2.7",
        "LORA_MOOD": "1",
        "HF_ENDPOINT": "ftp://x",
        "LORA_CONFIG": "/nowhere/config.json",
        "LORA_DEFAULT_PRESET": "ink",
    }
    with pytest.raises(SettingsError) as caught:
        read_settings(environ)
    for part in (
        "WORKER_CONCURRENCY: '2.7'",
        "LORA_MOOD is not a setting",
        "HF_ENDPOINT: it is no http(s) URL",
        "LORA_CONFIG: config.json cannot be read",
        "only one of them can be the default",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        (
            {"BUCKET_ENDPOINT_URL": "s3.us-west-2.amazonaws.com"},
            "BUCKET_ENDPOINT_URL: it does not begin",
        ),
        (
            {"BUCKET_ENDPOINT_URL": "https://h/my bucket"},
            "BUCKET_ENDPOINT_URL: its path holds a blank",
        ),
        (
            {"BUCKET_ENDPOINT_URL": "htps://x"},
            "BUCKET_ENDPOINT_URL: it does not begin with https://",
        ),
        (
            {"BUCKET_ENDPOINT_URL": "https://a-1.s3.eu-west-1.amazonaws.com", "BUCKET_NAME": "b-1"},
            "BUCKET_ENDPOINT_URL: it names the bucket 'a-1', and the bucket's name is 'b-1'",
        ),
        ({"BUCKET_NAME": "a/b"}, "BUCKET_NAME: what is given as a bucket is no bucket's name"),
        ({"BUCKET_REGION": "us east"}, "BUCKET_REGION: what is given as a region"),
        ({"BUCKET_ADDRESSING": "dns"}, "BUCKET_ADDRESSING: 'dns' is none of auto, path, virtual"),
    ],
)
def test_a_bucket_that_cannot_be_meant_stops_the_worker(environ: dict[str, str], said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read_settings(environ)
    assert said in str(caught.value)
