"""Where a text worker's base is found: as that of pictures, in caches of the hub on the machine."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.hub_caches import put
from tests.text.small import base, tokenizer
from text.loading import FILES, ModelUnusable
from text_settings import TextSettings
from worker.text.base import Base, folder_of
from worker.text.vllm import VllmBase

REPO, OLD, NEW = "someone/small", "a" * 40, "b" * 40


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    """A base's files, by their names."""
    base().save_pretrained(tmp_path / "saved")
    tokenizer().save_pretrained(tmp_path / "saved")
    return {file.name: file.read_bytes() for file in (tmp_path / "saved").iterdir()}


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the three caches `baked`, `cached` and `volume`."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "baked"))
    monkeypatch.setattr("pipelines.weights.CACHED", tmp_path / "cached")
    return tmp_path


def settings(places: Path, **more: Any) -> TextSettings:
    given = {"model": REPO, "device": "cpu", "lora_cache_dir": places / "loras", **more}
    return TextSettings(weights_dir=places / "volume", **given)


def test_a_base_from_a_cache_of_the_hub_is_loaded_without_the_network(
    places: Path, files: dict[str, bytes], offline: None, own_fallback: None
) -> None:
    put(places / "cached", REPO, files)
    made = Base(settings(places), lambda generation: None)
    try:
        assert made.text.name == REPO
        assert made.text.encode("abc", special=False)
    finally:
        made.close()


def test_the_image_comes_first_and_the_volume_last(
    places: Path, files: dict[str, bytes], offline: None
) -> None:
    for name in ("volume", "cached", "baked"):
        made = put(places / name, REPO, files)
        for weights in ("auto", "download", name):
            assert folder_of(settings(places, weights=weights)) == made
    (made / "model.safetensors").resolve().write_bytes(b"broken")
    assert folder_of(settings(places)).is_relative_to(places / "cached")
    with pytest.raises(ModelUnusable, match=r"model.safetensors is not whole"):
        folder_of(settings(places, weights="baked"))


def test_a_revision_is_that_one(places: Path, files: dict[str, bytes], offline: None) -> None:
    put(places / "cached", REPO, files, OLD, ref="v1")
    put(places / "cached", REPO, files, NEW)
    assert folder_of(settings(places)).name == NEW
    assert folder_of(settings(places, revision="v1")).name == OLD
    assert folder_of(settings(places, revision=NEW)).name == NEW
    with pytest.raises(ModelUnusable, match=r"nor a repo in .*cached"):
        folder_of(settings(places, revision="v2", weights="cached"))


def test_a_tokenizer_of_its_own_is_looked_for_there_too(
    places: Path, files: dict[str, bytes], offline: None, own_fallback: None
) -> None:
    words = {name: body for name, body in files.items() if name.startswith(("token", "special"))}
    put(places / "cached", REPO, {n: b for n, b in files.items() if n not in words})
    put(places / "volume", "someone/words", words)
    made = Base(settings(places, tokenizer="someone/words"), lambda generation: None)
    try:
        assert made.text.encode("abc", special=False)
    finally:
        made.close()


def test_what_is_nowhere_is_downloaded_unless_that_is_refused(
    places: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[object]()

    def bake(repo: str, token: str | None, place: Path, **more: object) -> None:
        asked.append((repo, token, place, more))
        put(place, repo, files, ref="v1")

    monkeypatch.setattr("pipelines.baking.bake", bake)
    wanted = {"revision": "v1", "hf_token": "hf"}
    for weights in ("baked", "cached", "volume"):
        with pytest.raises(ModelUnusable, match="neither a folder"):
            folder_of(settings(places, weights=weights, **wanted))
    for _ in range(2):
        assert folder_of(settings(places, **wanted)).is_relative_to(places / "volume")
    assert asked == [(REPO, "hf", places / "volume", {"revision": "v1", "files": FILES})]


def test_a_folder_may_hold_other_weights_than_safetensors(places: Path, offline: None) -> None:
    (places / "mine").mkdir()
    (places / "mine" / "pytorch_model.bin").write_bytes(b"x")
    assert folder_of(settings(places, model=str(places / "mine"))) == places / "mine"


def test_a_vllm_server_is_started_over_what_was_found(
    places: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, own_fallback: None
) -> None:
    made = put(places / "cached", REPO, files)
    program, told = places / "bin" / "vllm", places / "told.json"
    program.parent.mkdir()
    program.write_text(
        f"#!{sys.executable}\n"
        "import json, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        f"open({str(told)!r}, 'w').write(json.dumps(sys.argv[1:]))\n"
        "from tests.vllm_stub import VllmStub\n"
        "port = int(sys.argv[sys.argv.index('--port') + 1])\n"
        "name = sys.argv[sys.argv.index('--served-model-name') + 1]\n"
        "VllmStub(name, port).serve()\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    base = VllmBase(settings(places, engine="vllm"))
    base.close()
    words = json.loads(told.read_text())
    assert words[:2] == ["serve", str(made)]
    assert base.served == REPO
