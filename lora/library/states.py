"""What is known of an adapter on the volume, in a file beside it: NAME.state.json.

A state belongs to one version of its adapter. A state of another version, or one that cannot be read, counts
as none: so the state that a dead worker left, or that of a changed file, misleads nobody.
"""

from __future__ import annotations

import errno
import json
import math
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path

from lora.durable import part_file
from lora.volume.adapters import FileVersion, StoredAdapter, adapter_at
from lora.volume.records import INCOMING, read_as, write

NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)
"""Errors of a file system without hard links."""


class Standing(StrEnum):
    """How far an adapter was checked."""

    DISCOVERED = "discovered"
    """No fault is known yet."""
    ACTIVE = "active"
    """It was read whole, and every layer fits the worker's model."""
    FAILED = "failed"
    """It cannot be used; the reason says why."""


@dataclass(frozen=True)
class State:
    """What is known of one version of an adapter."""

    state: Standing
    size: int
    mtime_ns: int
    config_size: int | None = None
    config_mtime_ns: int | None = None
    at: float = 0.0
    """When it was checked, in seconds since 1970."""
    reason: str | None = None
    """Why it failed, in one sentence."""
    sha256: str | None = None
    autov3: str | None = None
    """The first digits of the hash without the file's header, by which web UIs name it in pictures."""
    source: str | None = None
    """Where it came from, as it may be shown."""
    algorithm: str | None = None
    rank: int | None = None
    base: str | None = None
    """The family of models that it is for, or the base model that its config names."""
    words: tuple[str, ...] = ()
    """Its trigger words, as far as its metadata has them."""
    layers: int = 0
    """How many modules it changes."""
    file: str | None = None
    """The published copy of an adapter of the training folder: its name for jobs."""
    decided: bool = False
    """Whether somebody activated or deactivated it. What a scan sees never replaces that."""

    @property
    def version(self) -> FileVersion:
        """The version of the adapter that it belongs to."""
        return FileVersion(self.size, self.mtime_ns, self.config_size, self.config_mtime_ns)


def unknown(adapter: StoredAdapter) -> State:
    """The state of an adapter of which nothing is known."""
    return State(Standing.DISCOVERED, *adapter.version)


def read_state(path: Path) -> State | None:
    """The state in a file; None if there is no file, or it holds no sound state."""
    try:
        if state := read_as(State, path):
            state = replace(state, state=Standing(state.state), words=tuple(state.words))
    except (ValueError, TypeError):
        return None
    return state if state and _is_sound(state) else None


def _is_sound(state: State) -> bool:
    """Whether each field has its type, on which lists rely."""
    whole = (state.size, state.mtime_ns, state.layers)
    maybe_whole = (state.config_size, state.config_mtime_ns, state.rank)
    hashes = (state.sha256, state.autov3)
    texts = (*hashes, state.reason, state.source, state.algorithm, state.base, state.file)
    return (
        all(type(value) is int for value in whole)
        and all(value is None or type(value) is int for value in maybe_whole)
        and all(value is None or isinstance(value, str) for value in texts)
        and all(isinstance(word, str) for word in state.words)
        and type(state.decided) is bool
        and type(state.at) in (int, float)
        and math.isfinite(state.at)
    )


def state_of(adapter: StoredAdapter) -> State:
    """What is known of an adapter now, read from the disk."""
    state = read_state(adapter.state_path)
    return state if state and state.version == adapter.version else unknown(adapter)


def put(adapter: StoredAdapter, state: State) -> State:
    """Writes a decision in place of any other state, and returns it. Raises: OSError.

    It does not wait for the disk: a state that a loss of power takes can be made again, and with a sync per
    file the first scan of thousands would take minutes.
    """
    state = replace(state, decided=True)
    write(adapter.root, adapter.state_path, state)
    return state


def put_if_unknown(adapter: StoredAdapter, state: State) -> State:
    """Writes what a scan saw unless the adapter has a state that fits it, and returns the one it has then.

    So a scan never undoes a decision. No file system writes a file only if another has certain contents. So a
    state of another version is moved away, and only then looked at: if it is a decision on this
    version, which a worker made just then, that one is written in place of the scan's, also over
    the state that another scan has written meanwhile. Raises: OSError.
    """
    folder, path = adapter.root / INCOMING, adapter.state_path
    folder.mkdir(exist_ok=True)
    with part_file(folder, path.name) as part, part_file(folder, path.name) as taken:
        part.write_text(json.dumps(asdict(state), indent=1))
        while _is_current(state.version, adapter) and not _linked(part, path):
            present = read_state(path)
            if present and not _outranks(state, present):
                return present
            with suppress(FileNotFoundError):  # another worker moved it away
                path.rename(taken)
                found = read_state(taken)
                if found and not _outranks(state, found):
                    state = found
                    taken.replace(part)
    return state


def _outranks(one: State, other: State) -> bool:
    """Whether a state is to replace another that is there already."""
    return one.version != other.version or (one.decided and not other.decided)


def _is_current(version: FileVersion, adapter: StoredAdapter) -> bool:
    """Whether the adapter on the disk has this version now."""
    now = adapter_at(adapter.root, adapter.path)
    return now is not None and now.version == version


def _linked(part: Path, path: Path) -> bool:
    """Gives a whole file a second name; False if that is taken. Raises: OSError."""
    try:
        os.link(part, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        if path.exists():
            return False
        part.replace(path)
    return True
