"""What every answer warns of."""

from __future__ import annotations

from pathlib import Path

import pytest

from handler import Worker
from tests.lora.volume.test_folders import MOUNTS
from worker.parts import missing_volume

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
