import hashlib
import os
import threading
import time
from pathlib import Path
from urllib.parse import quote

import pytest

from lora.errors import CacheFull, LoraCorrupt, LoraError, LoraNotFound, SourceInvalid
from lora.fetch.hub import Hub
from lora.fetch.sources import CachedName, Reference
from lora.volume.cache import CacheEntry, Limits, VolumeCache
from lora.volume.records import record_path
from lora.volume.room import files_to_evict
from tests.adapters import as_bytes, kohya
from tests.server import LOOPBACK, LoopbackServer
from tests.waiting import until

ADAPTER = as_bytes(kohya())


@pytest.fixture
def cache(tmp_path: Path) -> VolumeCache:
    made = VolumeCache(tmp_path / "loras", Limits(tries=2), LOOPBACK)
    made.shelf.prepare()
    return made


def get(cache: VolumeCache, path: str, **options: str) -> CacheEntry:
    return cache.get(cache.resolve(Reference(path, **options)))


def leftovers(cache: VolumeCache) -> list[Path]:
    return [p for p in cache.shelf.root.rglob("*") if p.is_file() and not p.name.endswith(".json")]


def test_a_url_is_downloaded_once_and_found_again(
    cache: VolumeCache, server: LoopbackServer
) -> None:
    url = server.serve("/x/my%20lora.safetensors", ADAPTER)
    first, second = get(cache, url), get(cache, url)
    assert (first.downloaded, second.downloaded) == (True, False)
    assert first.path.read_bytes() == ADAPTER
    assert first.record.sha256 == hashlib.sha256(ADAPTER).hexdigest()
    assert second.record == first.record
    assert sum(server.hits.values()) == 1
    assert leftovers(cache) == [first.path]
    assert first.name.startswith("my_lora-")


def test_two_urls_with_one_file_name_never_meet(cache: VolumeCache, server: LoopbackServer) -> None:
    other = as_bytes(kohya(seed=9))
    a = get(cache, server.serve("/a/lora.safetensors", ADAPTER))
    b = get(cache, server.serve("/b/lora.safetensors", other))
    assert a.path != b.path
    assert (a.path.read_bytes(), b.path.read_bytes()) == (ADAPTER, other)


def test_a_hub_repo_is_downloaded_and_its_hash_checked(
    tmp_path: Path, server: LoopbackServer
) -> None:
    cache = VolumeCache(tmp_path, None, LOOPBACK, hub=Hub("hf_canary", server.address))
    server.serve_repo("user/repo", {"pytorch_lora_weights.safetensors": ADAPTER})
    entry = get(cache, "user/repo")
    assert entry.path.read_bytes() == ADAPTER
    assert entry.record.source == f"user/repo@{'c' * 12}/pytorch_lora_weights.safetensors"
    assert get(cache, "user/repo").downloaded is False
    texts = [p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()]
    assert not any(b"hf_canary" in text for text in texts)


def test_a_cached_name_wins_over_a_hub_repo(cache: VolumeCache) -> None:
    (cache.shelf.root / "user").mkdir()
    (cache.shelf.root / "user" / "repo.safetensors").write_bytes(ADAPTER)
    for name in ("user/repo", "user/repo.safetensors"):
        assert get(cache, name).name == "user/repo.safetensors"


def test_an_unknown_name_lists_the_nearest(cache: VolumeCache) -> None:
    (cache.shelf.root / "watercolor-style.safetensors").write_bytes(ADAPTER)
    with pytest.raises(LoraNotFound) as caught:
        cache.find(CachedName("watercolour-style"))
    assert "Did you mean watercolor-style?" in str(caught.value)


def test_a_link_out_of_the_cache_is_not_followed(cache: VolumeCache, tmp_path: Path) -> None:
    outside = tmp_path / "secret.safetensors"
    outside.write_bytes(ADAPTER)
    (cache.shelf.root / "link.safetensors").symlink_to(outside)
    with pytest.raises(SourceInvalid):
        cache.find(CachedName("link"))


def test_a_file_changed_by_hand_is_hashed_anew(cache: VolumeCache) -> None:
    path = cache.shelf.root / "mine.safetensors"
    path.write_bytes(ADAPTER)
    first = cache.find(CachedName("mine"))
    changed = as_bytes(kohya(seed=5))
    path.write_bytes(changed)
    os.utime(path, ns=(1, 1))
    second = cache.find(CachedName("mine"))
    assert first.record.sha256 != second.record.sha256 == hashlib.sha256(changed).hexdigest()


FAULTS = {
    "404": ({"status": 404}, "LORA_NOT_FOUND"),
    "403": ({"status": 403}, "LORA_ACCESS_DENIED"),
    "500 for ever": ({"body": ADAPTER, "fail_first": 99}, "LORA_DOWNLOAD_FAILED"),
    "418": ({"status": 418}, "LORA_DOWNLOAD_FAILED"),
    "cut off": ({"body": ADAPTER, "cut_after": 1000}, "LORA_DOWNLOAD_FAILED"),
    "a web page": ({"body": b"<!doctype html><p>log in"}, "LORA_CORRUPT"),
    "truncated": ({"body": ADAPTER[:-100]}, "LORA_CORRUPT"),
    "empty": ({"body": b""}, "LORA_CORRUPT"),
}


