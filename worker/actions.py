"""The actions that a job may ask for instead of pictures: `{"input": {"action": NAME, …}}`."""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lora.errors import CodedError
from lora.fetch.sources import Reference, parse, redact_url
from lora.library.catalog import Catalog, Query, Standing
from lora.volume.loader import Loaded
from schemas import LORA_ENTRY, NAMES_NO_LORA, as_entry
from validation import InvalidInput, faults_of, filled
from worker.image_job import unused_keys
from worker.parts import Parts
from worker.selection import NONE, PRESET, Selection, ready, text_field

MAX_NAME = 100
"""Characters of a preset's name."""

Answer = dict[str, Any]

Fields = dict[str, dict[str, Any]]
"""Name of a field -> its rule in JSON Schema."""

_NAME = {"type": "string", "minLength": 1}

_FILE: Fields = {"name": {**_NAME, "description": "A file in the cache"}}

_PINNED: Fields = {
    "pinned": {"type": "boolean", "default": True, "description": "false takes the pin away"}
}

_ENTRY: Fields = {
    name: LORA_ENTRY["properties"][name]
    for name in ("path", "weight_name", "revision", "sha256", "refresh")
}

_SOURCES: Fields = {
    "loras": {
        "type": "array",
        "minItems": 1,
        "maxItems": 100,
        "description": "Sources, or objects with `path` as in a request for pictures",
    }
}

_LORA: Fields = {"name": {**_NAME, "description": "A LoRA's name, as library.list has it"}}

_PRESET_NAME: Fields = {"name": {**_NAME, "description": "What a job selects it by"}}


def _number(default: int, maximum: int, description: str) -> dict[str, Any]:
    limits = {"type": "integer", "minimum": 1, "maximum": maximum, "default": default}
    return {**limits, "description": description}


_QUERY: Fields = {
    "state": text_field("discovered, active or failed", enum=[*map(str, Standing), None]),
    "base": text_field("The family of models, such as SDXL"),
    "algorithm": text_field("lora, loha, lokr and so on"),
    "word": text_field("A trigger word"),
    "text": text_field("Anywhere in the name, the source or the trigger words"),
    "page": _number(1, 1_000_000, "Which page"),
    "per_page": _number(100, 1000, "How many on each"),
}


class Action(NamedTuple):
    """One row of the table of actions."""

    answer: Callable[[Mapping[str, Any]], Answer]
    """Takes the fields, checked and with their defaults. Raises: CodedError."""
    fields: Fields
    """The fields beside `action`."""
    required: str = ""
    """The name of the field that must be there, if one must."""

    @property
    def schema(self) -> dict[str, Any]:
        """The fields as JSON Schema."""
        return {"type": "object", "additionalProperties": False, "properties": self.fields}


def version() -> str:
    """The worker's version."""
    project = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    return str(tomllib.loads(project)["project"]["version"])


def action_of(job: object) -> str | None:
    """The action that a job asks for; None if it asks for pictures."""
    values = job.get("input") if isinstance(job, Mapping) else None
    return str(values["action"]) if isinstance(values, Mapping) and "action" in values else None


@dataclass(frozen=True)
class Actions:
    """Answers actions, without waiting for pictures to be drawn."""

    parts: Parts
    preloaded: Mapping[str, str]

    @property
    def table(self) -> dict[str, Action]:
        """Every action by its name."""
        library = _LibraryActions(self.parts.catalog, self.parts.selection)
        preset = {**_PRESET_NAME, **PRESET["properties"]}
        return {
            "health": Action(self._health, {}),
            "loras.list": Action(self._list, {}),
            "loras.prefetch": Action(self._prefetch, _SOURCES, "loras"),
            "loras.inspect": Action(self._inspect, _ENTRY, "path"),
            "loras.delete": Action(self._delete, _FILE, "name"),
            "loras.pin": Action(self._pin, {**_FILE, **_PINNED}, "name"),
            "library.scan": Action(library.scan, {}),
            "library.list": Action(library.page, _QUERY),
            "library.activate": Action(library.activate, _LORA, "name"),
            "library.deactivate": Action(library.deactivate, _LORA, "name"),
            "library.delete": Action(library.delete, _LORA, "name"),
            "presets.list": Action(library.presets, {}),
            "presets.set": Action(library.set_preset, preset, "name"),
            "presets.delete": Action(library.delete_preset, _PRESET_NAME, "name"),
        }

    def answer(self, job: Mapping[str, Any]) -> Answer:
        """The answer of an action. Raises: CodedError."""
        values, table = dict(job["input"]), self.table
        name = values.pop("action")
        if name not in table:
            raise InvalidInput("action is none of " + ", ".join(table))
        action = table[name]
        faults = list(faults_of(action.schema, values, ""))
        if action.required and action.required not in values:
            faults.append(f"{action.required} is required")
        if faults:
            raise InvalidInput("; ".join(faults), "See the README's table of actions.")
        return action.answer(filled(action.schema, values))

    def _health(self, _: Mapping[str, Any]) -> Answer:
        parts, cache = self.parts, self.parts.library.cache
        device = parts.pipeline.device
        memory: dict[str, float] = {}
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            memory = {"free_gb": round(free / 1e9, 2), "total_gb": round(total / 1e9, 2)}
        sizes = [adapter.version.size for adapter in cache.shelf.adapters()]
        free_disk = None
        with suppress(OSError):
            free_disk = round(shutil.disk_usage(cache.shelf.root).free / 1e9, 2)
        return {
            "version": version(),
            "model": parts.pipeline.name,
            "device": str(device),
            "memory": memory,
            "cache": {
                "files": len(sizes),
                "gb": round(sum(sizes) / 1e9, 3),
                "free_gb": free_disk,
                "trouble": cache.shelf.trouble,
            },
            "stacks": len(parts.engine.prepared),
            "stacks_gb": round(parts.engine.prepared.size / 1e9, 3),
            "preloaded": dict(self.preloaded),
        }

    def _list(self, _: Mapping[str, Any]) -> Answer:
        return {"loras": self.parts.library.cache.shelf.describe()}

    def _prefetch(self, values: Mapping[str, Any]) -> Answer:
        references, faults = [], []
        for index, given in enumerate(values["loras"]):
            entry = as_entry(given)
            schema = {"type": "object", "additionalProperties": False, "properties": _ENTRY}
            if entry is None:
                faults.append(f"loras[{index}] {NAMES_NO_LORA}")
                continue
            entry_faults = list(faults_of(schema, entry, f"loras[{index}]."))
            faults += entry_faults
            if not entry_faults:
                references.append(Reference(**filled(schema, entry)))
        if faults:
            raise InvalidInput("; ".join(faults))
        return {"loras": [_about(loaded) for loaded in self.parts.library.load_all(references)]}

    def _inspect(self, values: Mapping[str, Any]) -> Answer:
        loaded = self.parts.library.load(Reference(**values))
        file = loaded.file
        modules: dict[str, int] = {}
        for target in {layer.target for layer in file.layers}:
            modules[target.component] = modules.get(target.component, 0) + 1
        return {
            **_about(loaded),
            "modules": modules,
            "words": sorted({embedding.word for embedding in loaded.embeddings}),
            "used_keys": file.keys,
            "unused_keys": unused_keys(loaded),
            "warnings": list(loaded.warnings),
        }

    def _delete(self, values: Mapping[str, Any]) -> Answer:
        return {"deleted": self.parts.library.cache.delete(values["name"])}

    def _pin(self, values: Mapping[str, Any]) -> Answer:
        cache, name = self.parts.library.cache, values["name"]
        (cache.pin if values["pinned"] else cache.unpin)(name)
        return {"name": name, "pinned": values["pinned"]}


