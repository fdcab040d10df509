"""What every answer warns of, and how many threads compute."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from handler import Worker
from settings import Settings
from tests.lora.volume.test_folders import MOUNTS
from text_settings import TextSettings
from worker.parts import make_parts, missing_volume, spare_cores
from worker.text.base import Base

BARE = "22 1 0:20 / / rw,relatime shared:1 - overlay overlay rw\n"


@pytest.mark.parametrize(
    ("folder", "table", "is_missing"),
    [
        ("/runpod-volume/loras", BARE, True),
        ("/runpod-volume", BARE, True),
        ("/workspace/loras", BARE, True),
        ("/workspace/loras", MOUNTS, True),
        ("/runpod-volume/loras", MOUNTS, False),
        ("/runpod-volume-of-mine/loras", BARE, False),
        ("/models/loras", BARE, False),
    ],
)
def test_a_volume_that_is_not_mounted_is_seen(
    tmp_path: Path, folder: str, table: str, is_missing: bool
) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(table)
    said = missing_volume(Path(folder), mounts)
    assert (said is not None) is is_missing
    if said:
        assert said.startswith(
            f"no volume is mounted at /{folder.split('/')[1]}: LoRAs are kept on"
        )


def test_where_mounts_are_not_known_nothing_is_said(tmp_path: Path) -> None:
    assert missing_volume(Path("/runpod-volume/loras"), tmp_path / "none") is None


def test_every_answer_and_health_say_that_the_volume_is_missing(
    demo_worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = demo_worker.parts.library.cache.shelf.root
    job = {"id": "a", "input": {"prompt": "a circle", "num_inference_steps": 1}}
    for place in (root.parent, Path("/elsewhere")):
        monkeypatch.setattr("worker.parts.VOLUMES", (place,))
        said = demo_worker(job)["warnings"]
        told = demo_worker({"id": "b", "input": {"action": "health"}})["cache"]["trouble"]
        assert said == ([told] if told else [])
        assert bool(told) is (place == root.parent)


@pytest.mark.parametrize(
    ("model", "set_by_hand", "threads"),
    [
        ("demo", None, [1]),
        ("demo", "2", []),
        ("stabilityai/stable-diffusion-xl-base-1.0", None, []),
    ],
)
def test_only_the_demo_models_compute_in_one_thread(
    monkeypatch: pytest.MonkeyPatch, model: str, set_by_hand: str | None, threads: list[int]
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if set_by_hand:
        monkeypatch.setenv("OMP_NUM_THREADS", set_by_hand)
    spare_cores(model)
    assert asked == threads


@pytest.mark.parametrize("kind", ["image", "text"])
def test_a_worker_on_a_demo_model_does(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if kind == "image":
        make_parts(Settings(model="demo", device="cpu"))
    else:
        Base(TextSettings(device="cpu"), lambda text: None).close()
    assert asked == [1]
