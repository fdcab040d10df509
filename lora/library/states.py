"""What is known of an adapter on the volume, in a file beside it: NAME.state.json.

A state belongs to one version of its adapter. One that does not fit the adapter, or cannot be read, counts as
none: so a state that a dead worker left, or one of a file that was changed, misleads nobody.
"""

from __future__ import annotations

import errno
import json
import math
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from lora.durable import part_file
from lora.volume.adapters import FileVersion, StoredAdapter, adapter_at
from lora.volume.records import INCOMING, write

NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)
"""Errors of a file system without hard links."""


class Standing(StrEnum):
    """How far an adapter was checked."""

    DISCOVERED = "discovered"
    """It lies there, and no fault is known yet."""
    ACTIVE = "active"
    """It was read whole, and every layer of it fits the worker's model."""
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
        values = json.loads(path.read_text())
        known = {field.name: values[field.name] for field in fields(State) if field.name in values}
        words = tuple(known.get("words", ()))
        state = State(**{**known, "state": Standing(known["state"]), "words": words})
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return state if _is_sound(state) else None


def _is_sound(state: State) -> bool:
    """Whether each field has its type, on which lists rely."""
    whole = (state.size, state.mtime_ns, state.layers)
    maybe_whole = (state.config_size, state.config_mtime_ns, state.rank)
    texts = ("reason", "sha256", "source", "algorithm", "base", "file")
    return (
        all(type(value) is int for value in whole)
        and all(value is None or type(value) is int for value in maybe_whole)
        and all(isinstance(getattr(state, name), (str, type(None))) for name in texts)
        and all(isinstance(word, str) for word in state.words)
        and type(state.at) in (int, float)
        and math.isfinite(state.at)
    )


def state_of(adapter: StoredAdapter) -> State:
    """What is known of an adapter now, read from the disk."""
    state = read_state(adapter.state_path)
    return state if state and state.version == adapter.version else unknown(adapter)


def put(adapter: StoredAdapter, state: State) -> None:
    """Writes a state, in place of whatever lies there. Raises: OSError.

    Without waiting for the disk: a state that a loss of power takes can be made again, and a sync per file
    would make the first scan of thousands take minutes.
    """
    write(adapter.root, adapter.state_path, state)


def put_if_unknown(adapter: StoredAdapter, state: State) -> State:
    """Writes a state unless there is one that fits the adapter, and returns the one that is there then: a
    scan never undoes a decision.

    A state of another version is taken away. If another worker wrote one of the version that lies there in
    that very moment, it is put back. Raises: OSError.
    """
    folder, path = adapter.root / INCOMING, adapter.state_path
    folder.mkdir(exist_ok=True)
    with part_file(folder, path.name) as part, part_file(folder, path.name) as taken:
        part.write_text(json.dumps(asdict(state), indent=1))
        while _lies_there(adapter.version, adapter) and not _linked(part, path):
            there = state_of(adapter)
            if there.at:
                return there
            with suppress(FileNotFoundError):  # another worker took it
                path.rename(taken)
                _put_back_if_wrong(taken, adapter)
    return state


def _put_back_if_wrong(taken: Path, adapter: StoredAdapter) -> None:
    """Puts a state that was taken away back if it is of the version that lies there."""
    path, lost = adapter.state_path, read_state(taken)
    if lost and _lies_there(lost.version, adapter) and not _linked(taken, path):
        there = read_state(path)
        if there is None or there.version != lost.version:
            taken.replace(path)


def _lies_there(version: FileVersion, adapter: StoredAdapter) -> bool:
    """Whether an adapter is of this version now."""
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


def as_answer(state: State) -> dict[str, Any]:
    """A state as answers show it: JSON-safe, without the adapter's version."""
    values = asdict(replace(state, words=()))
    for name in FileVersion._fields:
        del values[name]
    return {**values, "state": str(state.state), "words": list(state.words)}
