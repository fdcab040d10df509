"""Whether a folder lies on a disk of this machine."""

from __future__ import annotations

from pathlib import Path

LOCAL = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "zfs", "tmpfs", "overlay"})
"""File systems whose open files stay readable whatever happens to their names. All others count as remote."""

MOUNTS = Path("/proc/self/mountinfo")


def on_local_disk(folder: Path, mounts: Path = MOUNTS) -> bool:
    """Whether the folder, which need not exist yet, is on a local file system; False if unknown."""
    try:
        lines = mounts.read_text().splitlines()
    except OSError:
        return False
    target, best, kind = folder.resolve(), -1, ""
    for line in lines:
        # "36 35 98:0 / /mnt rw,noatime master:1 - ext3 /dev/root rw" (man proc_pid_mountinfo)
        before, _, after = line.partition(" - ")
        mount = Path(before.split(" ")[4].replace("\\040", " "))
        if target.is_relative_to(mount) and len(mount.parts) >= best:
            best, kind = len(mount.parts), after.split(" ")[0]
    return kind in LOCAL
