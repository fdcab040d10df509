"""The actions that a job may ask for instead of pictures: `{"input": {"action": NAME, …}}`."""

from __future__ import annotations

import functools
import shutil
import tomllib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from entries import LORA_ENTRY, NAMES_NO_LORA, as_entry
from lora.errors import CodedError
from lora.fetch.redaction import redact_url
from lora.fetch.sources import Reference, parse
from lora.fetch.transfers import Report
from lora.library.catalog import Query, Standing
from lora.volume.loader import Loaded
from validation import (
    InvalidInput,
    faults_of,
    field,
    filled,
    number,
    renamed,
)
from worker import adapter_actions
from worker.parts import Answer, Parts
from worker.reports import about, unused_keys
from worker.selection import NONE, PRESET, ready

MAX_NAME = 100
"""Characters of a preset's name."""

Fields = dict[str, dict[str, Any]]
"""Name of a field -> its rule in JSON Schema."""


def _name(description: str) -> Fields:
    return {"name": {"type": "string", "minLength": 1, "description": description}}


_FILE = _name("Name of a file in the cache")

_PINNED = field("boolean", True, "`false` removes the pin")

_ENTRY: Fields = {
    name: LORA_ENTRY["properties"][name]
    for name in ("path", "weight_name", "revision", "sha256", "refresh")
}

_SOURCES: Fields = {
    "loras": {
        "type": "array",
        "minItems": 1,
        "maxItems": 100,
        "description": "Sources, or objects with `path`, `weight_name`, `revision`, `sha256` and `refresh`",
    }
}

_LORA = _name("Name of the LoRA in `library.list`")

_PRESET_NAME = _name("Name by which a job selects the preset")


_QUERY: Fields = {
    "state": field(
        "string|null", None, "State of the adapters to list", enum=[*map(str, Standing), None]
    ),
    "base": field("string|null", None, "Family of the base model, such as `SDXL`"),
    "algorithm": field("string|null", None, "Algorithm, such as `lora`, `loha` or `lokr`"),
    "word": field("string|null", None, "Trigger word that the adapters have"),
    "text": field(
        "string|null",
        None,
        "Text that stands anywhere in the name, the source, the trigger words or the note",
    ),
    "page": number("integer", 1, (1, 1_000_000), "Number of the page"),
    "per_page": number("integer", 100, (1, 1000), "Adapters on each page"),
}


class Action(NamedTuple):
    """One row of the table of actions."""

    answer: Callable[[Mapping[str, Any]], Answer]
    """Takes the fields, checked and with their defaults. Raises: CodedError."""
    fields: Fields
    """The fields beside `action`."""
    required: str = ""
    """The one field that must be there, if any."""


def _schema(fields: Fields) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "properties": fields}


