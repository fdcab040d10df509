"""What a small pickle describes is counted before it is made, and what cannot be counted is ended."""

from __future__ import annotations

import io
import pickle
import resource
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora.errors import LoraCorrupt, LoraError, LoraTooLarge, LoraUnsupported
from lora.fetch.sources import CachedName
from lora.formats import apart
from lora.formats.apart import convert_apart
from lora.formats.pickles import LEFT_OUT, MAX_TEXT, convert
from lora.volume.cache import Limits, VolumeCache

LIMIT = 10_000_000


def packed(content: bytes) -> bytes:
    """A file of torch.save whose pickle is `content`, with one number in its storage."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/data/0", struct.pack("<f", 1.0))
        archive.writestr("archive/version", "3\n")
    return stream.getvalue()


def saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def nested(depth: int, width: int = 10) -> list[Any]:
    """A list of shared lists: written out, it has width ** depth parts."""
    inner: list[Any] = [1] * width
    for _ in range(depth):
        inner = [inner] * width
    return inner


def endless() -> list[Any]:
    itself: list[Any] = []
    itself.append(itself)
    return itself


ONE = {"a": torch.ones(1)}

TOO_LARGE: dict[str, Any] = {
    "expanded": {"a": torch.ones(1).expand(1 << 29)},
    "many expanded": {f"a{n}": torch.ones(1).expand(1 << 20) for n in range(8)},
    "strided": {"a": torch.ones(3000).as_strided((3000, 3000), (0, 1))},
    "in a wrapper": {"state_dict": {"a": torch.ones(1).expand(1 << 40)}},
}

NOT_PLAIN: dict[str, Any] = {
    "sparse": {
        "a": torch.sparse_coo_tensor([[0], [0]], [1.0], (30_000, 30_000), check_invariants=True)
    },
    "keyed by numbers": {1: torch.ones(1)},
    "keyed by tuples": {(1, 2): torch.ones(1)},
    "complex numbers": {"a": torch.ones(1, dtype=torch.complex128)},
    "half a surrogate": {"\ud800": torch.ones(1)},
}

TEXTS: dict[str, tuple[Any, str]] = {
    "shared lists": (nested(30), LEFT_OUT),
    "shared tables": ({"x": nested(8)}, LEFT_OUT),
    "a list within itself": (endless(), LEFT_OUT),
    "a deep list": ([[[[1]]]], "[[[[1]]]]"),
    "a table": ({"r": 4}, '{"r": 4}'),
    "nothing": (None, "None"),
    "a long text": ("x" * (2 * MAX_TEXT), "x" * MAX_TEXT),
}


def converted(folder: Path, body: bytes) -> Path:
    source, target = folder / "x.pt", folder / "x.safetensors"
    source.write_bytes(body)
    convert(source, target, LIMIT)
    return target


@pytest.mark.parametrize("kind", TOO_LARGE)
def test_tensors_that_repeat_a_few_numbers_count_with_their_repetitions(
    tmp_path: Path, kind: str
) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(LoraTooLarge) as caught:
        converted(tmp_path, saved(TOO_LARGE[kind]))
    assert "MB" in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 3 * LIMIT / 1024
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_what_is_no_plain_tensor_by_name_is_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(LoraUnsupported):
        converted(tmp_path, saved(NOT_PLAIN[kind]))


@pytest.mark.parametrize("kind", TEXTS)
def test_a_value_beside_the_tensors_is_kept_if_it_is_small(tmp_path: Path, kind: str) -> None:
    from safetensors import safe_open

    value, kept = TEXTS[kind]
    target = converted(tmp_path, saved({**ONE, "more": value}))
    with safe_open(target, "pt") as file:
        assert file.metadata()["more"] == kept


def test_a_number_without_end_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(LoraCorrupt, match="alpha"):
        converted(tmp_path, saved({**ONE, "alpha": 1 << 1500}))


ODD = {
    "memo without end": packed(b"\x80\x02}r\xff\xff\xff\xff."),
    "a text without end": packed(b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b"x."),
    "deep tuples": packed(b"\x80\x02}(K\x01" + b"\x85" * 50_000 + b"K\x01u."),
    "an empty stack": packed(b"\x80\x02aaa."),
    "no end": packed(b"\x80\x02}"),
    "a wrong call": packed(b"\x80\x02ctorch\nSize\nK\x01\x85R."),
    "an old form that is cut": pickle.dumps(0x1950A86A20F9469CFC6C, 2),
    "two bytes": b"\x80\x02",
}


@pytest.mark.parametrize("kind", ODD)
def test_whatever_torch_raises_is_a_fault_of_the_file(tmp_path: Path, kind: str) -> None:
    with pytest.raises(LoraError) as caught:
        converted(tmp_path, ODD[kind])
    assert caught.value.code in ("LORA_CORRUPT", "LORA_UNSUPPORTED", "LORA_TOO_LARGE")


def test_a_strangers_pickle_is_read_by_another_process_and_its_error_comes_back(
    tmp_path: Path,
) -> None:
    cache = VolumeCache(tmp_path, Limits(file_bytes=LIMIT))
    (tmp_path / "good.pt").write_bytes(saved(ONE))
    assert load_file(cache.find(CachedName("good")).path).keys() == {"a"}
    (tmp_path / "large.pt").write_bytes(saved(TOO_LARGE["expanded"]))
    with pytest.raises(LoraTooLarge) as caught:
        cache.find(CachedName("large"))
    assert "2147 MB" in caught.value.sentence
    assert list((tmp_path / ".incoming").iterdir()) == []


def test_a_pickle_that_takes_too_long_or_too_much_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "x.pt", tmp_path / "x.safetensors"
    # Two megabytes that make four million empty sets of 200 bytes each.
    source.write_bytes(packed(b"\x80\x04](" + b"\x8f" * 4_000_000 + b"e."))
    with pytest.raises(LoraError) as caught:
        convert_apart(source, target, 4_100_000)
    assert caught.value.code in ("LORA_TOO_LARGE", "LORA_CORRUPT")
    monkeypatch.setattr(apart, "SECONDS", 0.01)
    with pytest.raises(LoraTooLarge) as late:
        convert_apart(source, target, 4_100_000)
    assert "more memory or time" in late.value.sentence
    assert not target.exists()
