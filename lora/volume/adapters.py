"""The adapters that lie in a folder and below it: files, and folders that PEFT saved. Reads no file."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from lora.formats.endings import EXTENSIONS
from lora.formats.peft import PEFT_CONFIG, PEFT_STEM
from lora.volume.records import pin_path, record_path

STATE = ".state.json"
"""Ends the name of an adapter's state, which lies beside its file or folder."""

PIN = pin_path(Path("name")).suffix

PEFT_WEIGHTS = tuple(PEFT_STEM + ending for ending in EXTENSIONS)

TRAINING_STATE = re.compile(
    r"(optimizer|scheduler|scaler|sampler|rng_state|random_states|training_args|trainer_state)"
    r"[\w.-]*\.(safetensors|pt|pth|bin|ckpt)",
    re.IGNORECASE,
)
"""Files that trainers save to resume from, with the endings that adapters have."""


class FileVersion(NamedTuple):
    """Which version of an adapter it is: another size or time of its weights or its config is another.

    The inode is no part of it: two workers may see different ones on a network file system.
    """

    size: int
    """Bytes of the weights; 0 if there are none."""
    mtime_ns: int
    config_size: int | None = None
    """Bytes of the adapter_config.json beside them."""
    config_mtime_ns: int | None = None


class StoredAdapter(NamedTuple):
    """An adapter as it lies on the disk. A tuple, because thousands are made and compared."""

    root: Path
    path: str
    """Its file's or folder's, relative to the root."""
    weights: str | None
    """The file with its tensors, relative to the root; None if a PEFT folder lacks it."""
    config: str | None
    """The adapter_config.json that belongs to it, relative to the root."""
    version: FileVersion
    pinned: bool = False
    state_version: tuple[int, int, int] | None = None
    """Size, time and inode of its state; None if there is none, or if one adapter was looked up alone."""

    @property
    def is_folder(self) -> bool:
        """Whether it is named by its folder."""
        return self.path not in (self.weights, self.config)

    @property
    def is_peft(self) -> bool:
        """Whether PEFT saved it, so that it needs a config."""
        return PurePosixPath(self.weights or PEFT_CONFIG).name in (*PEFT_WEIGHTS, PEFT_CONFIG)

    @property
    def state_path(self) -> Path:
        """Where its state lies."""
        return self.root / (self.path + STATE)


def adapters_in(root: Path, skip: re.Pattern[str] | None = None) -> Iterator[StoredAdapter]:
    """Every adapter in the folder and below it, in no order; none if it cannot be read.

    Hidden names are passed over, and links that lead out of the folder, and files whose name is `skip`.
    """
    yield from _walk(root, "", skip, None)


def adapter_at(root: Path, path: str) -> StoredAdapter | None:
    """The adapter of this relative path, as `adapters_in` gives it; None if there is none.

    Weights in a PEFT folder mean the folder.
    """
    place = root / path
    is_folder = place.is_dir()
    folder = place if is_folder else place.parent
    below = "" if folder == root else str(folder.relative_to(root))
    peft = (*PEFT_WEIGHTS, PEFT_CONFIG)
    names = peft if is_folder or place.name in peft else (place.name,)
    files = {name: status for name in names if (status := _status(folder / name))}
    wanted = below if below and place.name in PEFT_WEIGHTS else str(place.relative_to(root))
    for adapter in _made_of(files, root, below):
        if adapter.path == wanted:
            weights = adapter.weights
            return adapter._replace(pinned=bool(weights) and pin_path(root / str(weights)).exists())
    return None


def delete(adapter: StoredAdapter) -> None:
    """Removes an adapter and all that belongs to it; what else its folder holds stays. Raises: OSError.

    The state goes first: one that is written after that belongs to a later version. Weights go before their
    config, so that nobody reads them without it.
    """
    names = [f"{adapter.path}/{name}" for name in PEFT_WEIGHTS] if adapter.is_folder else []
    gone = [adapter.state_path]
    for name in names or filter(None, [adapter.weights]):
        weights = adapter.root / name
        gone += [weights, record_path(weights), pin_path(weights)]
    if adapter.config:
        gone.append(adapter.root / adapter.config)
    for path in gone:
        path.unlink(missing_ok=True)
    if adapter.is_folder:
        with suppress(OSError):  # something else is in it
            (adapter.root / adapter.path).rmdir()


