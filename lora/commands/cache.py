"""`cache list|add|verify|evict|pin|delete`: the LoRAs in the folder of `--dir` or `LORA_CACHE_DIR`."""

from __future__ import annotations

import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora.commands.shared import add_json, byte_count, bytes_of, progress, size, table
from lora.errors import CodedError, LoraCorrupt, LoraError, ToolError

if TYPE_CHECKING:
    from lora.volume.cache import VolumeCache

SUMMARY = "look after the LoRAs on the volume: list, add, verify, evict, pin, delete"

EXAMPLE = "cache list"


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument(
        "--dir",
        type=Path,
        metavar="FOLDER",
        help="folder of the cache; by default LORA_CACHE_DIR, or else /models/loras",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="list every file with its source, size, last use and pin")
    add = actions.add_parser("add", help="fetch LoRAs into the cache, as a job would")
    add.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="whatever a job may name: a URL, a repo on Hugging Face, civitai:ID",
    )
    verify = actions.add_parser(
        "verify", help="hash every file, and compare it with what was recorded"
    )
    verify.add_argument("--remove", action="store_true", help="set damaged files aside, for a day")
    evict = actions.add_parser("evict", help="remove what was not used for the longest time")
    evict.add_argument(
        "--to",
        type=byte_count,
        metavar="SIZE",
        help="how much may stay, such as 5G; by default LORA_CACHE_MAX_GB",
    )
    pin = actions.add_parser("pin", help="keep files from being evicted")
    pin.add_argument("--off", action="store_true", help="take the pin away")
    delete = actions.add_parser("delete", help="remove files, their records and pins")
    for action in (pin, delete):
        action.add_argument(
            "names", nargs="+", metavar="NAME", help="name of a file, as `cache list` shows it"
        )
    for action in actions.choices.values():
        add_json(action)


def run(options: Namespace) -> Mapping[str, Any]:
    """Does the action. Raises: CodedError."""
    cache = _opened(options.dir)
    actions: dict[str, Callable[[VolumeCache, Namespace], Mapping[str, Any]]] = {
        "list": _list,
        "add": _add,
        "verify": _verify,
        "evict": _evict,
        "pin": _pin,
        "delete": _delete,
    }
    return {"action": options.action, **actions[options.action](cache, options)}


def _opened(folder: Path | None) -> VolumeCache:
    from lora.volume.opening import open_cache

    try:
        return open_cache(folder)
    except ValueError as error:
        hint = "docs/settings.md lists the environment variables."
        raise ToolError(f"the environment cannot be used: {error}", hint) from None


def _list(cache: VolumeCache, _: Namespace) -> Mapping[str, Any]:
    return {"root": str(cache.shelf.root), "loras": cache.shelf.describe()}


def _add(cache: VolumeCache, options: Namespace) -> Mapping[str, Any]:
    from lora.fetch.sources import Reference

    added, errors = [], []
    with progress() as on_progress:
        for source in options.sources:
            reference = Reference(source)
            on_bytes = bytes_of(reference.shown, on_progress)
            try:
                entry = cache.get(cache.resolve(reference), on_bytes)
            except LoraError as error:
                errors.append(_naming(error, reference.shown))
            else:
                added.append(
                    {
                        "source": reference.shown,
                        "name": entry.name,
                        "sha256": entry.record.sha256,
                        "bytes": entry.record.size,
                        "downloaded": entry.downloaded,
                        "warnings": list(entry.warnings),
                    }
                )
    return {"loras": added, "errors": errors}


def _naming(error: CodedError, shown: str) -> str:
    """The text of the error, with the source that it concerns."""
    if shown in error.sentence:
        return str(error)
    return str(type(error)(f"{shown}: {error.sentence}", error.hint))


def _verify(cache: VolumeCache, options: Namespace) -> Mapping[str, Any]:
    checked = cache.shelf.verify()
    damaged = [name for name, whole in checked.items() if not whole]
    removed = []
    for name in damaged if options.remove else []:
        for root in cache.shelf.roots:
            if (root / name).is_file() and cache.shelf.set_aside(root / name):
                removed.append(name)
    hint = "--remove sets it aside; a job fetches it again."
    left = [name for name in damaged if name not in removed]
    errors = [str(LoraCorrupt(f"{name} is damaged", hint)) for name in left]
    return {"checked": len(checked), "damaged": damaged, "removed": removed, "errors": errors}


def _evict(cache: VolumeCache, options: Namespace) -> Mapping[str, Any]:
    from lora.volume.room import Room

    budget = cache.limits.total_bytes if options.to is None else options.to
    if budget is None:
        raise ToolError("it is not said how much may stay", "Give --to, or set LORA_CACHE_MAX_GB.")
    before = {path: path.stat().st_size for path in cache.shelf.files()}
    for root in cache.shelf.roots:
        if root.is_dir():
            Room(budget).make(root, 0, 0)
    gone = {path: count for path, count in before.items() if not path.exists()}
    names = [str(path.relative_to(cache.shelf.root_of(path))) for path in gone]
    return {"evicted": names, "bytes": sum(gone.values())}


def _pin(cache: VolumeCache, options: Namespace) -> Mapping[str, Any]:
    if options.off:
        return _each(options.names, cache.unpin, "pin taken away")
    return _each(options.names, cache.pin, "pinned")


def _delete(cache: VolumeCache, options: Namespace) -> Mapping[str, Any]:
    return _each(options.names, cache.delete, "deleted")


def _each(names: list[str], act: Callable[[str], object], done: str) -> Mapping[str, Any]:
    """Calls `act` for every name; an error with one is reported, and the others go on."""
    succeeded, errors = [], []
    for name in names:
        try:
            act(name)
            succeeded.append(name)
        except LoraError as error:
            errors.append(str(error))
    return {"done": done, "names": succeeded, "errors": errors}


def show(result: Mapping[str, Any]) -> str:
    """A table of the files, or what was done."""
    action = result["action"]
    if action == "list":
        lines = _show_list(result)
    elif action == "add":
        lines = _show_added(result)
    elif action == "verify":
        counts = (len(result[name]) for name in ("damaged", "removed"))
        lines = ["{} files checked, {} damaged, {} set aside".format(result["checked"], *counts)]
    elif action == "evict":
        names = result["evicted"]
        lines = [*names, f"{len(names)} files evicted, {size(result['bytes'])}"]
    else:
        lines = [f"{name}: {result['done']}" for name in result["names"]]
    return "\n".join(lines)


def _show_list(result: Mapping[str, Any]) -> list[str]:
    from lora.tools.adapters.metadata import clean

    rows = [
        (
            clean(entry["name"], 100),
            size(entry["bytes"]),
            _date(entry["used"]),
            "pinned" if entry["pinned"] else "",
            clean(entry["source"], 80) if entry["downloaded"] else "put here by hand",
        )
        for entry in result["loras"]
    ]
    total = sum(entry["bytes"] for entry in result["loras"])
    head = ("name", "size", "last used", "", "source")
    return [
        *(table([head, *rows]) if rows else []),
        f"{len(rows)} files, {size(total)}, in {result['root']}",
    ]


def _show_added(result: Mapping[str, Any]) -> list[str]:
    lines = []
    for entry in result["loras"]:
        how = "downloaded" if entry["downloaded"] else "was there"
        lines.append(f"{entry['source']} -> {entry['name']} ({size(entry['bytes'])}, {how})")
        lines += [f"  note: {warning}" for warning in entry["warnings"]]
    return lines


def _date(seconds: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds)) if seconds else "never"
