"""The actions of the library: `{"input": {"action": "library.scan"}}` and the like."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lora.errors import CodedError
from lora.fetch.sources import parse, redact_url
from lora.library.catalog import Catalog, Query, Standing
from schemas import as_entry
from validation import InvalidInput, filled
from worker.selection import NONE, PRESET, Selection, ready

Answer = dict[str, Any]

_NAME = {"type": "string", "minLength": 1}

_LORA = {"name": {**_NAME, "description": "A LoRA's name, as library.list has it"}}

_PRESET_NAME = {"name": {**_NAME, "description": "What a job selects it by"}}

MAX_NAME = 100
"""Characters of a preset's name."""


def _filter(description: str, **more: Any) -> dict[str, Any]:
    return {"type": ["string", "null"], "default": None, "description": description, **more}


def _number(default: int, maximum: int, description: str) -> dict[str, Any]:
    limits = {"type": "integer", "minimum": 1, "maximum": maximum, "default": default}
    return {**limits, "description": description}


SCHEMAS: dict[str, dict[str, Any]] = {
    "library.scan": {"required": [], "properties": {}},
    "library.list": {
        "required": [],
        "properties": {
            "state": _filter("discovered, active or failed", enum=[*map(str, Standing), None]),
            "base": _filter("The family of models, such as SDXL"),
            "algorithm": _filter("lora, loha, lokr and so on"),
            "word": _filter("A trigger word"),
            "text": _filter("Anywhere in the name, the source or the trigger words"),
            "page": _number(1, 1_000_000, "Which page"),
            "per_page": _number(100, 1000, "How many on each"),
        },
    },
    "library.activate": {"required": ["name"], "properties": _LORA},
    "library.deactivate": {"required": ["name"], "properties": _LORA},
    "library.delete": {"required": ["name"], "properties": _LORA},
    "presets.list": {"required": [], "properties": {}},
    "presets.set": {
        "required": ["name"],
        "properties": {**_PRESET_NAME, **PRESET["properties"]},
    },
    "presets.delete": {"required": ["name"], "properties": _PRESET_NAME},
}
"""Action -> the schema of its other fields."""


@dataclass(frozen=True)
class LibraryActions:
    """Answers the library's actions. Values that come in fit `SCHEMAS`, defaults filled in."""

    catalog: Catalog
    selection: Selection

    @property
    def known(self) -> dict[str, Callable[[Mapping[str, Any]], Answer]]:
        """Action -> what answers it. Each raises CodedError."""
        return {
            "library.scan": self._scan,
            "library.list": self._list,
            "library.activate": self._activate,
            "library.deactivate": self._deactivate,
            "library.delete": self._delete,
            "presets.list": self._presets,
            "presets.set": self._set_preset,
            "presets.delete": self._delete_preset,
        }

    def _scan(self, _: Mapping[str, Any]) -> Answer:
        scanned = self.catalog.scan()
        return {
            **{str(standing): scanned.standings.get(standing, 0) for standing in Standing},
            "looked_at": scanned.looked_at,
            "warnings": list(scanned.warnings),
        }

    def _list(self, values: Mapping[str, Any]) -> Answer:
        page = self.catalog.page(Query(**values))
        return {
            "loras": [item.as_answer() for item in page.items],
            "total": page.total,
            "page": values["page"],
            "pages": page.pages,
        }

    def _activate(self, values: Mapping[str, Any]) -> Answer:
        return self.catalog.activate(values["name"]).as_answer()

    def _deactivate(self, values: Mapping[str, Any]) -> Answer:
        return self.catalog.deactivate(values["name"]).as_answer()

    def _delete(self, values: Mapping[str, Any]) -> Answer:
        return {"deleted": self.catalog.delete(values["name"])}

    def _presets(self, _: Mapping[str, Any]) -> Answer:
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

    def _set_preset(self, values: Mapping[str, Any]) -> Answer:
        name = values["name"]
        preset = {field: value for field, value in values.items() if field != "name" and value}
        if name != name.strip() or not name.isprintable() or len(name) > MAX_NAME:
            raise InvalidInput(
                f"name: it is not up to {MAX_NAME} printable characters, or has blanks at its ends"
            )
        if name.lower() == NONE:
            raise InvalidInput(f"name: {NONE} is how a job says that it wants no preset")
        for use in ready(name, preset).loras:
            parse(use.lora)  # what can mean nothing is told now, and not to the first job
        self.selection.presets.set(name, preset)
        return {"name": name, **_shown(preset)}

    def _delete_preset(self, values: Mapping[str, Any]) -> Answer:
        self.selection.presets.delete(values["name"])
        return {"deleted": values["name"]}


def _shown(preset: Mapping[str, Any]) -> Answer:
    """A preset as it may be shown: its URLs may hold a token."""
    loras = []
    for given in preset.get("loras", []):
        entry = dict(as_entry(given) or {})
        loras.append({**entry, "path": redact_url(str(entry.get("path")))})
    return {**filled(PRESET, preset), "loras": loras}
