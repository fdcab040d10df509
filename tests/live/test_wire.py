import pytest

from live.wire import MAX_JSON, pack, unpack
from validation import InvalidInput


@pytest.mark.parametrize("file", [b"", b"\x00\xff", bytes(range(256)) * 300])
def test_what_is_packed_is_unpacked(file: bytes) -> None:
    about = {"seq": 3, "prompt": "ein grüner Kreis", "scales": {"a": -0.5}, "none": None}
    assert unpack(pack(about, file)) == (about, file)


def test_text_is_its_json_alone() -> None:
    assert unpack('{"prompt": "x"}') == ({"prompt": "x"}, b"")


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"\x00", b"\x00\x00", b"\x00\x05{}", b"\x00\x02[]picture", b"\x00\x02{{"),
        *(b"\x00\x02\xff\xfe", "", "7", "{", "[" * 100_000, '"text"'),
    ],
)
def test_what_is_no_message_is_refused(data: str | bytes) -> None:
    with pytest.raises(InvalidInput, match="the message is"):
        unpack(data)


def test_what_does_not_fit_two_bytes_of_length_is_not_sent() -> None:
    assert len(pack({"a": "x" * (MAX_JSON - 8)})) == MAX_JSON + 2
    assert unpack(pack({"a": "half a pair \ud800"})).about == {"a": "half a pair ?"}
    with pytest.raises(ValueError, match="65536"):
        pack({"a": "x" * (MAX_JSON - 7)})
    with pytest.raises(ValueError, match="not JSON compliant"):
        pack({"a": float("nan")})
