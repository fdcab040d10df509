"""Named stacks of LoRAs on the volume, and LightX2V's config files.

`presets.json` in the cache's folder is one JSON object: name -> preset, an object with `loras` as in a job,
and perhaps `prompt_prefix`, `prompt_suffix`, `trigger_words`, `description`. People may edit it by hand: it
is read anew each time. This module reads and writes it; `worker.selection` checks the presets.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora.durable import published
from lora.errors import CacheFull, LoraCorrupt, LoraNotFound, LoraTooLarge, ToolError, nearest
from lora.fetch.redaction import redact_url
from lora.formats.names.blocks import MAX_SCALE
from lora.volume.lease import Lease
from lora.volume.records import INCOMING, write_errors_as

FILE = "presets.json"

MAX_BYTES = 10_000_000
"""Of presets.json, and of a config file."""

SILENCE, PATIENCE, POLL = 10.0, 30.0, 0.02
"""Seconds of silence after which a writer counts as dead; that a change waits; between two tries."""

Preset = Mapping[str, Any]


@dataclass(frozen=True)
class Presets:
    """The presets of one volume."""

    root: Path
    """The cache's folder on the volume: never the fallback, which no other worker sees."""
    lease: Callable[[Path, float], Lease] = Lease

    @property
    def path(self) -> Path:
        """The file that holds them."""
        return self.root / FILE

    def read(self) -> dict[str, Any]:
        """Name -> value, which need not be a preset; empty if there is no file.

        Raises: LoraCorrupt, with line and column, if the file is no JSON object.
        """
        return self._read()[1]

    def find(self, name: str) -> Preset:
        """The preset of that name. Raises: LoraNotFound, with near names; LoraCorrupt if it is no object."""
        presets = self.read()
        if name not in presets:
            names = sorted(presets)
            listed = f"There are: {', '.join(names[:20])}." if names else "There are none."
            raise LoraNotFound(
                f"there is no preset {redact_url(name)!r}", nearest(name, names) or listed
            )
        if not isinstance(presets[name], dict):
            raise LoraCorrupt(f"{FILE}: {name} is not an object", "Mend it on the volume.")
        return dict(presets[name])

    def set(self, name: str, preset: Preset) -> None:
        """Writes a preset, in place of one with its name; the others stay.

        Raises: CacheFull if it cannot be written; LoraTooLarge if nobody could read it then; LoraCorrupt if
        the file is no JSON object, and is left so.
        """
        self._change(lambda presets: {**presets, name: dict(preset)})

    def delete(self, name: str) -> None:
        """Removes a preset. Raises: LoraNotFound, CacheFull, LoraCorrupt."""
        self.find(name)
        self._change(
            lambda presets: {key: preset for key, preset in presets.items() if key != name}
        )

    def _read(self) -> tuple[bytes, dict[str, Any]]:
        try:
            if self.path.stat().st_size > MAX_BYTES:
                raise LoraCorrupt(f"{FILE} is over {MAX_BYTES // 1_000_000} MB")
            data = self.path.read_bytes()
        except FileNotFoundError:
            return b"", {}
        except OSError as error:
            raise LoraCorrupt(f"{FILE} cannot be read ({error.strerror})") from error
        fault = "it is not an object of name -> preset"
        try:
            presets = json.loads(data)
        except json.JSONDecodeError as error:
            presets, fault = None, f"line {error.lineno}, column {error.colno} is no JSON"
        except (ValueError, RecursionError):
            presets, fault = None, "it is no UTF-8 text, or nested without end"
        if not isinstance(presets, dict):
            raise LoraCorrupt(f"{FILE} cannot be used: {fault}", "Mend it on the volume.")
        return data, presets

    def _change(self, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """Reads, changes and writes while no other worker does, as far as the lease can ensure that.

        If the file system gives the lease to several, another worker's change is noticed right before the
        file is replaced.
        """
        folder, full = self.root / INCOMING, "The volume may be full, read-only or gone."
        too_late = CacheFull(f"{FILE} is being changed by other workers", "Try again later.")
        lease = self.lease(folder / f"{FILE}.lease", SILENCE)
        with write_errors_as(f"{FILE} cannot be written", full):
            folder.mkdir(parents=True, exist_ok=True)
            lease.wait(lambda: None, time.monotonic() + PATIENCE, POLL, too_late)
            with lease, published(self.path, folder) as part:
                data = None
                while data is None or self._read()[0] != data:
                    data, presets = self._read()
                    text = json.dumps(change(presets), indent=1)
                    if len(text) > MAX_BYTES:
                        raise LoraTooLarge(
                            f"{FILE} would be over {MAX_BYTES // 1_000_000} MB, and unreadable",
                            "Shorten the preset, or delete others.",
                        )
                    part.write_text(text)


def read_config(path: Path) -> tuple[dict[str, Any], ...]:
    """The LoRAs that a config file of LightX2V names, as entries `{"path", "scale"}`; none if it names none.

    Its forms (LightX2V's docs, "lora_deploy"): `{"lora_path": PATH or [PATH, …], "strength_model": 1.0}`, and
    `{"lora_configs": [{"path": PATH, "strength": 1.0}, …]}`. Other fields are ignored.
    Raises: ToolError.
    """
    try:
        config = json.loads(path.read_bytes()) if path.stat().st_size <= MAX_BYTES else None
    except OSError as error:
        raise ToolError(f"{path.name} cannot be read ({error.strerror})") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ToolError(f"{path.name}: {where} is no JSON") from error
    except (ValueError, RecursionError) as error:
        raise ToolError(f"{path.name} is no JSON text") from error
    if not isinstance(config, dict):
        raise ToolError(f"{path.name} is not a JSON object", CONFIG_HINT)
    paths, configs = config.get("lora_path") or [], config.get("lora_configs") or []
    if paths and configs:
        raise ToolError(f"{path.name} has both lora_path and lora_configs", "Keep one of them.")
    where, field = f"{path.name}: lora_configs", "strength"
    if paths:
        where, field = f"{path.name}: lora_path", "strength_model"
        paths = [paths] if isinstance(paths, str) else paths
        if not isinstance(paths, list):
            raise ToolError(f"{where} is neither a path nor a list", CONFIG_HINT)
        configs = [{"path": item, "strength": config.get(field, 1.0)} for item in paths]
    if not isinstance(configs, list):
        raise ToolError(f"{where} is not a list", CONFIG_HINT)
    return tuple(_entry(item, f"{where}[{index}]", field) for index, item in enumerate(configs))


CONFIG_HINT = 'Write {"lora_configs": [{"path": "…", "strength": 1.0}]}.'


def _entry(config: object, where: str, field: str) -> dict[str, Any]:
    """`field`: what the file calls the strength."""
    if not isinstance(config, dict):
        raise ToolError(f"{where} is not an object", CONFIG_HINT)
    path, scale = config.get("path"), config.get("strength", 1.0)
    if not isinstance(path, str) or not path.strip():
        raise ToolError(f"{where} names no LoRA", CONFIG_HINT)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise ToolError(f"{where}: {field} is not a number", CONFIG_HINT)
    if not abs(scale) <= MAX_SCALE:  # NaN, too
        limits = f"between {-MAX_SCALE} and {MAX_SCALE}"
        raise ToolError(f"{where}: {field} is not {limits}", CONFIG_HINT)
    return {"path": path.strip(), "scale": float(scale)}


def cached_names(entries: tuple[dict[str, Any], ...], root: Path) -> tuple[dict[str, Any], ...]:
    """The entries as a job may name them: a path to a file in the cache's folder becomes its name there.

    Raises: ToolError for any other path on the disk: a worker serves only what lies in its cache.
    """

    def name_of(path: str) -> str:
        if not path.startswith(("/", "~", "./", "../")):
            return path
        named = Path(path)
        with suppress(RuntimeError):  # there is no such user
            named = named.expanduser()
        # Not `resolve`, which raises RuntimeError for links in a circle.
        file, folder = os.path.realpath(named), os.path.realpath(root)
        if Path(file).is_relative_to(folder):
            return str(Path(file).relative_to(folder))
        sentence = f"{Path(path).name} does not lie in the LoRA cache"
        raise ToolError(sentence, "Put it into LORA_CACHE_DIR, or name a URL or a repo.")

    return tuple({**entry, "path": name_of(entry["path"])} for entry in entries)
