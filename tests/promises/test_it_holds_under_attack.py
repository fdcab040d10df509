"""Attackers that try to break promises at random; a failure names its seed.

A few rounds each here. `make attack` gives each ATTACK_SECONDS and a new ATTACK_SEED, and writes figures to
ATTACK_FIGURES.
"""

from __future__ import annotations

import errno
import io
import json
import os
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from PIL import Image

from handler import Worker
from lora.errors import CodedError, LoraError
from lora.fetch.civitai import Civitai
from lora.fetch.hub import Hub
from lora.fetch.redaction import redact_url
from lora.fetch.rules import WebRules, is_public, origin_of
from lora.fetch.sources import CivitaiFile, HubFile, Reference, RemoteFile, parse
from lora.fetch.web import Web
from lora.formats.pickles import convert
from lora.volume.cache import Limits, VolumeCache
from lora.volume.records import DAMAGED, INCOMING
from tests.adapters import as_bytes, kohya
from tests.server import LOOPBACK, LoopbackServer
from tests.test_handler import job
from validation import InvalidInput
from worker.inputs import load_picture

SECONDS = float(os.environ.get("ATTACK_SECONDS", "0"))
SEED = int(os.environ.get("ATTACK_SEED", "19"))

Rounds = Callable[[int], Iterator[random.Random]]


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> Iterator[Rounds]:
    """Gives the chance of each round, whose number and seed a failure shows, and writes down how many."""
    done, begun = [0], time.monotonic()

    def until_done(least: int) -> Iterator[random.Random]:
        while done[0] < least or time.monotonic() - begun < SECONDS:
            done[0] += 1
            print(f"seed {SEED}, round {done[0]}")
            yield random.Random(f"{SEED} {done[0]}")

    yield until_done
    if path := os.environ.get("ATTACK_FIGURES"):
        file = Path(path)
        figures = json.loads(file.read_text()) if file.exists() else {}
        figures["seed"] = SEED
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        seconds = round(time.monotonic() - begun)
        figures[request.node.name] = {"rounds": done[0], "seconds": seconds, "peak_mb": peak}
        file.write_text(json.dumps(figures, indent=1) + "\n")


def garbled(chance: random.Random, data: bytes) -> bytes:
    """The data with a few bytes changed, cut, repeated or put in."""
    whole = bytearray(data)
    for _ in range(chance.randint(1, 8)):
        place = chance.randrange(len(whole) + 1)
        length = chance.choice((1, 1, 2, 8, 200))
        piece = bytes(chance.choice((0, 255, 128, chance.randrange(256))) for _ in range(length))
        whole[place : place + chance.choice((0, length))] = chance.choice(
            (piece, bytes(whole[place : place + length]) * 2, b"")
        )
    return bytes(whole)


# --- sources and hubs --------------------------------------------------------------------------------

PIECES = (
    *(
        "https://",
        "http:/",
        "hf://",
        "civitai:1",
        "//",
        "/",
        "@",
        ":",
        "?",
        "#",
        "&",
        ";",
        "=",
        "\\",
    ),
    *(
        "user/repo",
        "h.example",
        "127.0.0.1",
        "[::1]",
        "u:p@",
        "%3F",
        "%00",
        "\n",
        " ",
        "..",
        "é",
        "://",
    ),
    *("f.safetensors", "token=", "X-Amz-Signature=", "next=https://x/", "@v1", "+2", "\ud800"),
)


def test_no_link_shows_the_value_of_its_query_or_its_password(rounds: Rounds) -> None:
    for chance in rounds(3000):
        before, after = ("".join(chance.choices(PIECES, k=chance.randint(0, 5))) for _ in range(2))
        mark = chance.choice(("?token=", "?a=1&k=", "#", "?x=https://y/?z="))
        text = f"{before}{mark}canary{after}"
        shown = redact_url(text)
        with suppress(LoraError):
            try:
                location = parse(Reference(text))
                shown += getattr(location, "shown", "")
            except LoraError as error:
                shown += str(error)
        assert "canary" not in shown, text


def test_no_address_that_embeds_a_private_one_is_public(rounds: Rounds) -> None:
    import ipaddress

    private = [ipaddress.ip_network(net) for net in ("10.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16")]
    prefixes = (0xFFFF << 32, 0xFFFF << 48, 0x64FF9B << 96, 0x2600 << 112 | 0x5EFE << 32, 0)
    for chance in rounds(2000):
        net = chance.choice(private)
        inner = int(net.network_address) + chance.randrange(net.num_addresses)
        made = chance.choice(prefixes) | inner
        assert not is_public(str(ipaddress.ip_address(inner)))
        assert not is_public(str(ipaddress.IPv6Address(made))), hex(made)
        assert not is_public(str(ipaddress.IPv6Address(0x2002 << 112 | inner << 80)))


def test_no_answer_of_a_hub_does_harm(server: LoopbackServer, rounds: Rounds) -> None:
    file = {"rfilename": "x.safetensors", "size": 5, "lfs": {"sha256": "a" * 64, "size": 5}}
    file |= {"name": "x.safetensors", "id": 3, "type": "Model", "hashes": {"SHA256": "a" * 64}}
    file |= {"downloadUrl": "http://127.0.0.1:9/x?token=canary"}
    sound = json.dumps({"sha": "c" * 40, "modelId": 1, "siblings": [file], "files": [file]})
    web = Web(WebRules(own=frozenset({origin_of(server.address)})))
    hub, civitai = Hub("hf_canary", server.address, web), Civitai(web, server.address)
    calls: tuple[Callable[[], RemoteFile], ...] = (
        lambda: hub.ask(HubFile("u/r")),
        lambda: civitai.ask(CivitaiFile(1, 2)),
    )
    with LoopbackServer() as inside:
        for chance in rounds(60):
            body = garbled(chance, sound.encode())
            status = chance.choice((200, 200, 200, 301, 302, 307, 401, 403, 404, 418, 503))
            headers = {"Location": inside.url("/latest")} if 300 <= status < 400 else {}
            for path in ("/api/models/u/r", "/api/v1/model-versions/2"):
                server.serve(path, body, status=status, headers=headers)
            for call in calls:
                try:
                    assert "canary" not in repr(call())
                except LoraError as error:
                    assert "canary" not in str(error)
        assert inside.connections == 0


