"""The volume's LoRAs as a library: what is there, what was checked, what failed and why.

The files on the disk are the truth; beside each lies its state. Whoever scans, activates or deletes at the
same time, on however many workers, each state is whole and belongs to one version of its adapter, and no
lock is needed for that. A state keeps no job from using a LoRA: it tells what a job would be told.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path, PurePosixPath

from lora.errors import CacheFull, LoraCorrupt, LoraError, LoraNotFound, nearest
from lora.formats.names.keys import KeyMap
from lora.library.activation import Activation
from lora.library.checks import header_of, refuse_half_a_folder
from lora.library.files import STATE, TRAINING_STATE, Adapter, adapter_at, adapters_in
from lora.library.query import TRAINING, Item, Page, Query, Scanned
from lora.library.states import (
    Standing,
    State,
    put,
    put_if_unknown,
    state_of,
    unknown,
)
from lora.library.summary import summarise
from lora.volume.cache import VolumeCache
from lora.volume.records import Record, pin_path, read_as, record_path
from lora.volume.shelf import Shelf

__all__ = ["TRAINING", "Catalog", "Item", "Page", "Query", "Scanned", "Standing"]

ORPHAN_SECONDS = 86_400.0
"""How old the state of an adapter that is gone must be to be removed: nobody is about to put it back."""


class Catalog:
    """The adapters of the cache's folders and of a folder that trainers write to."""

    def __init__(
        self, cache: VolumeCache, key_map: KeyMap, training: Path | None = None, model: str = ""
    ) -> None:
        """`model`: what the worker's base model is called, to compare a PEFT config's with."""
        self._shelf = cache.shelf
        self._activation = Activation(cache, key_map, model)
        self._training = (
            Shelf(training, None, stale_after=2 * cache.limits.timeout) if training else None
        )
        self._known: dict[str, Item] = {}

    # --- looking ---------------------------------------------------------------------------------

    def page(self, query: Query) -> Page:
        """The adapters that fit, as they lie on the disk now. Changes nothing."""
        return query.page_of(self._items())

    def find(self, name: str) -> Item:
        """One adapter, by its name in lists or as a job would name it.

        Raises: LoraNotFound, with the nearest names; SourceInvalid if the name leads out of the folders.
        """
        adapter = self._find(name)
        return Item(self._name(adapter), adapter, state_of(adapter))

    def scan(self) -> Scanned:
        """Looks at the header of each adapter that is new or changed, and writes down its state.

        `failed` is what already the header shows: not whole, or half of a PEFT folder. What was activated
        stays so. A state that cannot be written is told in the warnings.
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
        """Sweeps what dead workers left in the training folder; a warning if there is no such folder."""
        if self._training is None:
            return []
        if not self._training.root.is_dir():
            return ["the training folder (LORA_TRAINING_DIR) is not there"]
        with suppress(OSError):  # read-only: each state that cannot be written says so
            self._training.prepare()
        return []

    def _items(self) -> Iterator[Item]:
        """Every adapter. Nothing is read of those that are, with their states, as they were the last time."""
        now: dict[str, Item] = {}
        for adapter in self._adapters():
            name = self._name(adapter)
            item = self._known.get(name)
            if item is None or item.adapter != adapter:
                state = state_of(adapter) if adapter.state_version else unknown(adapter)
                item = Item(name, adapter, state)
            now[name] = item
            yield item
        self._known = now

    def _adapters(self) -> Iterator[Adapter]:
        seen = set[str]()
        for root in self._shelf.roots:
            for adapter in adapters_in(root):
                if adapter.path not in seen:  # a job gets the volume's, too
                    seen.add(adapter.path)
                    yield adapter
        if self._training:
            yield from adapters_in(self._training.root, skip=TRAINING_STATE)

    def _name(self, adapter: Adapter) -> str:
        return f"{TRAINING}{adapter.path}" if self._is_training(adapter) else adapter.path

    def _is_training(self, adapter: Adapter) -> bool:
        return self._training is not None and adapter.root == self._training.root

    def _find(self, name: str) -> Adapter:
        path = name.removeprefix(TRAINING)
        shelf = self._shelf if path == name else self._training
        if shelf and path.isprintable() and ".." not in PurePosixPath(path).parts:
            existing = shelf.existing(path)
            if existing:
                root = shelf.root_of(existing)
                found = adapter_at(root, str(existing.relative_to(root)))
            else:  # a PEFT folder without weights
                places = [] if path.startswith("/") else shelf.roots
                found = next((one for root in places if (one := adapter_at(root, path))), None)
            if found:
                return found
        names = [self._name(adapter) for adapter in self._adapters()]
        hint = nearest(name, names) or f"The library has {len(names)} LoRAs."
        raise LoraNotFound(f"the library has no LoRA {name!r}", hint)

    def _glance(self, adapter: Adapter) -> State:
        """The state that the header alone shows. Raises: OSError."""
        state = replace(unknown(adapter), at=time.time())
        if self._is_training(adapter):
            state = replace(state, source=self._name(adapter))
        elif adapter.weights:
            record = read_as(Record, record_path(adapter.root / adapter.weights))
            if record and (record.size, record.mtime_ns) == adapter.stamp[:2]:
                state = replace(state, source=record.source, sha256=record.sha256)
        try:
            refuse_half_a_folder(adapter)
            header = header_of(adapter.root / str(adapter.weights))
        except LoraError as error:
            return replace(state, state=Standing.FAILED, reason=error.sentence)
        return replace(state, **asdict(summarise(header))) if header else state

    def _remove_orphans(self) -> None:
        """The states of adapters that were evicted or removed by hand."""
        roots = (*self._shelf.roots, *([self._training.root] if self._training else []))
        for path in [path for root in roots for path in root.rglob(f"*{STATE}")]:
            gone = not path.with_name(path.name.removesuffix(STATE)).exists()
            with suppress(OSError):  # another worker removed it
                if gone and time.time() - path.stat().st_mtime > ORPHAN_SECONDS:
                    path.unlink()

    # --- deciding --------------------------------------------------------------------------------

    def activate(self, name: str) -> Item:
        """Checks all that a load needs, and writes down the outcome: `active`, or `failed` with its reason.

        The weights are whole and hold no NaN, and every layer fits the worker's model; a PEFT folder has its
        config, whose base model is the worker's, or a folder that exists, or not told. An adapter of the
        training folder is published in the cache's folder then, for jobs to name (`file`).

        Raises: LoraNotFound, SourceInvalid; CacheFull if nothing can be written, LoraCorrupt if it changes
        meanwhile: then nothing is decided.
        """
        adapter = self._find(name)
        called = self._name(adapter)
        try:
            state = self._activation.of(adapter, called, publish=self._is_training(adapter))
        except CacheFull:
            raise
        except LoraError as error:
            state = replace(unknown(adapter), at=time.time())
            with suppress(OSError):
                state = self._glance(adapter)
            state = replace(state, state=Standing.FAILED, reason=error.sentence)
        if self._find(called).stamp != adapter.stamp:
            raise LoraCorrupt(f"{called} was changed while it was checked", "Try again.")
        return self._decided(adapter, state)

    def deactivate(self, name: str) -> Item:
        """Takes an adapter's state back to `discovered`; its file stays, and so does a published copy.

        Raises: LoraNotFound, SourceInvalid, CacheFull.
        """
        adapter = self._find(name)
        state = replace(state_of(adapter), state=Standing.DISCOVERED, reason=None, at=time.time())
        return self._decided(adapter, state)

    def delete(self, name: str) -> str:
        """Removes an adapter and all that belongs to it; its full name. What else a folder holds stays.

        A job that has it read already is not disturbed. Raises: LoraNotFound, SourceInvalid, CacheFull.
        """
        adapter = self._find(name)
        # The state first: what is written after that belongs to what comes after. Weights before their
        # config, so that nobody reads them without it.
        gone = [adapter.state_path]
        if adapter.weights:
            weights = adapter.root / adapter.weights
            gone += [weights, record_path(weights), pin_path(weights)]
        if adapter.config:
            gone.append(adapter.root / adapter.config)
        try:
            for path in gone:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise CacheFull(f"{name} cannot be deleted ({error.strerror})") from error
        if adapter.is_folder:
            with suppress(OSError):  # something else is in it
                (adapter.root / adapter.path).rmdir()
        return self._name(adapter)

    def _decided(self, adapter: Adapter, state: State) -> Item:
        name = self._name(adapter)
        try:
            put(adapter, state)
        except OSError as error:
            words = f"the state of {name} cannot be written ({error.strerror})"
            raise CacheFull(words, "The volume may be full or read-only.") from error
        return Item(name, adapter, state)
