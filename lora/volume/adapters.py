"""The adapters that lie in a folder and below it: files, and folders that PEFT saved. Reads no file."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from lora.durable import leads_out
from lora.formats.endings import EXTENSIONS
from lora.formats.peft import PEFT_CONFIG, PEFT_STEM
from lora.volume.records import pin_path, record_path

STATE = ".state.json"
"""Ends the name of an adapter's state, which lies beside its file or folder."""

NOTE = ".note.json"
"""Ends the name of what a person wrote of an adapter."""

THUMBNAIL = ".preview.webp"
"""Ends the name of an adapter's thumbnail, behind its whole name."""

PREVIEWS = tuple(
    middle + ending for middle in (".preview", "") for ending in (".png", ".jpeg", ".jpg", ".webp")
)
"""How web UIs and downloaders of Civitai end a preview's name, behind the adapter's without its ending."""

PIN = pin_path(Path("name")).suffix

PEFT_WEIGHTS = tuple(PEFT_STEM + ending for ending in EXTENSIONS)

PEFT_FILES = (*PEFT_WEIGHTS, PEFT_CONFIG)

TRAINING_STATE = re.compile(
    r"(optimizer|scheduler|scaler|sampler|rng_state|random_states|training_args|trainer_state)"
    r"[\w.-]*\.(safetensors|pt|pth|bin|ckpt)",
    re.IGNORECASE,
)
"""Files that trainers save to resume from, with the endings that adapters have."""


class FileVersion(NamedTuple):
    """A version of an adapter: it differs when the size or time of the weights or the config does.

    The inode is no part of it: two workers may see different ones on a network file system.
    """

    size: int
    """Bytes of the weights; 0 if there are none."""
    mtime_ns: int
    config_size: int | None = None
    """Bytes of the adapter_config.json beside them."""
    config_mtime_ns: int | None = None


class Preview(NamedTuple):
    """A picture that shows what an adapter does."""

    path: str
    """Relative to the root."""
    size: int
    mtime_ns: int


class StoredAdapter(NamedTuple):
    """An adapter on the disk. A tuple, because thousands are made and compared."""

    root: Path
    path: str
    """The path of its file or folder, relative to the root."""
    weights: str | None
    """The file with its tensors, relative to the root; None if a PEFT folder lacks it."""
    config: str | None
    """The adapter_config.json that belongs to it, relative to the root."""
    version: FileVersion
    pinned: bool = False
    state_version: tuple[int, int, int] | None = None
    """Size, time and inode of its state; None if it has none, or comes from `adapter_at`."""
    note_version: tuple[int, int, int] | None = None
    """The same of its note."""
    record_version: tuple[int, int] | None = None
    """Size and inode of its record, whose time is that of the last use."""
    preview: Preview | None = None
    """None if it has none, or comes from `adapter_at`."""

    @property
    def is_folder(self) -> bool:
        """Whether it is named by its folder."""
        return self.path not in (self.weights, self.config)

    @property
    def is_peft(self) -> bool:
        """Whether PEFT saved it, so that it needs a config."""
        return PurePosixPath(self.weights or PEFT_CONFIG).name in PEFT_FILES

    @property
    def state_path(self) -> Path:
        """The file of its state."""
        return self.root / (self.path + STATE)

    @property
    def note_path(self) -> Path:
        """The file of its note."""
        return self.root / (self.path + NOTE)

    @property
    def thumbnail_path(self) -> Path:
        """The file of the thumbnail that a worker made of it."""
        return self.root / (self.path + THUMBNAIL)


def adapters_in(root: Path, skip: re.Pattern[str] | None = None) -> Iterator[StoredAdapter]:
    """Every adapter in the folder and below it, in no order; none if it cannot be read.

    Hidden names, links that lead out of the folder, and files whose names match `skip` are passed over.
    """
    yield from _walk(root, "", skip, {})


def adapter_at(root: Path, path: str) -> StoredAdapter | None:
    """The adapter of this relative path, as `adapters_in` gives it; None if there is none.

    Weights in a PEFT folder mean the folder.
    """
    target = root / path
    is_folder = os.path.isdir(target)  # noqa: PTH112 - False for a name that no file can have
    folder = target if is_folder else target.parent
    below = "" if folder == root else str(folder.relative_to(root))
    names = PEFT_FILES if is_folder or target.name in PEFT_FILES else (target.name,)
    files = {name: status for name in names if (status := _status(folder / name))}
    wanted = below if below and target.name in PEFT_WEIGHTS else str(target.relative_to(root))
    for adapter in _made_of(files, root, below):
        if adapter.path == wanted:
            weights = adapter.weights
            return adapter._replace(
                pinned=bool(weights) and _status(pin_path(root / str(weights))) is not None
            )
    return None


