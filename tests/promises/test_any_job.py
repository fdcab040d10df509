"""Whatever comes in, only errors with a code come out."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import given, settings
from hypothesis import strategies as st

from lora.errors import LoraError
from lora.fetch.sources import Reference, parse, redact_url
from lora.formats.header import read_header
from schemas import IMAGE_REQUEST, ImageRequest, parse_job
from tests.adapters import as_bytes, kohya
from validation import InvalidInput

WHOLE = as_bytes(kohya())
HEADER_BYTES = 8 + int.from_bytes(WHOLE[:8], "little")

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.sampled_from(sorted(IMAGE_REQUEST["properties"]))


@given(JSON | st.fixed_dictionaries({"input": st.dictionaries(FIELDS, JSON) | JSON}))
@settings(max_examples=600, deadline=None)
def test_any_job_is_a_request_or_invalid_input(job: object) -> None:
    try:
        assert isinstance(parse_job(job), ImageRequest)
    except InvalidInput as error:
        assert str(error).startswith("INVALID_INPUT: ")
        json.dumps(str(error))


@given(st.text(max_size=60) | st.from_regex(r"https?://[a-z.@:?#/=]{0,30}", fullmatch=True))
@settings(max_examples=600, deadline=None)
def test_any_reference_means_something_or_is_refused(path: str) -> None:
    redact_url(path)
    try:
        parse(Reference(path))
    except LoraError as error:
        assert error.code == "LORA_SOURCE_INVALID"


def read(data: bytes) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        path.write_bytes(data)
        try:
            read_header(path)
        except LoraError as error:
            assert error.code in ("LORA_CORRUPT", "LORA_UNSUPPORTED")


@given(st.lists(st.tuples(st.integers(0, HEADER_BYTES - 1), st.integers(0, 255)), max_size=4))
@settings(max_examples=600, deadline=None)
def test_a_header_with_changed_bytes_is_read_or_refused(changes: list[tuple[int, int]]) -> None:
    data = bytearray(WHOLE)
    for place, byte in changes:
        data[place] = byte
    read(bytes(data))


@given(st.dictionaries(st.text(max_size=8), JSON, max_size=3), st.binary(max_size=32))
@settings(max_examples=600, deadline=None)
def test_a_header_of_any_json_is_read_or_refused(fields: dict[str, object], data: bytes) -> None:
    text = json.dumps(fields).encode()
    read(struct.pack("<Q", len(text)) + text + data)
