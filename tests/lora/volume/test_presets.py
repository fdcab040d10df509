"""Presets on the volume and LightX2V's config files: reading, writing, and by many processes at once."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from lora.errors import CacheFull, LoraCorrupt, LoraNotFound, LoraTooLarge, ToolError
from lora.volume.lease import Lease
from lora.volume.presets import MAX_BYTES, Presets, cached_names, read_config
from lora.volume.records import INCOMING
from tests.waiting import PATIENCE

WATERCOLOR = {"loras": ["user/watercolor"], "trigger_words": ["wtrclr"]}


@pytest.fixture
def presets(tmp_path: Path) -> Presets:
    return Presets(tmp_path)


def test_presets_are_set_found_and_deleted(presets: Presets) -> None:
    assert presets.read() == {}
    presets.set("watercolor", WATERCOLOR)
    presets.set("ink", {"loras": ["ink"]})
    assert presets.find("watercolor") == WATERCOLOR
    presets.set("ink", {"loras": ["better-ink"]})
    assert presets.read() == {"watercolor": WATERCOLOR, "ink": {"loras": ["better-ink"]}}
    presets.delete("watercolor")
    assert list(presets.read()) == ["ink"]
    assert sorted(path.name for path in presets.root.rglob("*")) == [".incoming", "presets.json"]


def test_an_unknown_preset_names_the_nearest(presets: Presets) -> None:
    with pytest.raises(LoraNotFound) as none:
        presets.find("watercolour")
    assert "There are none" in str(none.value)
    presets.set("watercolor", WATERCOLOR)
    with pytest.raises(LoraNotFound) as caught:
        presets.find("watercolour")
    assert str(caught.value).endswith("'watercolour'. Did you mean watercolor?")
    with pytest.raises(LoraNotFound) as far:
        presets.delete("zzz")
    assert "There are: watercolor." in str(far.value)


def test_what_people_change_by_hand_shows_at_once(presets: Presets) -> None:
    presets.set("a", {"loras": ["x"]})
    presets.path.write_text('{"a": {"loras": ["y"]}, "bad": 5}')
    assert presets.find("a") == {"loras": ["y"]}
    with pytest.raises(LoraCorrupt) as caught:
        presets.find("bad")
    assert "presets.json: bad is not an object" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('{"a": {},\n "b" 5}', "line 2, column 6 is no JSON"),
        ("", "line 1, column 1 is no JSON"),
        ("[1]", "it is not an object of name -> preset"),
        ("[" * 100_000, "nested without end"),
    ],
)
def test_a_broken_file_is_told_with_the_place_and_never_overwritten(
    presets: Presets, text: str, place: str
) -> None:
    presets.path.write_text(text)
    for act in (presets.read, lambda: presets.find("a"), lambda: presets.set("a", WATERCOLOR)):
        with pytest.raises(LoraCorrupt) as caught:
            act()
        assert place in str(caught.value)
    assert presets.path.read_text() == text


def test_bytes_that_are_no_text_are_told(presets: Presets) -> None:
    presets.path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(LoraCorrupt):
        presets.read()


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(CacheFull) as caught:
        Presets(tmp_path / "file").set("a", WATERCOLOR)
    assert "presets.json cannot be written" in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


# --- many workers --------------------------------------------------------------------------------


def set_many(root: Path, worker: int, count: int) -> None:
    presets = Presets(root)
    for number in range(count):
        presets.set(f"{worker}-{number}", {"loras": [f"{worker}/{number}"]})
    for number in range(0, count, 2):
        presets.delete(f"{worker}-{number}")


def run(jobs: list[tuple[Any, ...]]) -> list[Any]:
    spawn = multiprocessing.get_context("spawn")
    started = [spawn.Process(target=job[0], args=job[1:]) for job in jobs]
    for process in started:
        process.start()
    return started


def test_workers_that_write_at_once_lose_no_preset(tmp_path: Path) -> None:
    processes = run([(set_many, tmp_path, worker, 20) for worker in range(3)])
    for process in processes:
        process.join(PATIENCE)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    expected = {f"{worker}-{number}" for worker in range(3) for number in range(1, 20, 2)}
    assert set(Presets(tmp_path).read()) == expected


def test_a_worker_killed_while_it_writes_leaves_a_whole_file_and_no_lock(tmp_path: Path) -> None:
    Presets(tmp_path).set("mine", WATERCOLOR)
    for round_ in range(5):
        (process,) = run([(set_many, tmp_path, round_, 1_000_000)])
        while not any(name.startswith(f"{round_}-") for name in Presets(tmp_path).read()):
            time.sleep(0.01)
        time.sleep(0.01 * round_)
        os.kill(process.pid, signal.SIGKILL)
        process.join(PATIENCE)
        # At once; after 10 s if it died between making the lease and writing its name into it.
        Presets(tmp_path).set(f"after-{round_}", WATERCOLOR)
    names = Presets(tmp_path).read()
    assert {"mine", *(f"after-{round_}" for round_ in range(5))} <= names.keys()


class NobodysLease(Lease):
    """The lease of a file system that gives it to everybody; another worker writes as soon as it is taken."""

    def take(self) -> bool:
        other = Presets(self.path.parent.parent)
        if "theirs" not in other.read():
            other.set("theirs", WATERCOLOR)
        return True


def test_without_a_true_lease_what_was_written_before_is_kept(tmp_path: Path) -> None:
    Presets(tmp_path, NobodysLease).set("mine", WATERCOLOR)
    assert set(Presets(tmp_path).read()) == {"mine", "theirs"}


# --- config files --------------------------------------------------------------------------------


def config(tmp_path: Path, found: object) -> Path:
    path = tmp_path / "wan_config.json"
    path.write_text(found if isinstance(found, str) else json.dumps(found))
    return path


@pytest.mark.parametrize(
    ("found", "entries"),
    [
        (
            {"lora_path": ["/a.safetensors", "b"], "strength_model": 0.7},
            [("/a.safetensors", 0.7), ("b", 0.7)],
        ),
        ({"lora_path": "/a.safetensors", "infer_steps": 4}, [("/a.safetensors", 1.0)]),
        (
            {"lora_configs": [{"path": "a", "strength": 0.8}, {"path": "b"}], "lora_path": None},
            [("a", 0.8), ("b", 1.0)],
        ),
        ({"infer_steps": 4}, []),
        ({"lora_path": [], "lora_configs": []}, []),
    ],
)
def test_both_forms_of_lightx2v_are_read(
    tmp_path: Path, found: object, entries: list[tuple[str, float]]
) -> None:
    expected = tuple({"path": path, "scale": scale} for path, scale in entries)
    assert read_config(config(tmp_path, found)) == expected


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ("{", "wan_config.json: line 1, column 2 is no JSON"),
        ("[]", "is not a JSON object"),
        ({"lora_path": 5}, "lora_path is neither a path nor a list"),
        ({"lora_path": ["a", 5]}, "lora_path[1] names no LoRA"),
        ({"lora_path": "a", "strength_model": "x"}, "strength_model is not a number"),
        ({"lora_path": "a", "strength_model": True}, "strength_model is not a number"),
        ({"lora_path": "a", "strength_model": math.nan}, "strength_model is not between"),
        ({"lora_path": "a", "strength_model": 10**400}, "strength_model is not between"),
        ({"lora_configs": {"path": "a"}}, "lora_configs is not a list"),
        ({"lora_configs": ["a"]}, "lora_configs[0] is not an object"),
        ({"lora_configs": [{"strength": 1}]}, "lora_configs[0] names no LoRA"),
        ({"lora_configs": [{"path": "a", "strength": None}]}, "lora_configs[0]: strength is not"),
        ({"lora_configs": [{"path": "a"}], "lora_path": ["b"]}, "both lora_path and lora_configs"),
    ],
)
def test_a_fault_of_a_config_is_one_sentence(tmp_path: Path, found: object, said: str) -> None:
    with pytest.raises(ToolError) as caught:
        read_config(config(tmp_path, found))
    assert said in caught.value.sentence
    assert str(tmp_path) not in str(caught.value)


def test_a_config_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ToolError) as caught:
        read_config(tmp_path / "gone.json")
    assert caught.value.sentence == "gone.json cannot be read (No such file or directory)"


def test_paths_in_the_cache_are_names_and_others_are_refused(tmp_path: Path) -> None:
    entries = (
        {"path": str(tmp_path / "styles" / "a.safetensors"), "scale": 0.5},
        {"path": "user/repo", "scale": 1.0},
        {"path": "https://host/x.safetensors", "scale": 1.0},
    )
    assert [one["path"] for one in cached_names(entries, tmp_path)] == [
        "styles/a.safetensors",
        "user/repo",
        "https://host/x.safetensors",
    ]
    for path in ("/elsewhere/a.safetensors", f"{tmp_path}/../a", "./a.safetensors", "~/a"):
        with pytest.raises(ToolError) as caught:
            cached_names(({"path": path, "scale": 1.0},), tmp_path)
        assert "does not lie in the LoRA cache" in caught.value.sentence


@pytest.mark.parametrize("letter", ["x", "\U0001f600", '"', "\n"])
def test_what_could_not_be_read_again_is_not_written(tmp_path: Path, letter: str) -> None:
    presets = Presets(tmp_path)
    presets.set("good", {"loras": ["a"]})
    before = presets.path.read_bytes()
    with pytest.raises(LoraTooLarge):
        presets.set("large", {"loras": ["a"], "description": letter * MAX_BYTES})
    assert presets.path.read_bytes() == before
    assert list((tmp_path / INCOMING).iterdir()) == []
    for number in range(3):  # none is too large, but all are
        with suppress(LoraTooLarge):
            presets.set(f"n{number}", {"loras": ["a"], "description": "y" * (MAX_BYTES * 4 // 10)})
        assert "good" in presets.read()
    assert presets.path.stat().st_size <= MAX_BYTES