def delete(adapter: StoredAdapter) -> None:
    """Removes an adapter and all that belongs to it; what else its folder holds stays. Raises: OSError.

    The state goes first: a state that appears after that belongs to a later version. Weights go before their
    config, so that nobody reads them without it.
    """
    names = [f"{adapter.path}/{name}" for name in PEFT_WEIGHTS] if adapter.is_folder else []
    doomed = [adapter.state_path, adapter.note_path, adapter.thumbnail_path]
    for name in names or filter(None, [adapter.weights]):
        weights = adapter.root / name
        doomed += [weights, record_path(weights), pin_path(weights)]
    if adapter.config:
        doomed.append(adapter.root / adapter.config)
    for path in doomed:
        path.unlink(missing_ok=True)
    if adapter.is_folder:
        with suppress(OSError):  # something else is in it
            (adapter.root / adapter.path).rmdir()


def states_in(root: Path) -> Iterator[Path]:
    """Every file in the folder and below it that is named as a state; hidden names are passed over."""
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if not name.startswith(".")]
        yield from (Path(folder, name) for name in names if name.endswith(STATE) and name[0] != ".")


def is_hidden(path: str) -> bool:
    """Whether the walk passes over this relative path because of a name in it."""
    return any(part.startswith(".") and part != ".." for part in PurePosixPath(path).parts)


def _walk(
    root: Path, folder: str, skip: re.Pattern[str] | None, above: Mapping[str, os.DirEntry[str]]
) -> Iterator[StoredAdapter]:
    """`above`: what lies beside this folder."""
    entries = _entries(root, folder)
    files: dict[str, os.stat_result] = {}
    for name, entry in entries.items():
        if entry.is_dir(follow_symlinks=False):
            below = f"{folder}/{name}" if folder else name
            yield from _walk(root, below, skip, entries)
        elif skip and skip.fullmatch(name):
            continue
        elif name.endswith((*EXTENSIONS, PEFT_CONFIG)) and (status := _status(entry)):
            files[name] = status
    for adapter in _made_of(files, root, folder):
        name = adapter.path.rpartition("/")[2]
        beside = above if adapter.path == folder else entries
        weights = (adapter.weights or "").rpartition("/")[2]
        record = _version(entries.get(record_path(Path(weights or name)).name))
        yield adapter._replace(
            pinned=weights + PIN in entries,
            state_version=_version(beside.get(name + STATE)),
            note_version=_version(beside.get(name + NOTE)),
            record_version=record and (record[0], record[2]),
            preview=_preview(adapter, beside),
        )


def preview_of(adapter: StoredAdapter) -> Preview | None:
    """The adapter's preview as it lies on the disk now; None if it has none."""
    folder = adapter.state_path.parent
    below = "" if folder == adapter.root else str(folder.relative_to(adapter.root))
    return _preview(adapter, _entries(adapter.root, below))


def _preview(adapter: StoredAdapter, beside: Mapping[str, os.DirEntry[str]]) -> Preview | None:
    """Of several previews the one that a worker made. `beside`: what lies beside the adapter."""
    folder, slash, name = adapter.path.rpartition("/")
    stem = name if adapter.is_folder else PurePosixPath(name).stem
    for candidate in (name + THUMBNAIL, *(stem + ending for ending in PREVIEWS)):
        if candidate in beside and (status := _status(beside[candidate])):
            return Preview(f"{folder}{slash}{candidate}", status.st_size, status.st_mtime_ns)
    return None


def _version(entry: os.DirEntry[str] | None) -> tuple[int, int, int] | None:
    status = _status(entry)
    return (status.st_size, status.st_mtime_ns, status.st_ino) if status else None


def _made_of(
    files: Mapping[str, os.stat_result], root: Path, folder: str
) -> Iterator[StoredAdapter]:
    """The adapters that files of these names in one folder make, without their pins and states."""
    below = f"{folder}/" if folder else ""

    def made(path: str, weights: str | None, config: str | None) -> StoredAdapter:
        own, beside = files.get(weights or ""), files.get(config or "")
        version = FileVersion(own.st_size, own.st_mtime_ns) if own else FileVersion(0, 0)
        if beside:
            version = FileVersion(*version[:2], beside.st_size, beside.st_mtime_ns)
        weights, config = weights and below + weights, config and below + config
        return StoredAdapter(root, path, weights, config, version)

    peft = next((name for name in PEFT_WEIGHTS if name in files), None)
    config = PEFT_CONFIG if PEFT_CONFIG in files else None
    if folder and (peft or config):
        yield made(folder, peft, config)
    elif config and not peft:  # the root has no name of its own
        yield made(PEFT_CONFIG, None, config)
    for name in files:
        if name.endswith(EXTENSIONS) and not (folder and name in PEFT_WEIGHTS):
            yield made(below + name, name, config if name in PEFT_WEIGHTS else None)


def _entries(root: Path, folder: str) -> dict[str, os.DirEntry[str]]:
    with suppress(OSError), os.scandir(root / folder) as entries:
        return {
            entry.name: entry
            for entry in entries
            if not entry.name.startswith(".")
            and not (entry.is_symlink() and leads_out(Path(entry.path), root))
        }
    return {}  # removed just now, or not ours to read


def _status(path: Path | os.DirEntry[str] | None) -> os.stat_result | None:
    """A regular file's status; None for anything else, and for a file that was removed just now."""
    with suppress(OSError, ValueError):
        status = path.stat() if path else None
        return status if status and stat.S_ISREG(status.st_mode) else None
    return None