@pytest.mark.parametrize(("options", "code"), FAULTS.values(), ids=FAULTS.keys())
def test_a_failed_download_has_its_code_and_leaves_nothing(
    cache: VolumeCache, server: LoopbackServer, options: dict[str, object], code: str
) -> None:
    url = server.serve("/lora.safetensors", **options) + "?token=canary"
    with pytest.raises(LoraError) as caught:
        get(cache, url)
    assert caught.value.code == code
    assert "canary" not in str(caught.value)
    assert [p for p in cache.shelf.root.rglob("*") if p.is_file()] == []


def test_a_server_error_that_passes_is_survived(cache: VolumeCache, server: LoopbackServer) -> None:
    entry = get(cache, server.serve("/lora.safetensors", ADAPTER, fail_first=1))
    assert entry.path.read_bytes() == ADAPTER


def test_a_wrong_hash_is_refused_before_publishing(
    cache: VolumeCache, server: LoopbackServer
) -> None:
    url = server.serve("/lora.safetensors", ADAPTER)
    with pytest.raises(LoraError) as caught:
        get(cache, url, sha256="0" * 64)
    assert caught.value.code == "LORA_CORRUPT"
    assert leftovers(cache) == []
    right = hashlib.sha256(ADAPTER).hexdigest().upper()
    assert get(cache, url, sha256=right).record.sha256 == right.lower()


def test_a_file_over_the_limit_is_refused(tmp_path: Path, server: LoopbackServer) -> None:
    cache = VolumeCache(tmp_path, Limits(file_bytes=1000), LOOPBACK)
    with pytest.raises(LoraError) as caught:
        get(cache, server.serve("/lora.safetensors", ADAPTER))
    assert caught.value.code == "LORA_TOO_LARGE"
    assert leftovers(cache) == []


