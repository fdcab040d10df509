"""The adapters that lie in a folder and below it: files, and folders that PEFT saved. Reads no file."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from lora.formats.endings import EXTENSIONS
from lora.formats.peft import PEFT_CONFIG, PEFT_STEM
from lora.volume.records import pin_path

STATE = ".state.json"
"""Ends the name of an adapter's state, which lies beside its file or folder."""

PIN = pin_path(Path("name")).suffix

PEFT_WEIGHTS = tuple(PEFT_STEM + ending for ending in EXTENSIONS)

TRAINING_STATE = re.compile(
    r"(optimizer|scheduler|scaler|sampler|rng_state|random_states|training_args|trainer_state)"
    r"[\w.-]*\.(safetensors|pt|pth|bin|ckpt)",
    re.IGNORECASE,
)
"""What trainers save to go on from, under the endings that adapters have."""


class Stamp(NamedTuple):
    """Which version of an adapter it is: another size or time of its weights or its config is another.

    Not the inode: two workers may see different ones on a network file system.
    """

    size: int
    """Bytes of the weights; 0 if there are none."""
    mtime_ns: int
    config_size: int | None = None
    """Bytes of the adapter_config.json beside them."""
    config_mtime_ns: int | None = None


class Adapter(NamedTuple):
    """An adapter as it lies on the disk. A tuple, for there are thousands to be made and compared."""

    root: Path
    path: str
    """Its file's or folder's, relative to the root."""
    weights: str | None
    """The file with its tensors, relative to the root; None if a PEFT folder lacks it."""
    config: str | None
    """The adapter_config.json that belongs to it, relative to the root."""
    stamp: Stamp
    pinned: bool = False
    state_version: Stamp | None = None
    """Which version of its state lies beside it; None if there is none, or nobody looked."""

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


def adapters_in(root: Path, *, skip: re.Pattern[str] | None = None) -> Iterator[Adapter]:
    """Every adapter in the folder and below it, in no order; none if it cannot be read.

    Hidden names are passed over, and links that lead out of the folder, and files whose name is `skip`.
    """
    yield from _walk(_Folder(root, "", skip), None)


def adapter_at(root: Path, path: str) -> Adapter | None:
    """The adapter of this path, as `adapters_in` gives it; None if there is none.

    Weights in a PEFT folder mean the folder.
    """
    place = root / path
    folder = place if place.is_dir() else place.parent
    inside = folder != root and (folder is place or place.name in PEFT_WEIGHTS)
    if inside:
        names = (*PEFT_WEIGHTS, PEFT_CONFIG)
        found = {name: about for name in names if (about := _stat(folder / name))}
        return _peft(root, str(folder.relative_to(root)), found)
    about = _stat(place)
    if about is None:
        return None
    if path == PEFT_CONFIG and not any((root / name).is_file() for name in PEFT_WEIGHTS):
        return _lone_config(root, about)
    if not path.endswith(EXTENSIONS):
        return None
    config = _stat(folder / PEFT_CONFIG) if path in PEFT_WEIGHTS else None
    return _file(root, path, about, config)


@dataclass(frozen=True)
class _Folder:
    """A folder on the way down."""

    root: Path
    path: str
    skip: re.Pattern[str] | None

    def below(self, name: str) -> str:
        return f"{self.path}/{name}" if self.path else name

    def wants(self, name: str) -> bool:
        return (name.endswith(EXTENSIONS) or name == PEFT_CONFIG) and not (
            self.skip and self.skip.fullmatch(name)
        )


def _walk(folder: _Folder, state: Stamp | None) -> Iterator[Adapter]:
    """`state`: the version of the state that lies beside this folder."""
    entries = _entries(folder)
    found: dict[str, os.stat_result] = {}
    for name, entry in entries.items():
        if entry.is_dir(follow_symlinks=False):
            beside = _version(entries.get(name + STATE))
            yield from _walk(_Folder(folder.root, folder.below(name), folder.skip), beside)
        elif folder.wants(name):
            with suppress(OSError):  # removed just now
                about = entry.stat()
                if stat.S_ISREG(about.st_mode):
                    found[name] = about
    peft = _peft(folder.root, folder.path, found, state) if folder.path else None
    if peft:
        yield peft
    if not folder.path and PEFT_CONFIG in found and not found.keys() & set(PEFT_WEIGHTS):
        version = _version(entries.get(PEFT_CONFIG + STATE))
        yield _lone_config(folder.root, found[PEFT_CONFIG], version)
    for name, about in found.items():
        if name == PEFT_CONFIG or (peft and name in PEFT_WEIGHTS):
            continue
        config = found.get(PEFT_CONFIG) if name in PEFT_WEIGHTS else None
        pinned = name + PIN in entries
        version = _version(entries.get(name + STATE))
        yield _file(folder.root, folder.below(name), about, config, pinned, version)


def _peft(
    root: Path, path: str, found: Mapping[str, os.stat_result], state: Stamp | None = None
) -> Adapter | None:
    """What a folder with files of these names is, if PEFT saved it."""
    weights = next((name for name in PEFT_WEIGHTS if name in found), None)
    config = PEFT_CONFIG if PEFT_CONFIG in found else None
    if not weights and not config:
        return None
    stamp = _stamp(found[weights] if weights else None, found[config] if config else None)
    pinned = bool(weights) and pin_path(root / path / str(weights)).exists()
    places = [f"{path}/{name}" if name else None for name in (weights, config)]
    return Adapter(root, path, places[0], places[1], stamp, pinned, state)


def _file(
    root: Path,
    path: str,
    about: os.stat_result,
    config: os.stat_result | None,
    pinned: bool = False,
    state: Stamp | None = None,
) -> Adapter:
    stamp = _stamp(about, config)
    return Adapter(root, path, path, PEFT_CONFIG if config else None, stamp, pinned, state)


def _lone_config(root: Path, config: os.stat_result, state: Stamp | None = None) -> Adapter:
    """A PEFT folder without weights, where it has no name because it is the root."""
    return Adapter(root, PEFT_CONFIG, None, PEFT_CONFIG, _stamp(None, config), False, state)


def _stamp(weights: os.stat_result | None, config: os.stat_result | None) -> Stamp:
    own = (weights.st_size, weights.st_mtime_ns) if weights else (0, 0)
    return Stamp(*own, config.st_size, config.st_mtime_ns) if config else Stamp(*own)


def _entries(folder: _Folder) -> dict[str, os.DirEntry[str]]:
    with suppress(OSError), os.scandir(folder.root / folder.path) as found:
        return {
            entry.name: entry
            for entry in found
            if not entry.name.startswith(".") and not _leads_out(entry, folder.root)
        }
    return {}  # removed just now, or not ours to read


def _leads_out(entry: os.DirEntry[str], root: Path) -> bool:
    return entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(root.resolve())


def _version(entry: os.DirEntry[str] | None) -> Stamp | None:
    if entry is not None:
        with suppress(OSError):
            about = entry.stat()
            return Stamp(about.st_size, about.st_mtime_ns, about.st_ino)
    return None


def _stat(path: Path) -> os.stat_result | None:
    with suppress(OSError, ValueError):
        about = path.stat()
        if stat.S_ISREG(about.st_mode):
            return about
    return None
