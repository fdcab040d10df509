"""Calls of the file system that fail at random: the file that was there serves, and nothing is left over."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from handler import Worker
from lora.errors import CodedError
from lora.fetch.sources import Reference
from lora.volume.cache import Limits, VolumeCache
from lora.volume.records import DAMAGED, INCOMING
from tests.adapters import as_bytes, kohya
from tests.promises.attackers.rounds import Rounds
from tests.server import LOOPBACK, LoopbackServer

CALLS = (
    *((os, name) for name in ("fsync", "utime", "open", "scandir", "link", "rename")),
    *((Path, name) for name in ("open", "replace", "rename", "mkdir", "stat", "unlink", "touch")),
)

ERRORS = (
    *(errno.ENOSPC, errno.EIO, errno.EMFILE, errno.EROFS, errno.ESTALE),
    *(errno.EACCES, errno.EDQUOT),
)


class Killed(BaseException):
    """Ends a worker there and then."""


def fail_once(patch: pytest.MonkeyPatch, number: int, why: BaseException) -> list[str]:
    """Of the CALLS from now on, the one of this number fails. Returns their names, as they are called."""
    called: list[str] = []

    def failing(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            called.append(name)
            if len(called) == number:
                raise why
            return real(*args, **options)

        return call

    for owner, name in CALLS:
        patch.setattr(owner, name, failing(name, getattr(owner, name)))
    return called


def test_no_failing_call_loses_the_file_that_was_there(
    tmp_path: Path, server: LoopbackServer, rounds: Rounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies = [as_bytes(kohya(seed=seed)) for seed in range(2)]
    limits, url = Limits(tries=1, pause=0.01, ttl=0), server.url("/x.safetensors")
    for chance in rounds(60, 3000):
        root = tmp_path / str(rounds.done)
        server.serve("/x.safetensors", bodies[0])
        cache = VolumeCache(root, limits, LOOPBACK)
        old = cache.get(cache.resolve(Reference(url)))
        server.serve("/x.safetensors", bodies[1])
        failures = [OSError(code, os.strerror(code)) for code in ERRORS]
        why = chance.choice((Killed(), *failures))
        number = chance.randint(1, 80)
        with monkeypatch.context() as patch:
            called = fail_once(patch, number, why)
            seen = None
            try:
                worker = VolumeCache(root, limits, LOOPBACK)
                seen = worker.get(worker.resolve(Reference(url)))
            except (Killed, CodedError) as error:
                rounds.seen[f"ended by {type(error).__name__}"] += 1
        if seen:
            rounds.seen["served"] += 1
            assert seen.path.read_bytes() in bodies
        server.serve("/x.safetensors", b"", status=500)
        served = VolumeCache(root, limits, LOOPBACK)
        entry = served.get(served.resolve(Reference(url)))
        assert entry.path == old.path
        assert entry.path.read_bytes() in bodies
        assert not list((root / DAMAGED).glob("*"))
        cannot_be_removed = called[number - 1 : number] == ["unlink"]
        if not cannot_be_removed:  # else the next process does it
            assert not [path for path in (root / INCOMING).iterdir() if path.suffix == ".part"]


def test_no_failing_call_makes_an_action_internal_or_loses_presets(
    demo_worker: Worker, rounds: Rounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(action: str, **fields: Any) -> Any:
        return demo_worker({"id": "x", "input": {"action": action, **fields}})

    def kept() -> Any:
        return ask("presets.list")["presets"]

    assert "error" not in ask("presets.set", name="good", loras=["demo-stripes"])
    good = json.dumps(kept()["good"])
    assert "version" in ask("health")  # which reads the program's own file, once
    actions = ("presets.set", "presets.delete", "library.scan", "library.list", "loras.list")
    more = ("loras.pin", "loras.inspect", "health", "library.activate", "library.deactivate")
    for chance in rounds(60, 3000):
        action, name = chance.choice((*actions, *more)), "demo-stripes"
        fields: dict[str, Any] = {"name": name} if action[-1] == "e" or "pin" in action else {}
        if action.startswith("presets"):
            fields = {"name": "other"} | ({"loras": [name]} if action.endswith("set") else {})
        if action == "loras.inspect":
            fields = {"path": name}
        code = chance.choice(ERRORS)
        with monkeypatch.context() as patch:
            fail_once(patch, chance.randint(1, 60), OSError(code, os.strerror(code)))
            answer = ask(action, **fields)
        rounds.seen["errors" if "error" in answer else "answers"] += 1
        assert not answer.get("error", "").startswith("INTERNAL"), (action, code, answer)
        assert json.dumps(kept()["good"]) == good
    with suppress(KeyError):
        ask("presets.delete", name="good")
        ask("presets.delete", name="other")
    assert not [path for path in ask("loras.list")["loras"] if "error" in path]
