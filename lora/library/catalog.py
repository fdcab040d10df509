"""The volume's LoRAs as a library: what is there, what was checked, what failed and why.

The files on the disk are the truth; each has its state beside it. Many workers may scan, activate and delete
at the same time without a lock: each state is whole and belongs to one version of its adapter. A state keeps
no job from using a LoRA: it only says what would happen.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath

from lora.durable import published
from lora.errors import CacheFull, LoraCorrupt, LoraError, LoraNotFound, nearest
from lora.fetch.redaction import redact_url
from lora.formats.names.keys import KeyMap
from lora.library.activation import Activation, header_of, refuse_half_a_folder
from lora.library.notes import Note, put_note, read_note
from lora.library.query import TRAINING, Item, Page, Query, Scanned
from lora.library.states import Standing, State, put, put_if_unknown, read_state, state_of, unknown
from lora.library.summary import summarised
from lora.volume.adapters import (
    STATE,
    TRAINING_STATE,
    StoredAdapter,
    adapters_in,
    delete,
    preview_of,
    states_in,
)
from lora.volume.cache import VolumeCache
from lora.volume.folders import Folders
from lora.volume.records import INCOMING, Record, read_as, record_path, write_errors_as

__all__ = ["TRAINING", "Catalog", "Item", "Page", "Query", "Scanned", "Standing"]

ORPHAN_SECONDS = 86_400.0
"""The age at which the state of a removed adapter is removed: by then nobody puts the adapter back."""


class Catalog:
    """The adapters of the cache's folders and of a folder that trainers write to."""

    def __init__(
        self, cache: VolumeCache, key_map: KeyMap, training: Path | None = None, model: str = ""
    ) -> None:
        """`model`: the name of the worker's base model, which is compared with that of a PEFT config."""
        self._shelf = cache.shelf
        self._activation = Activation(cache, key_map, model)
        self._training = (
            Folders(training, None, stale_after=2 * cache.limits.timeout) if training else None
        )
        self._items_before: dict[str, Item] = {}

    def page(self, query: Query) -> Page:
        """The adapters on the disk that fit the query. Changes nothing."""
        return query.page_of(self._items())

    def scan(self) -> Scanned:
        """Reads the header of each adapter that is new or changed, and writes down its state.

        `failed` is an adapter whose header shows a fault: not whole, or half of a PEFT folder. An activated
        one stays active. The warnings say how many states cannot be written.
        """
        standings, troubles, looked_at = Counter[str](), Counter[str](), 0
        warnings = self._prepare_training()
        for item in self._items():
            state = item.state
            if not state.at:
                looked_at += 1
                try:
                    state = self._glance(item.adapter)
                    state = put_if_unknown(item.adapter, state)
                except FileNotFoundError:
                    continue  # removed just now
                except OSError as error:
                    troubles[error.strerror or "?"] += 1
            standings[state.state] += 1
        self._remove_orphans()
        warnings += [f"{count} states could not be kept ({why})" for why, count in troubles.items()]
        return Scanned(standings, looked_at, tuple(warnings))

    def _prepare_training(self) -> list[str]:
        """Removes leftovers of dead workers in the training folder; a warning if there is no such folder."""
        if self._training and not self._training.root.is_dir():
            return ["the training folder (LORA_TRAINING_DIR) is not there"]
        with suppress(OSError):  # read-only: the warnings count the states that cannot be written
            if self._training:
                self._training.prepare()
        return []

    def _items(self) -> Iterator[Item]:
        """Every adapter. Where neither the adapter nor its state changed, no file is read again."""
        items: dict[str, Item] = {}
        for adapter in self._adapters():
            name = self._name(adapter)
            item = self._items_before.get(name)
            if item is None or item.adapter != adapter:
                state = state_of(adapter) if adapter.state_version else unknown(adapter)
                note = read_note(adapter.note_path) if adapter.note_version else None
                known = adapter.record_version and not state.sha256
                record = _record(adapter) if known else None
                item = Item(name, adapter, state, record.sha256 if record else None, note)
            items[name] = item
            yield item
        self._items_before = items

    def _adapters(self) -> Iterator[StoredAdapter]:
        seen = set[str]()
        for root in self._shelf.roots:
            for adapter in adapters_in(root):
                if adapter.path not in seen:  # of two with this path, a job gets the volume's
                    seen.add(adapter.path)
                    yield adapter
        if self._training:
            yield from adapters_in(self._training.root, skip=TRAINING_STATE)

    def _name(self, adapter: StoredAdapter) -> str:
        return f"{TRAINING}{adapter.path}" if self._is_training(adapter) else adapter.path

    def _is_training(self, adapter: StoredAdapter) -> bool:
        return self._training is not None and adapter.root == self._training.root

    def find(self, name: str) -> StoredAdapter:
        """The adapter of this name in lists or jobs. Raises: LoraNotFound, SourceInvalid."""
        path = name.removeprefix(TRAINING)
        shelf = self._shelf if path == name else self._training
        sound = path.isprintable() and ".." not in PurePosixPath(path).parts
        if shelf and sound and (adapter := shelf.adapter(path)):
            return adapter
        names = [self._name(adapter) for adapter in self._adapters()]
        hint = nearest(name, names) or f"The library has {len(names)} LoRAs."
        raise LoraNotFound(f"the library has no LoRA {redact_url(name)!r}", hint)

    def _glance(self, adapter: StoredAdapter) -> State:
        """The state that the header shows. Raises: OSError."""
        state = replace(unknown(adapter), at=time.time())
        if self._is_training(adapter):
            state = replace(state, source=self._name(adapter))
        elif record := _record(adapter):
            state = replace(state, source=record.source, sha256=record.sha256)
        try:
            refuse_half_a_folder(adapter)
            header = header_of(adapter.root / str(adapter.weights))
        except LoraError as error:
            return replace(state, state=Standing.FAILED, reason=error.sentence)
        return summarised(state, header) if header else state

    def _remove_orphans(self) -> None:
        """Removes the states of adapters that were removed by hand; only what a worker wrote as a state."""
        roots = (*self._shelf.roots, *([self._training.root] if self._training else []))
        for path in [path for root in roots for path in states_in(root)]:
            with suppress(OSError):  # another worker removed it
                is_orphan = not path.with_name(path.name.removesuffix(STATE)).exists()
                old = time.time() - path.stat().st_mtime > ORPHAN_SECONDS
                if is_orphan and old and read_state(path):
                    path.unlink()

    def activate(self, name: str) -> Item:
        """Checks all that a load needs, and writes down the outcome: `active`, or `failed` with its reason.

        `active`: the weights are whole and hold no NaN, and every layer fits the worker's model. A PEFT
        folder has its config, and the config names the worker's base model, a folder that exists, or none.
        An adapter of the training folder is then published in the cache, under a name for jobs (`file`).

        Raises: LoraNotFound, SourceInvalid; CacheFull if nothing can be written, LoraCorrupt if the adapter
        changes meanwhile: then nothing is decided.
        """
        adapter = self.find(name)
        full_name = self._name(adapter)
        try:
            state = self._activation.of(adapter, full_name, publish=self._is_training(adapter))
        except CacheFull:
            raise
        except LoraError as error:
            state = replace(unknown(adapter), at=time.time())
            with suppress(OSError):
                state = self._glance(adapter)
            state = replace(state, state=Standing.FAILED, reason=error.sentence)
        if self.find(full_name).version != adapter.version:
            raise LoraCorrupt(f"{full_name} was changed while it was checked", "Try again.")
        return self._decided(adapter, state)

    def deactivate(self, name: str) -> Item:
        """Sets an adapter's state back to `discovered`; its file stays, and so does a published copy.

        Raises: LoraNotFound, SourceInvalid, CacheFull.
        """
        adapter = self.find(name)
        state = replace(state_of(adapter), state=Standing.DISCOVERED, reason=None, at=time.time())
        return self._decided(adapter, state)

    def delete(self, name: str) -> str:
        """Removes an adapter and all that belongs to it, and returns its full name. Other files stay.

        A job that has already read it is not disturbed. Raises: LoraNotFound, SourceInvalid, CacheFull.
        """
        adapter = self.find(name)
        with write_errors_as(f"{name} cannot be deleted"):
            delete(adapter)
        return self._name(adapter)

    def note(self, name: str, note: Note) -> Item:
        """Writes what a person says of an adapter; an empty note removes the one that is there.

        Raises: LoraNotFound, SourceInvalid, CacheFull.
        """
        adapter = self.find(name)
        with write_errors_as(f"the note on {name} cannot be written"):
            put_note(adapter, note)
        return self._item(adapter, state_of(adapter))

    def thumbnail(self, name: str, picture: bytes | None) -> Item:
        """Puts a thumbnail, a WebP picture, beside an adapter, or removes the one that was put there.

        Raises: LoraNotFound, SourceInvalid, CacheFull.
        """
        adapter = self.find(name)
        with write_errors_as(f"the thumbnail of {name} cannot be written"):
            if picture is None:
                adapter.thumbnail_path.unlink(missing_ok=True)
            else:
                folder = adapter.root / INCOMING
                folder.mkdir(exist_ok=True)
                with published(adapter.thumbnail_path, folder, synced=False) as part:
                    part.write_bytes(picture)
        return self._item(adapter, state_of(adapter))

    def preview(self, name: str) -> Path | None:
        """The file of an adapter's preview; None if it has none. Raises: LoraNotFound, SourceInvalid."""
        adapter = self.find(name)
        preview = preview_of(adapter)
        return adapter.root / preview.path if preview else None

    def _decided(self, adapter: StoredAdapter, state: State) -> Item:
        name = self._name(adapter)
        hint = "The volume may be full or read-only."
        with write_errors_as(f"the state of {name} cannot be written", hint):
            return self._item(adapter, put(adapter, state))

    def _item(self, adapter: StoredAdapter, state: State) -> Item:
        """An adapter that did not come from a list, with all that lies beside it."""
        adapter, record = adapter._replace(preview=preview_of(adapter)), _record(adapter)
        note, sha256 = read_note(adapter.note_path), record.sha256 if record else None
        return Item(self._name(adapter), adapter, state, sha256, note)


def _record(adapter: StoredAdapter) -> Record | None:
    """The adapter's record, if it belongs to the bytes that are there now."""
    if adapter.weights is None:
        return None
    record = read_as(Record, record_path(adapter.root / adapter.weights))
    return record.of(*adapter.version[:2]) if record else None