def _about(loaded: Loaded) -> Answer:
    """What every answer about a LoRA has."""
    return {
        "source": loaded.reference.shown,
        "file": loaded.entry.name,
        "sha256": loaded.file.sha256,
        "bytes": loaded.entry.record.size,
        "origin": "downloaded" if loaded.entry.downloaded else "cached",
        "algorithm": "+".join(loaded.file.algorithms),
        "rank": loaded.file.rank,
    }


@dataclass(frozen=True)
class _LibraryActions:
    """Answers the actions of the library and of the presets."""

    catalog: Catalog
    selection: Selection

    def scan(self, _: Mapping[str, Any]) -> Answer:
        scanned = self.catalog.scan()
        return {
            **{str(standing): scanned.standings.get(standing, 0) for standing in Standing},
            "looked_at": scanned.looked_at,
            "warnings": list(scanned.warnings),
        }

    def page(self, values: Mapping[str, Any]) -> Answer:
        page = self.catalog.page(Query(**values))
        return {
            "loras": [item.as_answer() for item in page.items],
            "total": page.total,
            "page": values["page"],
            "pages": page.pages,
        }

    def activate(self, values: Mapping[str, Any]) -> Answer:
        return self.catalog.activate(values["name"]).as_answer()

    def deactivate(self, values: Mapping[str, Any]) -> Answer:
        return self.catalog.deactivate(values["name"]).as_answer()

    def delete(self, values: Mapping[str, Any]) -> Answer:
        return {"deleted": self.catalog.delete(values["name"])}

    def presets(self, _: Mapping[str, Any]) -> Answer:
        sound, faults = {}, {}
        for name in sorted(self.selection.presets.read()):
            try:
                preset = self.selection.presets.find(name)
                ready(name, preset)
                sound[name] = _shown(preset)
            except CodedError as error:
                faults[name] = error.sentence
        default = self.selection.default_preset or None
        return {"presets": sound, "faults": faults, "default": default}

    def set_preset(self, values: Mapping[str, Any]) -> Answer:
        name = values["name"]
        preset = {field: value for field, value in values.items() if field != "name" and value}
        if name != name.strip() or not name.isprintable() or len(name) > MAX_NAME:
            raise InvalidInput(
                f"name: it is not up to {MAX_NAME} printable characters, or has blanks at its ends"
            )
        if name.lower() == NONE:
            raise InvalidInput(f"name: {NONE} is how a job says that it wants no preset")
        for use in ready(name, preset).loras:
            parse(use.lora)  # a source that means nothing is refused now, not in the first job
        self.selection.presets.set(name, preset)
        return {"name": name, **_shown(preset)}

    def delete_preset(self, values: Mapping[str, Any]) -> Answer:
        self.selection.presets.delete(values["name"])
        return {"deleted": values["name"]}


def _shown(preset: Mapping[str, Any]) -> Answer:
    """A preset without the query of its URLs, which may hold a token."""
    entries = [dict(as_entry(given) or {}) for given in preset.get("loras", [])]
    loras = [{**entry, "path": redact_url(str(entry.get("path")))} for entry in entries]
    return {**filled(PRESET, preset), "loras": loras}