def test_threads_that_ask_for_one_source_share_one_download(
    cache: VolumeCache, server: LoopbackServer
) -> None:
    url = server.serve("/lora.safetensors", ADAPTER, pause=0.2)
    entries: list[CacheEntry] = []
    threads = [threading.Thread(target=lambda: entries.append(get(cache, url))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(entries) == 6
    assert server.hits["/lora.safetensors"] == 1
    assert sum(entry.downloaded for entry in entries) == 1


def test_progress_counts_up_to_the_whole(cache: VolumeCache, server: LoopbackServer) -> None:
    place = cache.resolve(Reference(server.serve("/lora.safetensors", ADAPTER)))
    told: list[tuple[int, int | None]] = []
    cache.get(place, lambda done, total: told.append((done, total)))
    assert told[-1] == (len(ADAPTER), len(ADAPTER))


def test_the_budget_evicts_what_was_used_longest_ago(
    tmp_path: Path, server: LoopbackServer
) -> None:
    cache = VolumeCache(tmp_path, Limits(total_bytes=int(2.5 * len(ADAPTER))), LOOPBACK)
    urls = [server.serve(f"/{n}.safetensors", as_bytes(kohya(seed=n))) for n in range(3)]
    old, used = get(cache, urls[0]), get(cache, urls[1])
    now = time.time()
    os.utime(record_path(old.path), (now - 200, now - 200))
    os.utime(record_path(used.path), (now - 100, now - 100))
    new = get(cache, urls[2])
    assert sorted(cache.shelf.files()) == sorted([used.path, new.path])
    assert not record_path(old.path).exists()


def test_files_in_use_are_never_evicted_and_the_error_tells_how_much_lacks() -> None:
    a, b = Path("a"), Path("b")
    said = ("room", "Do this")
    assert files_to_evict([(a, 10), (b, 10)], 5, set(), *said) == [a]
    assert files_to_evict([(a, 10), (b, 10)], 5, {a}, *said) == [b]
    assert files_to_evict([(a, 10)], 0, set(), *said) == []
    with pytest.raises(CacheFull) as caught:
        files_to_evict([(a, 10_000_000)], 5_000_000, {a}, *said)
    assert "lacks 5.0 MB of room" in str(caught.value)
    assert "Do this or remove files." in str(caught.value)


def test_leftovers_of_dead_workers_are_swept_and_fresh_parts_stay(cache: VolumeCache) -> None:
    old, fresh = (cache.shelf.root / ".incoming" / name for name in ("old.part", "fresh.part"))
    old.write_bytes(b"x")
    fresh.write_bytes(b"x")
    os.utime(old, (time.time() - 7200,) * 2)
    cache.shelf.prepare()
    assert (old.exists(), fresh.exists()) == (False, True)


def test_a_folder_that_cannot_be_written_falls_back_with_a_warning(
    tmp_path: Path, server: LoopbackServer
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    fallback = tmp_path / "fallback"
    cache = VolumeCache(blocked / "loras", None, LOOPBACK, fallback=fallback)
    assert cache.shelf.prepare() == fallback
    assert "cannot be written" in str(cache.shelf.trouble)
    entry = get(cache, server.serve("/lora.safetensors", ADAPTER))
    assert entry.path.is_relative_to(fallback)
    assert get(cache, entry.name).path == entry.path
    blocked.unlink()  # the volume comes back
    assert cache.shelf.prepare() == blocked / "loras"
    assert cache.shelf.trouble is None


def test_a_file_put_there_by_hand_is_never_evicted(tmp_path: Path, server: LoopbackServer) -> None:
    cache = VolumeCache(tmp_path, Limits(total_bytes=int(1.5 * len(ADAPTER))), LOOPBACK)
    (tmp_path / "checkpoint.safetensors").write_bytes(ADAPTER)
    mine = cache.find(CachedName("checkpoint"))
    first = get(cache, server.serve("/1.safetensors", as_bytes(kohya(seed=1))))
    second = get(cache, server.serve("/2.safetensors", as_bytes(kohya(seed=2))))
    assert sorted(cache.shelf.files()) == sorted([mine.path, second.path])
    assert not first.path.exists()


def test_a_file_that_was_damaged_on_the_volume_is_fetched_again(
    cache: VolumeCache, server: LoopbackServer
) -> None:
    url = server.serve("/lora.safetensors", ADAPTER)
    get(cache, url).path.write_bytes(ADAPTER[:-20])
    again = get(cache, url)
    assert again.downloaded
    assert again.path.read_bytes() == ADAPTER


def test_a_url_whose_content_changed_is_fetched_again_when_its_hash_is_asked_for(
    cache: VolumeCache, server: LoopbackServer
) -> None:
    url = server.serve("/lora.safetensors", ADAPTER)
    get(cache, url)
    changed = as_bytes(kohya(seed=3))
    server.serve("/lora.safetensors", changed)
    assert get(cache, url).path.read_bytes() == ADAPTER
    assert get(cache, url, sha256=hashlib.sha256(changed).hexdigest()).path.read_bytes() == changed


def test_a_server_that_drips_is_cut_off_at_the_deadline(
    tmp_path: Path, server: LoopbackServer
) -> None:
    cache = VolumeCache(tmp_path, Limits(timeout=0.6), LOOPBACK)
    url = server.serve("/lora.safetensors", ADAPTER, drip=0.1)  # all of it would take an hour
    with pytest.raises(LoraError) as caught:
        get(cache, url)
    assert caught.value.code == "LORA_DOWNLOAD_FAILED"
    assert leftovers(cache) == []


def test_a_part_that_vanishes_during_the_sweep_is_no_fault(
    cache: VolumeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    ghost = cache.shelf.root / ".incoming" / "ghost.part"
    monkeypatch.setattr(Path, "iterdir", lambda self: iter([ghost]))
    cache.shelf.prepare()


def test_a_very_long_name_in_any_script_is_kept_short(
    cache: VolumeCache, server: LoopbackServer
) -> None:
    name = "画" * 90
    server.serve("/" + quote(name) + ".safetensors", ADAPTER)
    entry = get(cache, server.url(f"/{name}.safetensors"))
    assert entry.path.read_bytes() == ADAPTER
    assert len(entry.path.name.encode()) < 128


def test_a_file_that_is_being_copied_is_said_to_grow(cache: VolumeCache) -> None:
    path = cache.shelf.root / "copy.safetensors"
    ended = threading.Event()

    def copy() -> None:
        with path.open("wb", buffering=0) as stream:
            stream.write(ADAPTER[:-1000])
            while not ended.wait(0.01):
                stream.write(b"x")

    thread = threading.Thread(target=copy)
    thread.start()
    try:
        until(path.exists)
        with pytest.raises(LoraCorrupt) as caught:
            cache.find(CachedName("copy"))
    finally:
        ended.set()
        thread.join()
    assert "copy.safetensors still grows" in str(caught.value)
    with pytest.raises(LoraCorrupt) as caught:
        cache.find(CachedName("copy"))
    assert "grows" not in str(caught.value)


def test_nothing_is_pinned_behind_the_volume_though_a_file_goes_while_it_is_pinned(
    cache: VolumeCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    behind = tmp_path / "behind"
    behind.mkdir()
    cache.shelf.behind = behind
    own, other = cache.shelf.root / "x.safetensors", behind / "x.safetensors"
    for path in (own, other):
        path.write_bytes(ADAPTER)
    seen = iter((own, other))
    monkeypatch.setattr(cache.shelf, "existing", lambda name: next(seen))
    with pytest.raises(LoraNotFound):
        cache.pin("x")
    assert list(behind.iterdir()) == [other]
