"""`cache`: what is on the volume, by the environment's settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.adapters import as_bytes, kohya
from tests.lora.commands.running import run
from tests.server import LoopbackServer


@pytest.fixture
def volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORA_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("LORA_ALLOW_PRIVATE_URLS", "1")
    (tmp_path / "mine.safetensors").write_bytes(as_bytes(kohya()))
    return tmp_path


def test_what_is_fetched_is_listed_beside_an_operators_files(
    capsys: pytest.CaptureFixture[str], volume: Path, server: LoopbackServer
) -> None:
    url = server.serve("/their.safetensors", as_bytes(kohya(1)))
    added = run(capsys, "cache", "add", f"{url}?token=secret")
    assert (added.code, added.err) == (0, "")
    assert "downloaded" in added.out
    assert "secret" not in added.out
    again = run(capsys, "cache", "add", f"{url}?token=secret", "--json").json
    assert [one["downloaded"] for one in again["loras"]] == [False]
    listed = run(capsys, "cache", "list")
    assert "put here by hand" in listed.out
    assert url in listed.out
    assert "2 files" in listed.out
    found = run(capsys, "cache", "list", "--json").json
    assert found["root"] == str(volume)
    assert {one["name"] for one in found["loras"]} >= {
        "mine.safetensors",
        again["loras"][0]["name"],
    }


def test_a_source_that_cannot_be_had_is_told_and_the_others_are_fetched(
    capsys: pytest.CaptureFixture[str], volume: Path, server: LoopbackServer
) -> None:
    good, gone = server.serve("/a.safetensors", as_bytes(kohya(1))), server.url("/gone.safetensors")
    ran = run(capsys, "cache", "add", gone, good, "/etc/passwd")
    assert ran.code == 2
    assert good in ran.out
    codes = [line.split(":")[1].strip() for line in ran.err.splitlines()]
    assert codes == ["LORA_NOT_FOUND", "LORA_SOURCE_INVALID"]


def test_damaged_files_are_told_and_set_aside(
    capsys: pytest.CaptureFixture[str], volume: Path, server: LoopbackServer
) -> None:
    url = server.serve("/a.safetensors", as_bytes(kohya(1)))
    (one,) = run(capsys, "cache", "add", url, "--json").json["loras"]
    assert run(capsys, "cache", "verify").code == 0
    path = volume / one["name"]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    ran = run(capsys, "cache", "verify")
    assert ran.code == 2
    assert "2 files checked, 1 damaged, 0 set aside" in ran.out
    assert f"error: LORA_CORRUPT: {one['name']} is damaged" in ran.err
    assert path.exists()
    ran = run(capsys, "cache", "verify", "--remove", "--json")
    assert ran.code == 0
    assert ran.json["removed"] == [one["name"]]
    assert not path.exists()
    assert run(capsys, "cache", "verify").code == 0


def test_what_was_downloaded_is_evicted_unless_it_is_pinned(
    capsys: pytest.CaptureFixture[str], volume: Path, server: LoopbackServer
) -> None:
    urls = [server.serve(f"/{n}.safetensors", as_bytes(kohya(n))) for n in (1, 2)]
    added = run(capsys, "cache", "add", *urls, "--json").json["loras"]
    first, second = (one["name"] for one in added)
    assert run(capsys, "cache", "pin", first, "nothing").code == 2
    assert "pinned" in run(capsys, "cache", "list").out
    assert run(capsys, "cache", "evict").code == 2  # no budget
    assert run(capsys, "cache", "evict", "--to", "0").code == 2  # the pinned one cannot go
    size = str((volume / first).stat().st_size)
    ran = run(capsys, "cache", "evict", "--to", size, "--json")
    assert (ran.code, ran.json["evicted"]) == (0, [second])
    assert (volume / first).exists()
    assert (volume / "mine.safetensors").exists()
    assert run(capsys, "cache", "pin", "--off", first).code == 0
    assert run(capsys, "cache", "evict", "--to", "0", "--json").json["evicted"] == [first]


def test_deleting_goes_on_after_a_name_that_is_not_there(
    capsys: pytest.CaptureFixture[str], volume: Path
) -> None:
    ran = run(capsys, "cache", "delete", "nothing", "mine")
    assert ran.code == 2
    assert ran.err.startswith("error: LORA_NOT_FOUND")
    assert "mine: deleted" in ran.out
    assert not (volume / "mine.safetensors").exists()


def test_an_unusable_environment_is_told(
    capsys: pytest.CaptureFixture[str], volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in {
        "LORA_CACHE_MAX_GB": "much",
        "LORA_TTL_HOURS": "-1",
        "LORA_AUTH_HEADERS": '{"host": "canary"}',
        "HF_ENDPOINT": "ftp://host",
    }.items():
        with monkeypatch.context() as patch:
            patch.setenv(name, text)
            ran = run(capsys, "cache", "list")
        assert (ran.code, ran.out) == (2, ""), name
        assert ran.err.startswith("error: TOOL_ERROR: the environment cannot be used: "), name
        assert "canary" not in ran.err


def test_the_folder_may_be_named(
    capsys: pytest.CaptureFixture[str], volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_CACHE_DIR", str(volume / "another"))
    assert "mine" not in run(capsys, "cache", "list").out
    assert "mine" in run(capsys, "cache", "--dir", volume, "list").out


def test_what_the_environment_says_reaches_the_server(
    capsys: pytest.CaptureFixture[str],
    volume: Path,
    server: LoopbackServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = server.serve("/a.safetensors", as_bytes(kohya(1)))
    line = ("cache", "add", url)
    headers = {url.rpartition("/")[0]: "X-Token: canary"}
    monkeypatch.setenv("LORA_AUTH_HEADERS", json.dumps(headers))
    assert run(capsys, *line).code == 0
    assert server.headers["/a.safetensors"]["X-Token"] == "canary"
    monkeypatch.setenv("LORA_ALLOWED_HOSTS", "a.example, b.example")
    refused = run(capsys, "cache", "add", server.serve("/b.safetensors", as_bytes(kohya(2))))
    assert (refused.code, "LORA_SOURCE_INVALID" in refused.err) == (2, True)


def test_an_operators_file_that_was_replaced_is_not_damaged(
    capsys: pytest.CaptureFixture[str], volume: Path
) -> None:
    assert run(capsys, "cache", "add", "mine").code == 0  # now it has a record
    other = as_bytes(kohya(2))
    (volume / "mine.safetensors").write_bytes(other)
    ran = run(capsys, "cache", "verify", "--remove", "--json")
    assert (ran.code, ran.json["damaged"], ran.json["removed"]) == (0, [], [])
    assert (volume / "mine.safetensors").read_bytes() == other


def test_what_cannot_be_set_aside_is_not_told_as_removed(
    capsys: pytest.CaptureFixture[str], volume: Path
) -> None:
    (volume / "mine.safetensors").write_bytes(as_bytes(kohya())[:-50])
    (volume / ".damaged").write_text("in the way")
    ran = run(capsys, "cache", "verify", "--remove", "--json")
    assert (ran.code, ran.json["removed"]) == (2, [])
    assert "mine.safetensors is damaged" in ran.err
    assert (volume / "mine.safetensors").exists()
