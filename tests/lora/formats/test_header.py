import json
import struct
from pathlib import Path

import pytest

from lora.errors import LoraCorrupt, LoraError, LoraUnsupported
from lora.formats.header import read_header
from tests.adapters import as_bytes, kohya


def raw(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_a_whole_file_gives_shapes_and_metadata(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(as_bytes(kohya(rank=4), {"ss_network_dim": "4"}))
    header = read_header(path)
    assert header.metadata == {"ss_network_dim": "4"}
    shapes = {key: info.shape for key, info in header.tensors.items()}
    assert shapes == {key: tuple(value.shape) for key, value in kohya(rank=4).items()}


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>Sign in</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"PK\x03\x04" + bytes(100), "pickle"),
        (b'{"error": "no"}' + bytes(100), "JSON text"),
        (bytes(4), "not a .safetensors file"),
        (as_bytes(kohya())[:-10], "10 bytes are missing"),
        (as_bytes(kohya()) + b"xx", "2 bytes too many"),
        (as_bytes(kohya())[:200], "cut off"),
        (raw([1, 2]), "not a JSON object"),
        (raw({}), "no tensors"),
        (raw({"a": ENTRY | {"dtype": "F31"}}, bytes(8)), "unknown dtype"),
        (raw({"a": ENTRY | {"shape": [3]}}, bytes(8)), "does not fill"),
        (raw({"a": ENTRY | {"shape": [-2]}}, bytes(8)), "is malformed"),
        (raw({"a": ENTRY | {"shape": [10**4000] * 200}}, bytes(8)), "is malformed"),
        (raw({"a": {"dtype": "F32"}}, bytes(8)), "malformed"),
        (raw({"a": 5}, bytes(8)), "malformed"),
        (raw({"a": ENTRY, "__metadata__": 3}, bytes(8)), "metadata"),
    ],
)
def test_what_is_no_adapter_is_refused_by_what_it_is(
    tmp_path: Path, data: bytes, said: str
) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    with pytest.raises(LoraError) as caught:
        read_header(path)
    assert type(caught.value) is (LoraUnsupported if said == "pickle" else LoraCorrupt)
    assert said in str(caught.value)
