"""What a job may ask for beside pictures: `{"input": {"action": NAME, …}}`."""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora.fetch.sources import Reference
from lora.volume.loader import Loaded
from lora.volume.records import told_of
from schemas import LORA_ENTRY, NAMES_NO_LORA, as_entry
from validation import InvalidInput, faults_of, filled
from worker.image_job import unused_keys
from worker.library_actions import SCHEMAS as LIBRARY_SCHEMAS
from worker.library_actions import LibraryActions
from worker.parts import Parts

_ENTRY = {
    name: LORA_ENTRY["properties"][name]
    for name in ("path", "weight_name", "revision", "sha256", "refresh")
}

_NAME = {"name": {"type": "string", "minLength": 1, "description": "A file in the cache"}}

SCHEMAS: dict[str, dict[str, Any]] = {
    "health": {"required": [], "properties": {}},
    "loras.list": {"required": [], "properties": {}},
    "loras.prefetch": {
        "required": ["loras"],
        "properties": {
            "loras": {
                "type": "array",
                "minItems": 1,
                "maxItems": 100,
                "description": "Sources, or objects with `path` as in a request for pictures",
            }
        },
    },
    "loras.inspect": {"required": ["path"], "properties": _ENTRY},
    "loras.delete": {"required": ["name"], "properties": _NAME},
    "loras.pin": {
        "required": ["name"],
        "properties": {
            **_NAME,
            "pinned": {
                "type": "boolean",
                "default": True,
                "description": "false takes the pin away",
            },
        },
    },
    **LIBRARY_SCHEMAS,
}
"""Action -> the schema of its other fields."""

Answer = dict[str, Any]


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
    """Answers actions. None of them waits for the drawing."""

    parts: Parts
    preloaded: Mapping[str, str]

    def answer(self, job: Mapping[str, Any]) -> Answer:
        """The answer of an action. Raises: CodedError."""
        values = dict(job["input"])
        name = values.pop("action")
        known: dict[str, Callable[[Mapping[str, Any]], Answer]] = {
            "health": self._health,
            "loras.list": self._list,
            "loras.prefetch": self._prefetch,
            "loras.inspect": self._inspect,
            "loras.delete": self._delete,
            "loras.pin": self._pin,
            **LibraryActions(self.parts.catalog, self.parts.selection).known,
        }
        if name not in known:
            raise InvalidInput("action is none of " + ", ".join(known))
        schema = {"type": "object", "additionalProperties": False, **SCHEMAS[name]}
        faults = list(faults_of(schema, values, ""))
        faults += [f"{field} is required" for field in schema["required"] if field not in values]
        if faults:
            raise InvalidInput("; ".join(faults), "See the README's table of actions.")
        return known[name](filled(schema, values))

    def _health(self, _: Mapping[str, Any]) -> Answer:
        parts, cache = self.parts, self.parts.library.cache
        device = parts.pipeline.device
        memory: dict[str, float] = {}
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            memory = {"free_gb": round(free / 1e9, 2), "total_gb": round(total / 1e9, 2)}
        files = cache.shelf.files()
        free_disk = None
        with suppress(OSError):
            free_disk = round(shutil.disk_usage(cache.shelf.root).free / 1e9, 2)
        return {
            "version": version(),
            "model": parts.pipeline.name,
            "device": str(device),
            "memory": memory,
            "cache": {
                "files": len(files),
                "gb": round(sum(file.stat().st_size for file in files) / 1e9, 3),
                "free_gb": free_disk,
                "trouble": cache.shelf.trouble,
            },
            "stacks": len(parts.engine.prepared),
            "stacks_gb": round(parts.engine.prepared.size / 1e9, 3),
            "preloaded": dict(self.preloaded),
        }

    def _list(self, _: Mapping[str, Any]) -> Answer:
        shelf = self.parts.library.cache.shelf
        found = [told_of(shelf.root_of(path), path) for path in shelf.files()]
        return {"loras": [one for one in found if one]}

    def _prefetch(self, values: Mapping[str, Any]) -> Answer:
        references, faults = [], []
        for index, given in enumerate(values["loras"]):
            entry = as_entry(given)
            schema = {"type": "object", "additionalProperties": False, "properties": _ENTRY}
            if entry is None:
                faults.append(f"loras[{index}] {NAMES_NO_LORA}")
                continue
            found = list(faults_of(schema, entry, f"loras[{index}]."))
            faults += found
            if not found:
                references.append(Reference(**filled(schema, entry)))
        if faults:
            raise InvalidInput("; ".join(faults))
        return {"loras": [_about(one) for one in self.parts.library.load_all(references)]}

    def _inspect(self, values: Mapping[str, Any]) -> Answer:
        loaded = self.parts.library.load(Reference(**values))
        file = loaded.file
        modules: dict[str, int] = {}
        for target in {layer.target for layer in file.layers}:
            modules[target.component] = modules.get(target.component, 0) + 1
        return {
            **_about(loaded),
            "modules": modules,
            "words": sorted({one.word for one in loaded.embeddings}),
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
