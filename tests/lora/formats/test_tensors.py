"""Tensors as safetensors itself reads them, and no NaN or infinity among them."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora.errors import LoraCorrupt
from lora.formats import tensors as tensors_module
from lora.formats.header import DTYPE_BYTES, read_header
from lora.formats.tensors import DTYPES, read_runs

MAPPED = pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "read"])
FLOATS = {name: dtype for name, dtype in DTYPES.items() if dtype.is_floating_point}


def raw(entries: dict[str, tuple[str, list[int], bytes]], padding: int = 0) -> bytes:
    """A file of tensors given as (dtype, shape, bytes), its data `padding` bytes further than usual."""
    header, data = {}, b""
    for name, (dtype, shape, content) in entries.items():
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += content
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 + padding)
    return struct.pack("<Q", len(text)) + text + data


def read(path: Path, *, mapped: bool) -> dict[str, Tensor]:
    runs = read_runs(path, read_header(path), mapped=mapped)
    return {name: tensor for run in runs for name, tensor in run.tensors()}


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def test_every_dtype_of_the_format_has_its_size() -> None:
    assert DTYPES.keys() == DTYPE_BYTES.keys()
    assert {name: dtype.itemsize for name, dtype in DTYPES.items()} == DTYPE_BYTES


@MAPPED
def test_every_dtype_is_read_as_safetensors_reads_it(tmp_path: Path, mapped: bool) -> None:
    path, made = tmp_path / "a.safetensors", {}
    for index, (name, dtype) in enumerate(DTYPES.items()):
        for shape in ((3, 5), (), (0, 4), (7,), (2, 1, 3)):
            numbers = torch.arange(int(torch.tensor(shape).prod()) if shape else 1) % 2 + index % 2
            made[f"{name}{shape}"] = numbers.to(dtype).reshape(shape)
    save_file(made, path)
    expected, found = load_file(path), read(path, mapped=mapped)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert bits(found[name]) == bits(tensor)


@MAPPED
@pytest.mark.parametrize("padding", range(8))
def test_tensors_at_any_offset(tmp_path: Path, mapped: bool, padding: int) -> None:
    path = tmp_path / "a.safetensors"
    values = torch.arange(40, dtype=torch.float64)
    entries = {"first": ("U8", [3], b"abc")}
    for name in ("F64", "F32", "F16", "BF16", "F8_E4M3", "I64", "C64", "BOOL"):
        one = values.to(DTYPES[name])
        entries[name] = (name, [8, 5], bits(one))
    path.write_bytes(raw(entries, padding))
    found = read(path, mapped=mapped)
    for name, (_, _, content) in entries.items():
        assert bits(found[name]) == content
    assert torch.equal(found["F32"].sum(0), values.float().reshape(8, 5).sum(0))


@MAPPED
def test_tensors_outlive_the_file_and_no_write_reaches_it(tmp_path: Path, mapped: bool) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(1000)}, path)
    before = path.read_bytes()
    found = read(path, mapped=mapped)
    found["a"].zero_()
    assert path.read_bytes() == before
    path.unlink()
    assert torch.equal(found["a"], torch.zeros(1000))


def not_finite(dtype: torch.dtype) -> list[int]:
    """Every bit pattern of an 8-bit number that is none; of wider ones the borders of their ranges."""
    if dtype.itemsize == 1:
        every = torch.arange(256, dtype=torch.uint8)
        return every[~every.view(dtype).float().isfinite()].tolist()
    info, width = torch.finfo(dtype), dtype.itemsize * 8
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    largest = int(torch.tensor(info.max, dtype=dtype).view(integer))
    positive = [largest + 1, largest + 2, 2 ** (width - 1) - 1]
    return positive + [value | 1 << (width - 1) for value in positive]


@MAPPED
@pytest.mark.parametrize("name", FLOATS)
def test_nan_and_infinity_are_found_wherever_they_are(
    tmp_path: Path, mapped: bool, name: str
) -> None:
    path, width = tmp_path / "a.safetensors", FLOATS[name].itemsize
    harmless = int(torch.tensor(1.0).to(FLOATS[name]).view(torch.uint8)[()] if width == 1 else 1)
    missed = []
    for value in not_finite(FLOATS[name]):
        for place in (0, 3, 6):
            numbers = [harmless] * 7
            numbers[place] = value
            content = b"".join(number.to_bytes(width, "little") for number in numbers)
            fine = harmless.to_bytes(width, "little") * 2
            path.write_bytes(raw({"a": (name, [2], fine), "b": (name, [7], content)}, place))
            try:
                read(path, mapped=mapped)
                missed.append((hex(value), place))
            except LoraCorrupt as error:
                assert "the tensor b holds NaN or infinity" in str(error)
    assert missed == []


@MAPPED
@pytest.mark.parametrize("name", FLOATS)
def test_every_finite_number_is_taken(tmp_path: Path, mapped: bool, name: str) -> None:
    path, dtype = tmp_path / "a.safetensors", FLOATS[name]
    if dtype.itemsize == 1:
        every = torch.arange(256, dtype=torch.uint8).view(dtype)
        values = every[every.float().isfinite()]
    elif dtype.itemsize == 2:
        every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
        values = every[every.isfinite()]
    else:
        info = torch.finfo(dtype)
        ends = [info.max, -info.max, info.tiny, -info.tiny, info.smallest_normal, 0.0, -0.0]
        values = torch.tensor(ends, dtype=dtype)
    path.write_bytes(raw({"a": (name, [len(values)], bits(values))}))
    assert bits(read(path, mapped=mapped)["a"]) == bits(values)


@MAPPED
def test_whole_numbers_may_hold_any_bits(tmp_path: Path, mapped: bool) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw({n: (n, [1], b"\xff" * DTYPES[n].itemsize) for n in ("I64", "U8", "I16")}))
    assert read(path, mapped=mapped)["I64"].item() == -1


@MAPPED
@pytest.mark.parametrize("size", [1, 100, 4096, 4097, 65_536, 65_537, 200_000])
def test_the_pieces_that_are_read_and_checked_make_up_the_whole(
    tmp_path: Path, mapped: bool, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors_module, "READ_BYTES", 4096)
    path, values = tmp_path / "a.safetensors", torch.arange(size) % 1000 / 7
    made = {"a": values.half(), "b": values, "c": values.flip(0)}
    save_file(made, path)
    for name, tensor in read(path, mapped=mapped).items():
        assert torch.equal(tensor, made[name])
    for name, place in (("a", 0), ("a", -1), ("b", size // 2), ("c", -1)):
        broken = {n: t.clone() for n, t in made.items()}
        broken[name][place] = -torch.nan
        save_file(broken, path)
        with pytest.raises(LoraCorrupt) as caught:
            read(path, mapped=mapped)
        assert f"the tensor {name} holds NaN" in str(caught.value)


@MAPPED
def test_a_file_that_became_shorter_is_corrupt(tmp_path: Path, mapped: bool) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(100)}, path)
    header = read_header(path)
    for content in (path.read_bytes()[:-1], b"x", b""):
        path.write_bytes(content)
        with pytest.raises(LoraCorrupt):
            read_runs(path, header, mapped=mapped)
    path.unlink()
    with pytest.raises(LoraCorrupt):
        read_runs(path, header, mapped=mapped)


def test_a_mapped_file_is_not_copied(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(1_000_000), "b": torch.ones(1_000_000)}, path)
    tracemalloc.start()
    found = read(path, mapped=True)
    assert tracemalloc.get_traced_memory()[1] < 200_000
    tracemalloc.stop()
    assert found["b"].data_ptr() - found["a"].data_ptr() == 4_000_000
