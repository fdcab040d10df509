"""Begins to read the weights while the program still imports its libraries; itself imports little."""

from __future__ import annotations

from collections.abc import Mapping

from pipelines.weights import Reading, read_ahead
from settings import Settings, SettingsError
from text_settings import TextSettings


def begin_reading(environ: Mapping[str, str]) -> Reading:
    """Reads what the environment's settings name; nothing where they are wrong, as the start then says."""
    try:
        kind = TextSettings if environ.get("WORKER_KIND", "").strip() == "text" else Settings
        return read_ahead(kind.from_env(environ))
    except SettingsError:
        return Reading([])
