"""Files that come in pieces are published whole, with their hash, under their own name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lora.errors import LoraCorrupt, LoraError, LoraTooLarge, SourceInvalid
from lora.fetch.download import Limits
from lora.fetch.sources import CachedName
from lora.library.uploads import Piece, take
from lora.volume.cache import VolumeCache
from lora.volume.records import INCOMING
from tests.adapters import kohya, write


@pytest.fixture
def cache(tmp_path: Path) -> VolumeCache:
    return VolumeCache(tmp_path / "loras")


@pytest.fixture
def body(tmp_path: Path) -> bytes:
    return write(tmp_path / "source.safetensors", kohya()).read_bytes()


def pieces(
    body: bytes, name: str = "my LoRA (v2).safetensors", size: int = 1000
) -> Iterator[Piece]:
    sha256 = hashlib.sha256(body).hexdigest()
    for start in range(0, len(body), size):
        yield Piece(name, sha256, len(body), start, body[start : start + size])


def left(cache: VolumeCache) -> list[str]:
    return [path.name for path in (cache.shelf.root / INCOMING).iterdir()]


def test_a_file_in_pieces_is_there_once_the_last_one_came(cache: VolumeCache, body: bytes) -> None:
    *first, last = pieces(body)
    for piece in first:
        assert take(cache, piece) == piece.start + len(piece.data)
        assert not cache.shelf.names()
    assert take(cache, last) == len(body)
    entry = cache.find(CachedName("my LoRA (v2)"))
    assert entry.path.read_bytes() == body
    assert entry.record.sha256 == hashlib.sha256(body).hexdigest()
    assert entry.record.fetched is None  # it is never evicted
    assert left(cache) == []


def test_another_worker_goes_on_and_a_piece_that_comes_twice_changes_nothing(
    cache: VolumeCache, body: bytes
) -> None:
    one, two, *others = pieces(body)
    take(cache, one)
    take(cache, two)
    for piece in [two, *others]:
        take(VolumeCache(cache.shelf.root), piece)
    assert cache.find(CachedName("my LoRA (v2)")).path.read_bytes() == body
    assert take(cache, others[-1]) == len(body)  # as after an answer that was lost


def test_a_piece_that_does_not_follow_is_told_where_to_begin(
    cache: VolumeCache, body: bytes
) -> None:
    one, two, three, *_ = pieces(body)
    with pytest.raises(SourceInvalid, match="first pieces are gone"):
        take(cache, two)
    take(cache, one)
    with pytest.raises(SourceInvalid, match=f"begins at {len(one.data)}"):
        take(cache, three)
    with pytest.raises(SourceInvalid):
        take(cache, replace(two, data=body + body))


@pytest.mark.parametrize("kind", ["another hash", "no adapter"])
def test_what_is_not_the_file_or_no_adapter_is_not_kept(
    cache: VolumeCache, body: bytes, kind: str
) -> None:
    body = b"<html>" * 100 if kind == "no adapter" else body
    (piece,) = pieces(body, size=len(body))
    if kind == "another hash":
        piece = replace(piece, sha256="0" * 64)
    with pytest.raises(LoraCorrupt):
        take(cache, piece)
    assert (left(cache), cache.shelf.names()) == ([], [])


@pytest.mark.parametrize(
    "name",
    [
        *(
            "../x.safetensors",
            "a/b.safetensors",
            ".x.safetensors",
            "x.pt",
            "x.safetensors\n",
            "",
            "a\\b",
        ),
        *("x" * 300 + ".safetensors", "\u202ex.safetensors", "x\0.safetensors"),
    ],
)
def test_a_name_that_leads_elsewhere_is_refused(cache: VolumeCache, body: bytes, name: str) -> None:
    with pytest.raises(LoraError) as caught:
        take(cache, next(pieces(body, name)))
    assert isinstance(caught.value, SourceInvalid)


def test_another_file_of_that_name_stays(cache: VolumeCache, body: bytes, tmp_path: Path) -> None:
    root = cache.shelf.prepare()
    before = write(root / "a.safetensors", kohya(rank=8)).read_bytes()
    with pytest.raises(SourceInvalid, match="another file"):
        take(cache, next(pieces(body, "a.safetensors")))
    assert (root / "a.safetensors").read_bytes() == before


def test_a_file_over_the_limit_is_refused_before_a_byte_is_kept(
    tmp_path: Path, body: bytes
) -> None:
    cache = VolumeCache(tmp_path / "loras", Limits(file_bytes=100))
    with pytest.raises(LoraTooLarge):
        take(cache, next(pieces(body)))
    assert not (tmp_path / "loras").exists()
