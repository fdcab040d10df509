"""The folders of a cache."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from lora.volume.folders import Folders, mount_of, on_local_disk
from lora.volume.records import INCOMING

MOUNTS = """\
22 1 0:20 / / rw,relatime shared:1 - overlay overlay rw
30 22 0:21 / /runpod-volume rw,relatime - fuse.juicefs volume rw
31 30 8:1 / /runpod-volume/scratch\\040disk rw - ext4 /dev/sda1 rw
32 22 0:22 / /models rw - nfs4 server:/models rw
"""


@pytest.mark.parametrize(
    ("folder", "local"),
    [
        ("/tmp-not-there/loras", True),
        ("/runpod-volume/loras", False),
        ("/runpod-volume/scratch disk/loras", True),
        ("/models", False),
        ("/models-of-mine", True),
    ],
)
def test_the_nearest_mount_decides(tmp_path: Path, folder: str, local: bool) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS)
    assert on_local_disk(Path(folder), mounts) is local


def test_without_the_kernels_table_nothing_counts_as_local(tmp_path: Path) -> None:
    assert on_local_disk(tmp_path, tmp_path / "none") is False


def test_a_mount_is_found_by_its_place(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS)
    assert mount_of(Path("/runpod-volume/loras"), mounts) == (
        Path("/runpod-volume"),
        "fuse.juicefs",
    )
    assert mount_of(Path("/elsewhere"), mounts) == (Path("/"), "overlay")
    assert mount_of(Path("/elsewhere"), tmp_path / "none") is None


@pytest.mark.parametrize("ahead", [3600.0, -3600.0, 86_400 * 365.0])
def test_a_clock_that_is_wrong_sweeps_no_living_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: float
) -> None:
    folders = Folders(tmp_path, None, stale_after=600)
    folders.prepare()
    fresh, old = (tmp_path / INCOMING / name for name in ("fresh.part", "old.part"))
    fresh.write_text("x")
    old.write_text("x")
    os.utime(old, (time.time() - 700,) * 2)
    real = time.time
    monkeypatch.setattr("time.time", lambda: real() + ahead)
    folders.prepare()
    assert (fresh.exists(), old.exists()) == (True, False)


def test_trouble_ends_when_the_volume_is_back(tmp_path: Path) -> None:
    volume, blocked = tmp_path / "volume" / "loras", tmp_path / "volume"
    blocked.write_text("no folder")
    folders = Folders(volume, tmp_path / "fallback", stale_after=600)
    assert folders.look_again() is None  # nobody wrote yet
    folders.prepare()
    assert "cannot be written" in str(folders.look_again())
    blocked.unlink()
    assert folders.look_again() is None
