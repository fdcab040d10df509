"""What answers the actions of the library and of the presets; `worker.actions` has their table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora.errors import CodedError
from lora.fetch.sources import parse, redact_url
from lora.library.catalog import Catalog, Query, Standing
from schemas import as_entry
from validation import InvalidInput, filled
from worker.selection import NONE, PRESET, Selection, ready

Answer = dict[str, Any]

MAX_NAME = 100
"""Characters of a preset's name."""


@dataclass(frozen=True)
class LibraryActions:
    """Methods that answer one action each. `values` fit the action's fields. Each raises CodedError."""

    catalog: Catalog
    selection: Selection

    def scan(self, _: Mapping[str, Any]) -> Answer:
        """How many adapters have each state, once new and changed ones were looked at."""
        scanned = self.catalog.scan()
        return {
            **{str(standing): scanned.standings.get(standing, 0) for standing in Standing},
            "looked_at": scanned.looked_at,
            "warnings": list(scanned.warnings),
        }

    def page(self, values: Mapping[str, Any]) -> Answer:
        """One page of the adapters that fit the filters."""
        page = self.catalog.page(Query(**values))
        return {
            "loras": [item.as_answer() for item in page.items],
            "total": page.total,
            "page": values["page"],
            "pages": page.pages,
        }

    def activate(self, values: Mapping[str, Any]) -> Answer:
        """The adapter with its new state."""
        return self.catalog.activate(values["name"]).as_answer()

    def deactivate(self, values: Mapping[str, Any]) -> Answer:
        """The adapter with its new state."""
        return self.catalog.deactivate(values["name"]).as_answer()

    def delete(self, values: Mapping[str, Any]) -> Answer:
        """The full name of the adapter that was removed."""
        return {"deleted": self.catalog.delete(values["name"])}

    def presets(self, _: Mapping[str, Any]) -> Answer:
        """The presets, and the faults of those that have one."""
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
        """The preset that was written, if it has no fault."""
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
        """The name of the preset that was removed."""
        self.selection.presets.delete(values["name"])
        return {"deleted": values["name"]}


def _shown(preset: Mapping[str, Any]) -> Answer:
    """A preset without the query of its URLs, which may hold a token."""
    entries = [dict(as_entry(given) or {}) for given in preset.get("loras", [])]
    loras = [{**entry, "path": redact_url(str(entry.get("path")))} for entry in entries]
    return {**filled(PRESET, preset), "loras": loras}
