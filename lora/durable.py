"""Files that appear under their name whole, at once, and that a loss of power does not take away; hashes."""

from __future__ import annotations

import errno
import glob
import hashlib
import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

log = logging.getLogger(__name__)

READABLE = 30
"""Characters of a file's name in the name of its part, which a file system limits to 255 bytes."""


def process_name(pid: int | str = "self") -> str:
    """A name that no other process has or had: this machine's boot, the pid's namespace, pid and start time.

    Raises: FileNotFoundError or ProcessLookupError if there is no such process, or only a zombie; OSError if
    it may not be read, or there is no /proc.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    namespace = Path(f"/proc/{pid}/ns/pid").readlink()
    number, _, rest = Path(f"/proc/{pid}/stat").read_text().partition(" ")
    # man proc_pid_stat: field 3 is the state, 22 the start in ticks since boot
    state, *others = rest.rpartition(")")[2].split()
    if state in ("Z", "X"):
        raise ProcessLookupError
    return f"{boot}/{namespace}/{number}/{others[18]}"


def is_gone(owner: str) -> bool:
    """Whether the process that had this name was one of this machine, and has ended."""
    try:
        here = process_name().split("/")
        boot, namespace, pid, _ = owner.split("/")
        number = int(pid)
    except (OSError, ValueError):  # there is no /proc here, or was none there
        return False
    if [boot, namespace] != here[:2]:
        return False
    try:
        return process_name(number) != owner
    except (FileNotFoundError, ProcessLookupError):
        return True
    except OSError:
        return False


def is_orphan(part: Path) -> bool:
    """Whether a part's name is that of a process of this machine that has ended."""
    *_, owner, _, ending = ("." * 4 + part.name).split(".")
    return ending == "part" and is_gone(owner.replace("_", "/"))


def sweep(folder: Path, name: str) -> None:
    """Removes the parts of `name` that killed processes left in the folder."""
    with suppress(OSError):
        for part in folder.glob(f".{glob.escape(name[:READABLE])}.*.part"):
            if is_orphan(part):
                shutil.rmtree(part, ignore_errors=True)
                part.unlink(missing_ok=True)


def part_path(folder: Path, name: str) -> Path:
    """A path in `folder` that nobody else has, for what becomes `name` once it is whole.

    It tells which process has it, so that what a killed one leaves is known: see `is_orphan`.
    """
    try:
        owner = process_name().replace("/", "_")
    except OSError:
        owner = "unknown"
    return folder / f".{name[:READABLE]}.{owner}.{uuid.uuid4().hex[:16]}.part"


@contextmanager
def part_file(folder: Path, name: str = "") -> Iterator[Path]:
    """A path in `folder` that nobody else has. What lies there when the block ends is removed.

    See `part_path`.
    """
    part = part_path(folder, name)
    try:
        yield part
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


@contextmanager
def published(
    target: Path, part_folder: Path | None = None, *, synced: bool = True
) -> Iterator[Path]:
    """A path to write to, which is renamed to `target` when the block ends, and removed if the block fails.

    It lies in `part_folder`, which must be of the target's file system, or beside the target, where first the
    parts are removed that killed writers of the same name left. `synced`: the bytes are on the disk before
    they have the name. Raises: OSError.
    """
    if part_folder is None:
        sweep(target.parent, target.name)
    with part_file(part_folder or target.parent, target.name) as part:
        yield part
        if synced:
            replace_durably(part, target)
        else:
            part.replace(target)


def write_durably(target: Path, *pieces: bytes | memoryview) -> None:
    """Writes a file, whole or not at all. Raises: OSError."""
    with published(target) as part, part.open("xb") as stream:
        stream.writelines(pieces)


def replace_durably(part: Path, target: Path) -> None:
    """Renames a whole file of the same file system to `target`. Raises: OSError."""
    handle = os.open(part, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    part.replace(target)
    sync_folder(target.parent)


def rename_folder(part: Path, target: Path, *, overwrite: bool = False) -> None:
    """Renames a folder to `target`, which is nothing or an empty folder.

    With `overwrite`, a folder or link that is there is moved away before, and removed afterwards; between
    the two moves nothing is there. Raises: OSError; then what was there is there.
    """
    try:
        part.rename(target)
    except OSError as error:
        if not overwrite or error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
    else:
        return
    with part_file(target.parent, target.name) as old:  # removed here if it is a link
        target.rename(old)
        try:
            part.rename(target)
        except BaseException:
            old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Waits until the folder's names are on the disk. Raises: OSError if there is no such folder."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:  # some network file systems cannot sync a folder; that loses little
        log.debug("cannot sync %s: %s", folder.name, error.strerror)
    finally:
        os.close(handle)


def leads_out(path: Path, root: Path) -> bool:
    """Whether a link in the path leads out of the root. (`Path.resolve` fails for links in a circle.)"""
    return not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


def sha256_of(path: Path, start: int = 0) -> str:
    """The sha256 of a file's bytes from `start` on, in hex; read in pieces. Raises: OSError."""
    with path.open("rb") as stream:
        stream.seek(start)
        return hashlib.file_digest(stream, "sha256").hexdigest()
