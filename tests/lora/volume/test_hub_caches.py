"""A LoRA that a cache of the hub on this machine has is taken from there, and never another file."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lora.engine.engine import LoraEngine
from lora.errors import LoraCorrupt, LoraError, LoraNotFound
from lora.fetch.hub import Hub
from lora.fetch.sources import Reference, RemoteFile
from lora.volume.cache import CacheEntry, Limits, VolumeCache
from lora.volume.loader import LoraLibrary
from tests.adapters import as_bytes, kohya
from tests.hub_caches import COMMIT, folder_of, put
from tests.server import LOOPBACK, LoopbackServer

ADAPTER, OTHER = as_bytes(kohya()), as_bytes(kohya(seed=4))
OLD, NEW = "a" * 40, "b" * 40
CONFIG = b'{"peft_type": "LORA", "r": 4, "lora_alpha": 32}'


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A cache of the hub."""
    return tmp_path / "hub"


def make(tmp_path: Path, *caches: Path, endpoint: str = "", **limits: float) -> VolumeCache:
    given = {"tries": 1, "pause": 0.01, **limits}
    hub = Hub(None, endpoint or "https://huggingface.co", LOOPBACK, caches)
    return VolumeCache(tmp_path / "loras", Limits(**given), LOOPBACK, hub=hub)  # type: ignore[arg-type]


def get(cache: VolumeCache, path: str, **options: str | bool) -> CacheEntry:
    return cache.get(cache.resolve(Reference(path, **options)))  # type: ignore[arg-type]


# --- what is there is taken -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["u/r", "hf://u/r", "u/r/x.safetensors", f"u/r@{COMMIT}", "u/r@main", "u/r@v1"]
)
def test_what_a_cache_of_the_hub_has_is_taken_without_the_network(
    tmp_path: Path, hub: Path, offline: None, path: str
) -> None:
    put(hub, "u/r", {"README.md": b"x", "x.safetensors": ADAPTER})
    put(hub, "u/r", {}, ref="v1")
    entry = get(make(tmp_path, tmp_path / "none", hub), path)
    assert entry.downloaded and entry.path.read_bytes() == ADAPTER
    assert entry.path.is_relative_to(tmp_path / "loras") and not entry.path.is_symlink()
    assert entry.record.source == f"u/r@{COMMIT[:12]}/x.safetensors"
    assert entry.record.fetched is not None
    os.truncate(hub / "models--u--r" / "snapshots" / COMMIT / "x.safetensors", 0)
    again = get(make(tmp_path, hub), path)  # from the cache of LoRAs
    assert (again.path, again.downloaded) == (entry.path, False)
    assert again.path.read_bytes() == ADAPTER


def test_a_copy_is_the_same_entry_as_a_download(
    tmp_path: Path, hub: Path, server: LoopbackServer
) -> None:
    files = {"x.safetensors": ADAPTER}
    server.serve_repo("u/r", files)
    put(hub, "u/r", files)
    downloaded = get(make(tmp_path / "one", endpoint=server.address), "u/r")
    hits = server.hits.total()
    copied = get(make(tmp_path / "two", hub, endpoint=server.address), "u/r")
    assert server.hits.total() == hits
    assert copied.name == downloaded.name
    assert copied.record.source == downloaded.record.source
    assert copied.record.sha256 == downloaded.record.sha256
    assert copied.record.size == downloaded.record.size


def test_the_commit_that_a_revision_names_is_taken_and_no_other(
    tmp_path: Path, hub: Path, offline: None
) -> None:
    put(hub, "u/r", {"x.safetensors": OTHER}, OLD, ref="refs/pr/3")
    put(hub, "u/r", {"x.safetensors": ADAPTER}, NEW)
    put(hub, "u/r", {"x.safetensors": b"neither"}, COMMIT, ref=None)
    cache = make(tmp_path, hub)
    wanted = {"u/r": ADAPTER, f"u/r@{NEW}": ADAPTER, f"u/r@{OLD}": OTHER, "u/r@refs/pr/3": OTHER}
    for path, body in wanted.items():
        assert get(cache, path).path.read_bytes() == body, path
    assert get(cache, "u/r", revision=OLD).path.read_bytes() == OTHER


