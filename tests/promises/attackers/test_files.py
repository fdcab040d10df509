"""Hostile pickles, .safetensors files and pictures: read or refused, in memory that has a bound."""

from __future__ import annotations

import base64
import io
import json
import random
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lora.errors import LoraError
from lora.fetch.sources import CachedName
from lora.fetch.web import Web
from lora.formats.header import read_header
from lora.formats.pickles import convert
from lora.volume.cache import Limits, VolumeCache
from lora.volume.records import INCOMING
from tests.adapters import as_bytes, kohya
from tests.conftest import ROOT
from tests.promises.attackers.rounds import SECONDS, SEED, Rounds, garbled
from tests.test_handler import job
from validation import InvalidInput
from worker.pictures.inputs import load_picture

MB = 1_000_000

START = b"\x80\x02}(X\x01\x00\x00\x00a"
"""A pickle that begins a table whose first key is `a`."""


LIMIT_MB = 500 if SECONDS else 20
"""The largest file: on demand one beside which the process's own memory is little."""

TORCH_MB = 600
"""What a process takes that imports torch, at most."""


def packed(content: bytes, *, storage: int = 4) -> bytes:
    """A file of torch.save whose pickle is `content`, with so many bytes in its storage."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/data/0", bytes(storage))
        archive.writestr("archive/version", "3\n")
    return stream.getvalue()


def saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def many(part: bytes) -> Callable[[int], bytes]:
    """A list of as many parts as the limit of a file has room for, packed."""
    return lambda limit: packed(START + b"](" + part * ((limit - MB) // len(part)) + b"eu.")


BOMBS: dict[str, Callable[[int], bytes]] = {
    "numbers": many(b"K\x01"),
    "lists": many(b"]"),
    "tables": many(b"}"),
    "texts": many(b"X\x01\x00\x00\x00x"),
    "long numbers": many(b"\x8a\x08" + b"\x7f" * 8),
    "pairs": many(b"K\x01\x85"),
    "deep lists": lambda limit: packed(START + b"]" * 900_000 + b"a" * 899_999 + b"u."),
    "one long text": lambda limit: packed(
        START + b"X" + struct.pack("<I", limit - MB) + b"x" * (limit - MB) + b"u."
    ),
    "text that is doubled": lambda limit: packed(
        b"\x80\x02("
        + b"X"
        + struct.pack("<I", limit // 2)
        + b"x" * (limit // 2)
        + b"q\x00h\x00h\x00t."
    ),
    "expanded": lambda limit: saved({"a": torch.ones(1).expand(limit * 20)}),
    "transposed": lambda limit: saved({"a": torch.ones(limit // 8, 1).T.expand(2, limit // 8)}),
    "zeroes": lambda limit: saved({"a": torch.zeros(limit // 4 - 1000)}),
    "views of one": lambda limit: saved(
        {str(n): torch.zeros(limit // 40)[n:].as_strided((limit // 50,), (1,)) for n in range(9)}
    ),
}


MEASURED = """
import resource, sys
from pathlib import Path
from lora.errors import LoraError
from lora.formats.apart import convert_apart
try:
    convert_apart(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
except LoraError:
    pass
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
"""
"""Converts, and tells the peak of the process that did it, which nobody else's is mixed with."""


def peak_mb(source: Path, target: Path) -> float:
    command = [sys.executable, "-c", MEASURED, source, target, LIMIT_MB * MB]
    done = subprocess.run(
        [str(one) for one in command], cwd=ROOT, check=True, stdout=subprocess.PIPE
    )
    return int(done.stdout) / MB


def test_no_pickle_takes_more_than_three_times_the_limit(rounds: Rounds, tmp_path: Path) -> None:
    source, target = tmp_path / "x.pt", tmp_path / "x.safetensors"
    names = list(BOMBS)
    random.Random(SEED).shuffle(names)
    rounds.seen["limit_mb"] = LIMIT_MB
    if SECONDS:
        source.write_bytes(saved({"a": torch.ones(1)}))
        rounds.seen["mb_for_the_smallest_pickle"] = round(peak_mb(source, target))
    for _ in rounds(2, len(BOMBS), share=8):
        name = names[rounds.done - 1]
        source.write_bytes(BOMBS[name](LIMIT_MB * MB))
        target.unlink(missing_ok=True)
        peak = peak_mb(source, target)
        assert not target.exists() or target.stat().st_size < (LIMIT_MB + 1) * MB
        rounds.seen[f"peak_mb of {name}"] = round(peak)
        assert peak < 3 * LIMIT_MB + TORCH_MB, name


def test_no_pickle_runs_or_grows(rounds: Rounds, tmp_path: Path) -> None:
    stream, limit = io.BytesIO(), 10 * MB
    torch.save({"a": torch.ones(4, 4), "b": torch.ones(1).expand(9), "c": [1, {"d": "e"}]}, stream)
    source, target = tmp_path / "x.pt", tmp_path / "x.safetensors"
    for chance in rounds(60, 5000):
        source.write_bytes(garbled(chance, stream.getvalue()))
        target.unlink(missing_ok=True)
        with suppress(LoraError):
            convert(source, target, limit)
            assert target.stat().st_size < limit + MB
            rounds.seen["converted"] += 1


HEADERS: tuple[Any, ...] = (
    *({}, [], {"a": 1}, {"__metadata__": []}, {"__metadata__": {"a": {"b": []}}}),
    {"a": {"dtype": "F32", "shape": [2**62, 2], "data_offsets": [0, 0]}},
    {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}},
    {"a": {"dtype": "F32", "shape": [0, 2**61], "data_offsets": [0, 0]}},
    {"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}},
    {"a": {"dtype": "F32", "shape": [True], "data_offsets": [False, 4]}},
    {"\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
    {str(n): {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for n in range(100_000)},
)


def test_no_adapter_s_header_takes_much_or_is_misread(rounds: Rounds, tmp_path: Path) -> None:
    whole, file = as_bytes(kohya()), tmp_path / "x.safetensors"
    cache = VolumeCache(tmp_path, Limits(file_bytes=100 * MB))
    for chance in rounds(12, 3000):
        if chance.random() < 0.3:
            header = json.dumps(chance.choice(HEADERS)).encode()
            file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
        elif chance.random() < 0.1:
            deep = chance.choice((b"[", b'{"a":')) * chance.randrange(1_000_000)
            file.write_bytes(len(deep).to_bytes(8, "little") + deep)
        else:
            file.write_bytes(garbled(chance, whole))
        tracemalloc.start()
        with suppress(LoraError):
            read_header(file)
            rounds.seen["read"] += 1
        peak = tracemalloc.get_traced_memory()[1] / MB
        tracemalloc.stop()
        assert peak < 300
        rounds.seen["peak_mb_of_a_header"] = max(rounds.seen["peak_mb_of_a_header"], round(peak))
        with suppress(LoraError):
            cache.find(CachedName("x"))
    assert not list(tmp_path.glob(f"{INCOMING}/*.part"))


KINDS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


def picture_of(kind: str) -> bytes:
    stream = io.BytesIO()
    exif = {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0"} if kind in ("PNG", "JPEG", "WEBP") else {}
    Image.linear_gradient("L").convert("RGB").resize((64, 48)).save(stream, kind, **exif)
    return stream.getvalue()


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_every_picture_is_read_or_refused(rounds: Rounds) -> None:
    whole = {kind: picture_of(kind) for kind in KINDS}
    for chance in rounds(150, 20_000):
        data = garbled(chance, whole[chance.choice(KINDS)])
        with suppress(InvalidInput):
            url = f"data:;base64,{base64.b64encode(data).decode()}"
            assert load_picture(url, Web()).mode == "RGB"
            rounds.seen["read"] += 1


def test_no_request_of_any_shape_is_internal(rounds: Rounds, demo_worker: Any) -> None:
    values: tuple[Any, ...] = (
        *(None, True, 0, -1, 1e308, "", " ", "\x00", "\ud800", "x" * 300, "../../x", "a/b@c"),
        *([], {}, [[]], [{}], {"a": 1}, [None], "~nosuchuser/x", "civitai:1@2@3", 2**70),
    )
    names = (
        *("action", "name", "loras", "path", "preset", "lora_selection", "image_url", "mask_url"),
        *("prompt", "width", "scheduler", "num_images", "seed", "state", "page", "description"),
    )
    for chance in rounds(60, 5000):
        about = {name: chance.choice(values) for name in chance.sample(names, chance.randint(1, 4))}
        if chance.random() < 0.7:
            actions = ("loras.inspect", "loras.delete", "loras.pin", "library.activate")
            more = ("library.delete", "library.list", "presets.set", "presets.delete", "health")
            asked = {"id": "x", "input": {**about, "action": chance.choice((*actions, *more))}}
        else:
            asked = job(**{"num_inference_steps": 1, **about})
        answer = demo_worker(asked)
        assert not str(answer.get("error", "")).startswith("INTERNAL"), (asked, answer)
        rounds.seen["errors" if "error" in answer else "answers"] += 1