# --- files and pictures ------------------------------------------------------------------------------


def test_no_pickle_runs_or_grows(tmp_path: Path, rounds: Rounds) -> None:
    stream, limit = io.BytesIO(), 10_000_000
    torch.save({"a": torch.ones(4, 4), "b": torch.ones(1).expand(9), "c": [1, {"d": "e"}]}, stream)
    source, target = tmp_path / "x.pt", tmp_path / "x.safetensors"
    for chance in rounds(100):
        source.write_bytes(garbled(chance, stream.getvalue()))
        target.unlink(missing_ok=True)
        with suppress(LoraError):
            convert(source, target, limit)
            assert target.stat().st_size < limit + 1_000_000


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_every_picture_is_read_or_refused(rounds: Rounds, kind: str) -> None:
    import base64

    stream = io.BytesIO()
    exif = {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0"} if kind in ("PNG", "JPEG", "WEBP") else {}
    Image.linear_gradient("L").convert("RGB").resize((64, 48)).save(stream, kind, **exif)
    for chance in rounds(40):
        body = base64.b64encode(garbled(chance, stream.getvalue())).decode()
        with suppress(InvalidInput):
            assert load_picture(f"data:;base64,{body}", Web()).mode == "RGB"


# --- files that fail, and workers that are killed ------------------------------------------------------


class Killed(BaseException):
    """Ends a worker there and then."""


CALLS = (
    (os, "fsync"),
    (os, "utime"),
    (os, "open"),
    (Path, "replace"),
    (Path, "mkdir"),
    (Path, "stat"),
)

ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.ESTALE, errno.EACCES)


def fail_once(patch: pytest.MonkeyPatch, number: int, why: BaseException) -> None:
    """Of the CALLS from now on, the one of this number fails."""
    left = [number]

    def failing(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                raise why
            return real(*args, **options)

        return call

    for owner, name in CALLS:
        patch.setattr(owner, name, failing(getattr(owner, name)))


def test_no_failing_call_loses_the_file_that_was_there(
    tmp_path: Path, server: LoopbackServer, rounds: Rounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies = [as_bytes(kohya(seed=seed)) for seed in range(3)]
    limits, url = Limits(tries=1, pause=0.01, ttl=0), server.url("/x.safetensors")
    for number, chance in enumerate(rounds(60)):
        root = tmp_path / str(number)
        server.serve("/x.safetensors", bodies[0])
        cache = VolumeCache(root, limits, LOOPBACK)
        old = cache.get(cache.resolve(Reference(url)))
        server.serve("/x.safetensors", bodies[1])
        why = chance.choice((Killed(), *(OSError(code, os.strerror(code)) for code in ERRORS)))
        with monkeypatch.context() as patch:
            fail_once(patch, chance.randint(1, 12), why)
            with suppress(Killed, CodedError):
                worker = VolumeCache(root, limits, LOOPBACK)
                worker.get(worker.resolve(Reference(url)))
        server.serve("/x.safetensors", b"", status=500)
        served = VolumeCache(root, limits, LOOPBACK)
        entry = served.get(served.resolve(Reference(url)))
        assert entry.path == old.path
        assert entry.path.read_bytes() in bodies[:2]
        assert not list((root / DAMAGED).glob("*"))
        assert not [path for path in (root / INCOMING).iterdir() if path.suffix == ".part"]


# --- exceptions at random lines -----------------------------------------------------------------------

OURS = tuple(f"{os.sep}{folder}{os.sep}" for folder in ("lora", "pipelines", "worker"))


class Broken(Exception):
    """What no code expects."""


def broken_at(line: int) -> Callable[[FrameType, str, Any], Any]:
    """A trace function that raises at the line of our code that runs as the n-th."""
    left = [line]

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if not any(part in frame.f_code.co_filename for part in OURS):
            return None
        if event == "line":
            left[0] -= 1
            if left[0] == 0:
                raise Broken
        return trace

    return trace


def picture(worker: Worker, scale: float) -> object:
    names = ["demo-stripes", "demo-night"]
    loras = [{"path": name, "scale": scale} for name in names]
    answer = worker(job(loras=loras, num_inference_steps=2, seed=3))
    return answer.get("images")


@pytest.mark.slow
def test_no_exception_within_a_job_changes_a_later_picture(
    demo_worker: Worker, rounds: Rounds
) -> None:
    scales = (0.5, 2.0)
    wanted = {scale: picture(demo_worker, scale) for scale in scales}
    assert all(wanted.values())
    assert wanted[0.5] != wanted[2.0]
    seen = Counter[bool]()
    for chance in rounds(2):
        before = sys.gettrace()
        sys.settrace(broken_at(int(10 ** chance.uniform(0, 4.2))))
        try:
            seen[picture(demo_worker, chance.choice(scales)) is not None] += 1
        except Broken:
            seen[False] += 1
        finally:
            sys.settrace(before)
        scale = chance.choice(scales)
        assert picture(demo_worker, scale) == wanted[scale]
    assert SECONDS == 0 or seen[False]