@pytest.mark.parametrize(
    "revision", ["v9", "d" * 40, NEW[:12], "../snapshots", "refs/main", "a\0b"]
)
def test_a_revision_that_is_not_there_is_asked_for(
    tmp_path: Path, hub: Path, server: LoopbackServer, revision: str
) -> None:
    put(hub, "u/r", {"x.safetensors": ADAPTER}, NEW)
    cache = make(tmp_path, hub, endpoint=server.address)
    with pytest.raises(LoraNotFound):
        cache.resolve(Reference("u/r", revision=revision))
    assert server.hits.total() == 1


def test_without_main_a_commit_must_be_named(
    tmp_path: Path, hub: Path, server: LoopbackServer
) -> None:
    put(hub, "u/r", {"x.safetensors": OTHER}, OLD, ref=None)
    server.serve_repo("u/r", {"x.safetensors": ADAPTER})
    cache = make(tmp_path, hub, endpoint=server.address)
    assert get(cache, "u/r").path.read_bytes() == ADAPTER
    assert get(cache, f"u/r@{OLD}").path.read_bytes() == OTHER


def test_asking_again_asks_the_hub(tmp_path: Path, hub: Path, server: LoopbackServer) -> None:
    put(hub, "u/r", {"x.safetensors": OTHER}, OLD)
    server.serve_repo("u/r", {"x.safetensors": ADAPTER})
    cache = make(tmp_path, hub, endpoint=server.address)
    assert get(cache, "u/r").path.read_bytes() == OTHER
    assert get(cache, "u/r", refresh=True).path.read_bytes() == ADAPTER


def test_a_cached_name_goes_before_the_hubs_cache(tmp_path: Path, hub: Path, offline: None) -> None:
    put(hub, "u/r", {"x.safetensors": OTHER})
    own = tmp_path / "loras" / "u" / "r.safetensors"
    own.parent.mkdir(parents=True)
    own.write_bytes(ADAPTER)
    assert get(make(tmp_path, hub), "u/r").path == own


def test_a_peft_adapter_comes_with_what_belongs_to_it(
    tmp_path: Path, hub: Path, offline: None, engine: LoraEngine
) -> None:
    files = {"adapter_model.safetensors": ADAPTER, "adapter_config.json": CONFIG}
    put(hub, "u/r", {**files, "chat_template.jinja": b"one", "tokenizer_config.json": b"{}"})
    library = LoraLibrary(make(tmp_path, hub), engine.key_map)
    loaded = library.load(Reference("u/r"))
    assert (loaded.entry.record.config, loaded.template) == (CONFIG.decode(), "one")


def test_the_first_cache_that_has_it_is_taken(tmp_path: Path, hub: Path, offline: None) -> None:
    first = tmp_path / "first"
    put(hub, "u/r", {"x.safetensors": ADAPTER})
    (put(first, "u/r", {"x.safetensors": OTHER}) / "x.safetensors").resolve().unlink()
    assert get(make(tmp_path, first, hub), "u/r").path.read_bytes() == ADAPTER
    put(first, "u/r", {"y.safetensors": OTHER}, OLD)
    assert get(make(tmp_path, first, hub), "u/r").path.read_bytes() == OTHER


def test_a_cache_with_several_adapters_hides_none_behind_it(
    tmp_path: Path, hub: Path, offline: None
) -> None:
    put(tmp_path / "first", "u/r", {"a.safetensors": OTHER, "b.safetensors": OTHER})
    put(hub, "u/r", {"a.safetensors": OTHER, "pytorch_lora_weights.safetensors": ADAPTER})
    assert get(make(tmp_path, tmp_path / "first", hub), "u/r").path.read_bytes() == ADAPTER


# --- which file is taken --------------------------------------------------------------------------

LISTINGS: dict[tuple[str, ...], str | None] = {
    ("b.safetensors", "pytorch_lora_weights.safetensors"): "pytorch_lora_weights.safetensors",
    ("x.bin", "y.safetensors"): "y.safetensors",
    ("one/x.safetensors", "notes.md"): "one/x.safetensors",
    ("a.safetensors", "b.safetensors"): None,
    ("notes.md",): None,
}