@functools.cache
def version() -> str:
    """The worker's version, read once: a full table of files must not end `health`."""
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
    report: Report | None = None
    """Takes the progress of downloads."""

    @property
    def table(self) -> dict[str, Action]:
        """Every action by its name."""
        catalog, cache = self.parts.catalog, self.parts.library.cache

        def by_name(answer: Callable[[str], Answer], fields: Fields = _LORA) -> Action:
            return Action(lambda values: answer(values["name"]), fields, "name")

        return {
            "health": Action(self._health, {}),
            "loras.list": Action(lambda _: {"loras": cache.shelf.describe()}, {}),
            "loras.prefetch": Action(self._prefetch, _SOURCES, "loras"),
            "loras.inspect": Action(self._inspect, _ENTRY, "path"),
            "loras.delete": by_name(lambda name: {"deleted": cache.delete(name)}, _FILE),
            "loras.pin": Action(self._pin, {**_FILE, "pinned": _PINNED}, "name"),
            "library.scan": Action(self._scan, {}),
            "library.list": Action(self._page, _QUERY),
            "library.activate": by_name(lambda name: catalog.activate(name).as_answer()),
            "library.deactivate": by_name(lambda name: catalog.deactivate(name).as_answer()),
            "library.delete": by_name(lambda name: {"deleted": catalog.delete(name)}),
            **{
                action: Action(answer, {**_LORA, **fields} if needs == "name" else fields, needs)
                for action, (answer, fields, needs) in adapter_actions.rows(self.parts).items()
            },
            "presets.list": Action(self._presets, {}),
            "presets.set": Action(self._set, {**_PRESET_NAME, **PRESET["properties"]}, "name"),
            "presets.delete": by_name(self._delete_preset, _PRESET_NAME),
        }

    def answer(self, job: Mapping[str, Any]) -> Answer:
        """The answer of an action. Raises: CodedError."""
        given, table = dict(job["input"]), self.table
        name = given.pop("action")
        if not isinstance(name, str) or name not in table:
            raise InvalidInput("action must be one of " + ", ".join(table))
        action, schema = table[name], _schema(table[name].fields)
        values, renames, faults = renamed(schema, given, "")
        faults += faults_of(schema, values, "")
        if action.required and action.required not in values:
            faults.append(f"{action.required} is required")
        if faults:
            raise InvalidInput(
                "; ".join(faults), "docs/requests.md lists the actions and their fields."
            )
        return _warned(action.answer(filled(schema, values)), renames)

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
            "start": {name: round(value, 3) for name, value in parts.seconds.items()},
            "memory": memory,
            "cache": {
                "files": len(sizes),
                "gb": round(sum(sizes) / 1e9, 3),
                "free_gb": free_disk,
                "trouble": parts.volume_trouble,
            },
            "stacks": len(parts.engine.prepared),
            "stacks_gb": round(parts.engine.prepared.size / 1e9, 3),
            "preloaded": dict(self.preloaded),
        }

    def _prefetch(self, values: Mapping[str, Any]) -> Answer:
        references, warnings, faults, schema = [], list[str](), list[str](), _schema(_ENTRY)
        for index, value in enumerate(values["loras"]):
            entry, renames, broken = as_entry(value, schema, f"loras[{index}].")
            warnings, faults = warnings + renames, faults + broken
            if not entry and not broken:
                faults.append(f"loras[{index}] {NAMES_NO_LORA}")
            elif not broken:
                references.append(Reference(**filled(schema, entry)))
        if faults:
            raise InvalidInput("; ".join(faults))
        loaded = self.parts.library.load_all(references, self.report)
        return _warned({"loras": [_about(lora) for lora in loaded]}, warnings)

    def _inspect(self, values: Mapping[str, Any]) -> Answer:
        (loaded,) = self.parts.library.load_all([Reference(**values)], self.report)
        file = loaded.file
        targets = {layer.target for layer in file.layers}
        return {
            **_about(loaded),
            "modules": dict(Counter(target.component for target in targets)),
            "words": sorted({embedding.word for embedding in loaded.embeddings}),
            "used_keys": file.keys,
            "unused_keys": unused_keys(loaded),
            "warnings": list(loaded.warnings),
        }

    def _pin(self, values: Mapping[str, Any]) -> Answer:
        cache, name = self.parts.library.cache, values["name"]
        (cache.pin if values["pinned"] else cache.unpin)(name)
        return {"name": name, "pinned": values["pinned"]}

    def _scan(self, _: Mapping[str, Any]) -> Answer:
        scanned = self.parts.catalog.scan()
        return {
            **{str(standing): scanned.standings.get(standing, 0) for standing in Standing},
            "looked_at": scanned.looked_at,
            "warnings": list(scanned.warnings),
        }

    def _page(self, values: Mapping[str, Any]) -> Answer:
        page = self.parts.catalog.page(Query(**values))
        return {
            "loras": [item.as_answer() for item in page.items],
            "total": page.total,
            "page": values["page"],
            "pages": page.pages,
        }

    def _presets(self, _: Mapping[str, Any]) -> Answer:
        selection, sound, faults = self.parts.selection, {}, {}
        for name in sorted(selection.presets.read()):
            try:
                preset = selection.presets.find(name)
                ready(name, preset)
                sound[name] = _shown(preset)
            except CodedError as error:
                faults[name] = error.sentence
        return {"presets": sound, "faults": faults, "default": selection.default_preset or None}

    def _set(self, values: Mapping[str, Any]) -> Answer:
        name = values["name"]
        preset = {key: value for key, value in values.items() if key != "name" and value}
        if name != name.strip() or not name.isprintable() or len(name) > MAX_NAME:
            raise InvalidInput(
                f"name: it must have at most {MAX_NAME} printable characters, and no blanks at its ends"
            )
        if name.lower() == NONE:
            raise InvalidInput(f"name: {NONE} means no preset, and cannot be the name of one")
        checked = ready(name, preset)
        for use in checked.loras:
            parse(use.lora)  # a source that means nothing is refused now, not in the first job
        self.parts.selection.presets.set(name, preset)
        return _warned({"name": name, **_shown(preset)}, checked.warnings)

    def _delete_preset(self, name: str) -> Answer:
        self.parts.selection.presets.delete(name)
        return {"deleted": name}


def _warned(answer: Answer, warnings: Sequence[str]) -> Answer:
    """The answer with these warnings before its own."""
    return {**answer, "warnings": [*warnings, *answer.get("warnings", [])]} if warnings else answer


def _about(loaded: Loaded) -> Answer:
    """What every answer about a LoRA has."""
    return {**about(loaded), "bytes": loaded.entry.record.size}


def _shown(preset: Mapping[str, Any]) -> Answer:
    """A preset without the query of its URLs, which may hold a token."""
    entries = [as_entry(value, LORA_ENTRY, "")[0] for value in preset.get("loras", [])]
    loras = [{**entry, "path": redact_url(str(entry.get("path")))} for entry in entries]
    return {**filled(PRESET, preset), "loras": loras}