def is_hidden(path: str) -> bool:
    """Whether the walk passes over this relative path because of a name in it."""
    return any(part.startswith(".") and part != ".." for part in PurePosixPath(path).parts)


def _walk(
    root: Path, folder: str, skip: re.Pattern[str] | None, state: os.DirEntry[str] | None
) -> Iterator[StoredAdapter]:
    """`state`: the state that lies beside this folder."""
    entries = _entries(root, folder)
    files: dict[str, os.stat_result] = {}
    for name, entry in entries.items():
        if entry.is_dir(follow_symlinks=False):
            below = f"{folder}/{name}" if folder else name
            yield from _walk(root, below, skip, entries.get(name + STATE))
        elif name.endswith((*EXTENSIONS, PEFT_CONFIG)) and not (skip and skip.fullmatch(name)):
            with suppress(OSError):  # removed just now
                status = entry.stat()
                if stat.S_ISREG(status.st_mode):
                    files[name] = status
    for adapter in _made_of(files, root, folder):
        name = adapter.path.rpartition("/")[2]
        beside = state if adapter.path == folder else entries.get(name + STATE)
        weights = (adapter.weights or "").rpartition("/")[2]
        yield adapter._replace(pinned=weights + PIN in entries, state_version=_version_of(beside))


def _made_of(
    files: Mapping[str, os.stat_result], root: Path, folder: str
) -> Iterator[StoredAdapter]:
    """The adapters that files of these names in one folder make, without what lies beside them."""
    below = f"{folder}/" if folder else ""
    peft = next((name for name in PEFT_WEIGHTS if name in files), None)
    config = files.get(PEFT_CONFIG)
    if folder and (peft or config):
        config_path = below + PEFT_CONFIG if config else None
        version = _file_version(files[peft] if peft else None, config)
        yield StoredAdapter(root, folder, below + peft if peft else None, config_path, version)
    elif config and not peft:  # the root has no name of its own
        yield StoredAdapter(root, PEFT_CONFIG, None, PEFT_CONFIG, _file_version(None, config))
    for name, status in files.items():
        if not name.endswith(EXTENSIONS):
            continue
        if name not in PEFT_WEIGHTS:
            yield StoredAdapter(root, below + name, below + name, None, _file_version(status, None))
        elif not folder:
            config_path = PEFT_CONFIG if config else None
            yield StoredAdapter(root, name, name, config_path, _file_version(status, config))


def _file_version(weights: os.stat_result | None, config: os.stat_result | None) -> FileVersion:
    own = (weights.st_size, weights.st_mtime_ns) if weights else (0, 0)
    return FileVersion(*own, config.st_size, config.st_mtime_ns) if config else FileVersion(*own)


def _entries(root: Path, folder: str) -> dict[str, os.DirEntry[str]]:
    with suppress(OSError), os.scandir(root / folder) as entries:
        return {
            entry.name: entry
            for entry in entries
            if not entry.name.startswith(".")
            and not (entry.is_symlink() and leads_out(Path(entry.path), root))
        }
    return {}  # removed just now, or not ours to read


def leads_out(path: Path, root: Path) -> bool:
    """Whether a link in the path leads out of the root. (`Path.resolve` fails for links in a circle.)"""
    return not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


def _version_of(entry: os.DirEntry[str] | None) -> tuple[int, int, int] | None:
    if entry is not None:
        with suppress(OSError):
            status = entry.stat()
            return status.st_size, status.st_mtime_ns, status.st_ino
    return None


def _status(path: Path) -> os.stat_result | None:
    with suppress(OSError, ValueError):
        status = path.stat()
        if stat.S_ISREG(status.st_mode):
            return status
    return None
