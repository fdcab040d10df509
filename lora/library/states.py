"""What is known of an adapter on the volume, in a file beside it: NAME.state.json.

A state belongs to one version of its adapter. One that does not fit the adapter, or cannot be read, counts as
none: so a state that a dead worker left, or one of a file that was changed, tells nobody anything wrong.
"""

from __future__ import annotations

import errno
import json
import math
import os
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from lora.library.files import Adapter, Stamp, adapter_at
from lora.volume.records import INCOMING, write

NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)
"""What a file system without hard links says."""


class Standing(StrEnum):
    """How far an adapter has come."""

    DISCOVERED = "discovered"
    """It lies there, and nothing speaks against it yet."""
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
    """When this was found out, in seconds since 1970."""
    reason: str | None = None
    """Why it failed, in one sentence."""
    sha256: str | None = None
    source: str | None = None
    """Where it came from, as it may be shown."""
    algorithm: str | None = None
    rank: int | None = None
    base: str | None = None
    """The family of models that it is for, or the one that its config names."""
    words: tuple[str, ...] = ()
    """What triggers it, as far as its metadata tells."""
    layers: int = 0
    """How many modules it changes."""
    file: str | None = None
    """Where a training folder's adapter was published: its name for jobs."""

    @property
    def stamp(self) -> Stamp:
        """The version that it is of."""
        return Stamp(self.size, self.mtime_ns, self.config_size, self.config_mtime_ns)


def unknown(adapter: Adapter) -> State:
    """The state of an adapter of which nothing is known."""
    stamp = adapter.stamp
    return State(
        Standing.DISCOVERED,
        stamp.size,
        stamp.mtime_ns,
        stamp.config_size,
        stamp.config_mtime_ns,
    )


def read_state(path: Path) -> State | None:
    """The state in a file; None if there is none, or none that makes sense."""
    try:
        values = json.loads(path.read_text())
        known = {one.name: values[one.name] for one in fields(State) if one.name in values}
        state = State(
            **{**known, "state": Standing(known["state"]), "words": tuple(known.get("words", ()))}
        )
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return state if _is_sound(state) else None


def _is_sound(state: State) -> bool:
    """Whether each field has its own type: whoever lists states may rely on it."""
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


def state_of(adapter: Adapter) -> State:
    """What is known of an adapter now, read from the disk."""
    state = read_state(adapter.state_path)
    return state if state and state.stamp == adapter.stamp else unknown(adapter)


def put(adapter: Adapter, state: State) -> None:
    """Writes a state, in place of whatever lies there. Raises: OSError.

    Not synced: what a loss of power takes can be found out again, and a sync per file would make the first
    scan of thousands take minutes.
    """
    write(adapter.root, adapter.state_path, state)


def put_if_unknown(adapter: Adapter, state: State) -> State:
    """Writes a state unless there is one that fits the adapter, and returns the one that is there then: who
    looks never undoes what was decided.

    A state of another version is taken away. Should another worker have written one of the version that lies
    there in that very moment, it is put back. Raises: OSError.
    """
    folder, path = adapter.root / INCOMING, adapter.state_path
    part, taken = (folder / f"{uuid.uuid4().hex}.part" for _ in range(2))
    folder.mkdir(exist_ok=True)
    try:
        part.write_text(json.dumps(asdict(state), indent=1))
        while _lies_there(adapter.stamp, adapter) and not _linked(part, path):
            found = state_of(adapter)
            if found.at:
                return found
            with suppress(FileNotFoundError):  # another worker took it
                path.rename(taken)
                _put_back_if_wrong(taken, adapter)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
    return state


def _put_back_if_wrong(taken: Path, adapter: Adapter) -> None:
    """Removes a state that was taken away, or puts it back if it is of the version that lies there."""
    path, lost = adapter.state_path, read_state(taken)
    if lost and _lies_there(lost.stamp, adapter) and not _linked(taken, path):
        there = read_state(path)
        if there is None or there.stamp != lost.stamp:
            taken.replace(path)
            return
    taken.unlink()


def _lies_there(stamp: Stamp, adapter: Adapter) -> bool:
    """Whether an adapter is of this version now."""
    now = adapter_at(adapter.root, adapter.path)
    return now is not None and now.stamp == stamp


def _linked(part: Path, path: Path) -> bool:
    """Gives a whole file a second name, unless that is taken. Raises: OSError."""
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
    """What an answer says of a state: JSON-safe, without what only this module needs."""
    values = asdict(replace(state, words=()))
    for name in ("size", "mtime_ns", "config_size", "config_mtime_ns"):
        del values[name]
    return {**values, "state": str(state.state), "words": list(state.words)}