@pytest.mark.parametrize("names", LISTINGS)
def test_the_file_is_chosen_as_the_hub_chooses_it(
    hub: Path, server: LoopbackServer, names: tuple[str, ...]
) -> None:
    files = {name: name.encode() for name in names}
    put(hub, "u/r", files)
    server.serve_repo("u/r", files)
    place = Reference("u/r")
    cached = make(hub.parent / "one", hub, endpoint=server.address)
    asked = make(hub.parent / "two", endpoint=server.address)
    if LISTINGS[names] is None:
        said = []
        for cache in (cached, asked):
            with pytest.raises(LoraNotFound) as caught:
                cache.resolve(place)
            said.append(str(caught.value))
        assert said[0] == said[1]
    else:
        one, two = cached.resolve(place), asked.resolve(place)
        assert isinstance(one.location, RemoteFile) and isinstance(two.location, RemoteFile)
        assert one.location == replace(two.location, size=None)
        assert one.copy is not None
        assert str(one.copy).endswith(f"{COMMIT}/{LISTINGS[names]}")


def test_of_several_adapters_none_is_guessed_offline(tmp_path: Path, hub: Path) -> None:
    put(hub, "u/r", {"a.safetensors": ADAPTER, "b.safetensors": OTHER})
    cache = make(tmp_path, hub, endpoint="http://127.0.0.1:9")  # where nobody listens
    with pytest.raises(LoraNotFound, match="several adapter files"):
        cache.resolve(Reference("u/r"))
    assert get(cache, "u/r", weight_name="b.safetensors").path.read_bytes() == OTHER


def test_the_hub_may_know_the_usual_name_among_more_files(
    tmp_path: Path, hub: Path, server: LoopbackServer
) -> None:
    some = {"a.safetensors": OTHER, "b.safetensors": OTHER}
    put(hub, "u/r", some)
    server.serve_repo("u/r", {**some, "pytorch_lora_weights.safetensors": ADAPTER})
    cache = make(tmp_path, hub, endpoint=server.address)
    assert get(cache, "u/r").path.read_bytes() == ADAPTER


def test_a_repo_that_is_still_being_fetched_is_not_chosen_from(
    tmp_path: Path, hub: Path, server: LoopbackServer
) -> None:
    put(hub, "u/r", {"a.safetensors": OTHER})
    (folder_of(hub, "u/r") / "blobs" / "123.incomplete").touch()
    server.serve_repo("u/r", {"a.safetensors": OTHER, "pytorch_lora_weights.safetensors": ADAPTER})
    cache = make(tmp_path, hub, endpoint=server.address)
    assert get(cache, "u/r").path.read_bytes() == ADAPTER
    hits = server.hits.total()
    assert get(cache, "u/r/a.safetensors").path.read_bytes() == OTHER
    assert server.hits.total() == hits


# --- what is broken is fetched --------------------------------------------------------------------

FILES = {"adapter_model.safetensors": ADAPTER, "adapter_config.json": CONFIG}


def missing_blob(snapshot: Path, outside: Path) -> str:
    (snapshot / "adapter_model.safetensors").resolve().unlink()
    return "adapter_model.safetensors is a link to nothing"


def missing_blob_of_config(snapshot: Path, outside: Path) -> str:
    (snapshot / "adapter_config.json").resolve().unlink()
    return "adapter_config.json is a link to nothing"


def missing_config(snapshot: Path, outside: Path) -> str:
    (snapshot / "adapter_config.json").unlink()
    return "adapter_config.json is not there"


def missing_snapshot(snapshot: Path, outside: Path) -> str:
    snapshot.rename(snapshot.with_name(OLD))
    return f"refs/main names the commit {COMMIT[:12]}, which is not there"


def link_out(snapshot: Path, outside: Path) -> str:
    outside.write_bytes(OTHER)
    (snapshot / "adapter_model.safetensors").unlink()
    (snapshot / "adapter_model.safetensors").symlink_to(outside)
    return "adapter_model.safetensors leads out of it"


