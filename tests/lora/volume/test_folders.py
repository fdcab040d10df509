"""The folders of a cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora.volume.folders import mount_of, on_local_disk

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