def config_out(snapshot: Path, outside: Path) -> str:
    outside.write_bytes(CONFIG.replace(b"32", b"1"))
    (snapshot / "adapter_config.json").unlink()
    (snapshot / "adapter_config.json").symlink_to(outside)
    return "adapter_config.json leads out of it"


def circle(snapshot: Path, outside: Path) -> str:
    file = snapshot / "adapter_model.safetensors"
    file.unlink()
    file.symlink_to(file.name)
    return "adapter_model.safetensors is a link to nothing"


def pipe(snapshot: Path, outside: Path) -> str:
    file = (snapshot / "adapter_model.safetensors").resolve()
    file.unlink()
    os.mkfifo(file)
    return "adapter_model.safetensors is a link to nothing"


def other_bytes(snapshot: Path, outside: Path) -> str:
    (snapshot / "adapter_model.safetensors").resolve().write_bytes(OTHER)
    return "has the sha256"


def cut_bytes(snapshot: Path, outside: Path) -> str:
    (snapshot / "adapter_model.safetensors").resolve().write_bytes(ADAPTER[:-8])
    return "has the sha256"


def cut_copy(snapshot: Path, outside: Path) -> str:
    file = snapshot / "adapter_model.safetensors"  # no link, so nothing tells its hash
    file.unlink()
    file.write_bytes(ADAPTER[:-8])
    return "adapter_model.safetensors: "


def folder(snapshot: Path, outside: Path) -> str:
    file = snapshot / "adapter_model.safetensors"
    file.unlink()
    file.mkdir()
    return "has no .safetensors file"


FAULTS = (
    missing_blob, missing_blob_of_config, missing_config, missing_snapshot, link_out, config_out,
    circle, pipe, other_bytes, cut_bytes, cut_copy, folder,
)  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_broken_is_fetched_and_said_in_one_line(
    tmp_path: Path,
    hub: Path,
    server: LoopbackServer,
    caplog: pytest.LogCaptureFixture,
    fault: Callable[[Path, Path], str],
) -> None:
    said = fault(put(hub, "u/r", FILES), tmp_path / "outside")
    server.serve_repo("u/r", FILES)
    cache = make(tmp_path, hub, endpoint=server.address)
    with caplog.at_level(logging.WARNING):
        entry = get(cache, "u/r")
    assert entry.path.read_bytes() == ADAPTER
    assert entry.record.config == CONFIG.decode()
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1 and said in lines[0], lines
    assert not list((tmp_path / "loras" / ".incoming").glob("*.part"))


def test_the_hash_that_a_request_names_counts(
    tmp_path: Path, hub: Path, server: LoopbackServer
) -> None:
    put(hub, "u/r", {"x.safetensors": ADAPTER})
    server.serve_repo("u/r", {"x.safetensors": ADAPTER})
    cache = make(tmp_path, hub, endpoint=server.address)
    with pytest.raises(LoraCorrupt, match="that was asked for"):
        get(cache, "u/r", sha256="0" * 64)


@pytest.mark.parametrize(
    ("limits", "code"),
    [({"file_bytes": 100}, "LORA_TOO_LARGE"), ({"total_bytes": 100}, "CACHE_FULL")],
)
def test_a_copy_has_the_limits_of_a_download(
    tmp_path: Path, hub: Path, offline: None, limits: dict[str, float], code: str
) -> None:
    put(hub, "u/r", {"x.safetensors": ADAPTER})
    with pytest.raises(LoraError) as caught:
        get(make(tmp_path, hub, **limits), "u/r")
    assert caught.value.code == code
    assert not list((tmp_path / "loras").rglob("*.safetensors"))


def test_no_repo_is_taken_for_another_of_like_name(
    tmp_path: Path, hub: Path, server: LoopbackServer
) -> None:
    put(hub, "a/b--c", {"x.safetensors": ADAPTER})  # a folder as `a--b/c` would have it
    cache = make(tmp_path, hub, endpoint=server.address)
    for path in ("a--b/c", "a/b--c"):
        with pytest.raises(LoraNotFound):
            cache.resolve(Reference(path))
