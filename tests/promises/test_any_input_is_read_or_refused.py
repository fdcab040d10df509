"""Whatever a job, a link or a file holds: it is read and can be used, or an error with a code says why."""

from __future__ import annotations

import json
import math
import random
import resource
import signal
import struct
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lora.engine.engine import Budgets, LoraEngine
from lora.engine.stack import LoraUse, Mode
from lora.errors import LoraCorrupt, LoraError
from lora.fetch.redaction import redact_url
from lora.fetch.sources import Reference, parse
from lora.formats.adapter import LoraFile, load
from lora.formats.header import DTYPE_BYTES, read_header
from lora.formats.names.slots import SLOTS
from schemas import IMAGE_REQUEST, ImageRequest, parse_job
from tests.adapters import as_bytes, kohya, randn
from tests.lora.small import NAMES, small, tensors_of
from tests.state import State
from validation import InvalidInput

INPUTS = 20_000
PARTS = 20
SECONDS_PER_INPUT = 10
"""Of the processor's time: however busy the machine is."""
MEGABYTES = 150
"""How much the process may grow over all of them."""


class TextEncoder(nn.Module):
    """Enough of one for embeddings of new words."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Module()
        self.embeddings.token_embedding = nn.Embedding(3, 8)


@pytest.fixture(scope="module")
def engine() -> LoraEngine:
    return LoraEngine({"unet": small(), "text_encoder": TextEncoder()}, Budgets(0, 0))


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """In memory where there is such a place: thousands of files are written to it."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as folder:
        yield Path(folder) / "x.safetensors"


# --- making inputs ----------------------------------------------------------------------------------

METADATA = {
    "format": "pt",
    "lora_adapter_metadata": json.dumps(
        {"unet.r": 2, "unet.lora_alpha": 4.0, "unet.alpha_pattern": {"linear": 3}}
    ),
}
CORPUS = [as_bytes(tensors_of(name)) for name in NAMES]
CORPUS += [as_bytes(tensors_of(name), METADATA) for name in ("lora", "lokr", "peft_oft", "loha")]
CORPUS.append(as_bytes({"clip_l": randn(2, 8), "bundle_emb.word.clip_l": randn(1, 8)}))

NUMBERS: tuple[object, ...] = (
    *(0, 1, -1, 2, 3, 7, 8, 12, 36, 255, 2**31, 2**32 - 1, 2**62, 2**63, 2**64, -(2**63), 10**30),
    *(0.5, 2.0, -0.0, "2", "", None, True, [], {}, [1], "@1e400@", "@-1e400@", "@NaN@"),
    *("@Infinity@", "@1e5@", "@12345678901234567890123456789012345678901234567890@"),
)
"""What stands where the header has a number; between @ what json.dumps would not write."""

WORDS = (
    "é\u4e2d",
    "\x00",
    "a" * 300,
    "",
    ".",
    "..",
    "../x",
    "\u202e",
    "__metadata__",
    "lora_A.weight",
)


def unpack(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def pack(header: object, data: bytes) -> bytes:
    text = json.dumps(header).replace('"@', "").replace('@"', "").encode()
    return struct.pack("<Q", len(text)) + text + data


def random_bytes(dice: random.Random) -> bytes:
    length = dice.choice((0, 1, 7, 8, 9, 16, dice.randrange(300)))
    data = dice.randbytes(length)
    return struct.pack("<Q", dice.randrange(length + 2)) + data if dice.random() < 0.5 else data


def cut_or_longer(dice: random.Random) -> bytes:
    data = dice.choice(CORPUS)
    if dice.random() < 0.7:
        return data[: dice.randrange(len(data))]
    return data + dice.randbytes(dice.randrange(1, 20))


def flipped_bits(dice: random.Random) -> bytes:
    data = bytearray(dice.choice(CORPUS))
    whole_header = 8 + int.from_bytes(data[:8], "little")
    for _ in range(dice.choice((1, 1, 2, 8))):
        place = dice.randrange(whole_header if dice.random() < 0.8 else len(data))
        data[place] ^= 1 << dice.randrange(8)
    return bytes(data)


def mutated_text(dice: random.Random) -> bytes:
    """Wrong UTF-8, doubled keys, numbers that are none, deep nesting: spliced into the header's text."""
    data = dice.choice(CORPUS)
    length = int.from_bytes(data[:8], "little")
    text, rest = data[8 : 8 + length], data[8 + length :]
    place = dice.randrange(length)
    depth = dice.choice((10, 1000, 100_000))
    pieces = [b"[" * depth, b'{"a":' * depth, b"[" * depth + b"]" * depth, text[1:place] + b","]
    pieces += [b"\xff", b"\xc3", b"\xed\xa0\x80", b"\\ud800", b"\x00", b"NaN", b"1e400", b"-", b"}"]
    piece = dice.choice(pieces)
    text = text[:place] + piece + text[place + dice.choice((0, 0, 1, len(piece) % length)) :]
    return struct.pack("<Q", len(text)) + text + rest


def mutated_header(dice: random.Random) -> bytes:
    header, data = unpack(dice.choice(CORPUS))
    names = [name for name in header if name != "__metadata__"]
    for _ in range(dice.choice((1, 1, 1, 2, 4))):
        name = dice.choice(names)
        if isinstance(header[name], dict):
            other = dice.choice([info for info in header.values() if isinstance(info, dict)])
            dice.choice(MUTATIONS)(dice, header[name], other)
        if dice.random() < 0.1:
            header[name] = dice.choice(NUMBERS)
        if dice.random() < 0.1:
            header[f"unet.{dice.choice(WORDS)}"] = dice.choice((header[name], {}))
    return pack(header, data)


Info = dict[str, Any]


def other_dtype(dice: random.Random, info: Info, _: Info) -> None:
    info["dtype"] = dice.choice((*DTYPE_BYTES, "F4", "f32", "", *NUMBERS))


def swapped_dtype(dice: random.Random, info: Info, _: Info) -> None:
    """Another of the same size, so that only the numbers change."""
    size = DTYPE_BYTES.get(str(info.get("dtype")))
    info["dtype"] = dice.choice([n for n, s in DTYPE_BYTES.items() if s == size] or ["F32"])


def other_shape(dice: random.Random, info: Info, _: Info) -> None:
    """Another shape with as many numbers."""
    shape = info.get("shape")
    if isinstance(shape, list) and all(isinstance(n, int) and 0 < n < 10**6 for n in shape):
        ones = [1] * dice.choice((0, 1, 3, 70))
        flat = [math.prod(shape)]
        info["shape"] = dice.choice((flat, ones + shape, shape + ones, shape[::-1], [1, *flat]))


def other_number(dice: random.Random, info: Info, _: Info) -> None:
    field = info.get(dice.choice(("shape", "data_offsets")))
    if isinstance(field, list) and field:
        field[dice.randrange(len(field))] = dice.choice(NUMBERS)


def others_bytes(_: random.Random, info: Info, other: Info) -> None:
    info["data_offsets"], info["shape"] = other.get("data_offsets", 0), other.get("shape", 0)


def other_field(dice: random.Random, info: Info, _: Info) -> None:
    info[dice.choice(("shape", "data_offsets", "dtype", "x"))] = dice.choice(NUMBERS)


def empty(dice: random.Random, info: Info, _: Info) -> None:
    info["shape"], info["data_offsets"] = [0, *dice.choices(NUMBERS, k=dice.randrange(3))], [0, 0]


MUTATIONS = (
    other_dtype,
    swapped_dtype,
    other_shape,
    other_number,
    other_number,
    others_bytes,
    other_field,
    empty,
)


def mutated_metadata(dice: random.Random) -> bytes:
    header, data = unpack(dice.choice(CORPUS))
    options = ("lora_alpha", "alpha_pattern", "rank_pattern", "use_rslora", "r", "alpha")
    options += (
        "num_cayley_neumann_terms",
        "use_cayley_neumann",
        "coft",
        "eps",
        "feedforward_modules",
    )
    patterns = ("(", "a{99999999999}", "linear", "(?P<", "[", "*", "", ".*")
    config = {}
    for _ in range(dice.randrange(1, 4)):
        pattern = dice.choice(patterns)
        value = dice.choice(
            (*NUMBERS, {pattern: dice.choice(NUMBERS)}, pattern, [pattern], 10**400)
        )
        config[f"{dice.choice(('unet.', '', 'text_encoder.'))}{dice.choice(options)}"] = value
    text = json.dumps(config).replace('"@', "").replace('@"', "")
    metadata = {"lora_adapter_metadata": text}
    header["__metadata__"] = dice.choice((metadata, metadata, metadata, text, dice.choice(NUMBERS)))
    return pack(header, data)


SUFFIXES = sorted(SLOTS)
TENSORS = [tensors_of(name) for name in NAMES]
KEYS = {
    kind: sorted({key for tensors in TENSORS for key in tensors if f".{kind}." in key})
    for kind in ("linear", "conv")
}


def other_slots(dice: random.Random) -> bytes:
    """A whole file whose tensors stand in other slots than their own, in other shapes."""
    tensors = {}
    for _ in range(dice.randrange(1, 7)):
        module = dice.choice(("linear", "linear", "plain", "conv", "norm", "point"))
        kind = dice.choice(("linear", "conv"))
        shape = [dice.choice((1, 1, 2, 4, 6, 8, 12, 36)) for _ in range(dice.randrange(5))]
        tensor = torch.randn(shape, generator=torch.Generator().manual_seed(len(tensors)))
        dtypes = (torch.float32, torch.float32, torch.float16, torch.float8_e4m3fn, torch.int16)
        dtypes += (torch.uint8, torch.bool, torch.complex64, torch.uint64, torch.float8_e8m0fnu)
        key = dice.choice((f"unet.{module}.{dice.choice(SUFFIXES)}", dice.choice(KEYS[kind])))
        tensors[key] = tensor.abs().to(dice.choice(dtypes))
    base = dice.choice(TENSORS) if dice.random() < 0.6 else {}
    return as_bytes(base | tensors)


KINDS: tuple[Callable[[random.Random], bytes], ...] = (
    random_bytes,
    cut_or_longer,
    flipped_bits,
    mutated_text,
    mutated_header,
    mutated_header,
    mutated_metadata,
    other_slots,
    other_slots,
)


# --- reading them -----------------------------------------------------------------------------------


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def use(engine: LoraEngine, file: LoraFile, mode: Mode) -> None:
    """Looks at all of a file, and applies it."""
    assert file.modules <= len(file.layers)
    str((file.algorithms, file.rank, file.embeddings))
    with engine.applied([LoraUse(file, 0.5)], mode):
        pass


def trouble(engine: LoraEngine, path: Path, data: bytes, number: int) -> BaseException | None:
    """What went wrong with an input; None if it was read, or refused as it should be."""
    path.write_bytes(data)
    mode = Mode.MERGED if number % 4 < 2 else Mode.DYNAMIC
    try:
        with limited(SECONDS_PER_INPUT):
            file = load(path, engine.key_map, f"{number}", mapped=number % 2 == 0)
            assert file.keys + len(file.unused) == len(read_header(path).tensors)
            use(engine, file, mode)
    except LoraError as error:
        message = str(error)
        if str(path.parent) in message or len(message) > 5000:
            return error
        try:
            message.encode()
        except UnicodeEncodeError as unreadable:
            return unreadable
    except Exception as error:  # noqa: BLE001  # that is what it looks for
        return error
    return None


def described(number: int, kind: str, error: BaseException, data: bytes) -> str:
    lines = "".join(traceback.format_exception(error)[-4:])
    return f"input {number} ({kind}, {len(data)} bytes): {data[:1500]!r}\n{lines}"


def place(error: BaseException) -> tuple[str, int]:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return last.filename, last.lineno or 0


@pytest.mark.parametrize("part", range(PARTS))
def test_any_bytes_are_read_or_refused(engine: LoraEngine, path: Path, part: int) -> None:
    found: dict[tuple[str, int], str] = {}
    before = State(engine._modules["unet", ""])
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(part, INPUTS, PARTS):
        dice = random.Random(number)
        kind = KINDS[number // PARTS % len(KINDS)]
        data = kind(dice)
        error = trouble(engine, path, data, number)
        if error is not None:
            found.setdefault(place(error), described(number, kind.__name__, error, data))
    before.assert_same(engine._modules["unet", ""])
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    assert grown < MEGABYTES * 1000
    assert not found, "\n\n".join(found.values())


# --- what was found once ----------------------------------------------------------------------------

EIGHT = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
NONE = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}


def one(**changes: object) -> bytes:
    return pack({"unet.linear.lora_A.weight": EIGHT | changes}, bytes(8))


def with_empty(shape: list[object]) -> bytes:
    return pack({"a": EIGHT, "unet.linear.lora_A.weight": NONE | {"shape": shape}}, bytes(8))


def with_config(name: str = "lora", **options: object) -> bytes:
    header, data = unpack(as_bytes(tensors_of(name)))
    text = json.dumps({f"unet.{key}": value for key, value in options.items()})
    text = text.replace('"@', "").replace('@"', "")
    return pack(header | {"__metadata__": {"lora_adapter_metadata": text}}, data)


CORRUPT = {
    "infinite shape": one(shape=["@1e400@"]),
    "infinite offset": one(data_offsets=[0, "@Infinity@"]),
    "NaN": one(shape=["@NaN@"]),
    "fraction": one(shape=[2.5]),
    "text for a shape": one(shape="2"),
    "text for a number": one(shape=["2"]),
    "true for a number": one(shape=[True, 2]),
    "text for offsets": one(data_offsets="08"),
    "negative offset": one(data_offsets=[-8, 0]),
    "nothing, of a size beyond int64": with_empty([0, 10**30]),
    "nothing, of a size beyond memory's": with_empty([0, 2**62, 2**62]),
    "overlap": pack({"a": EIGHT, "b": EIGHT | {"data_offsets": [0, 8]}}, bytes(8)),
    "hole": pack({"a": EIGHT, "b": EIGHT | {"data_offsets": [12, 20]}}, bytes(20)),
    "lone surrogate": pack({"unet.linear.\ud800": EIGHT}, bytes(8)),
    "surrogate in the metadata": pack({"a": EIGHT, "__metadata__": {"\ud800": "x"}}, bytes(8)),
    "bad pattern": with_config(alpha_pattern={"(": 1}),
    "huge alpha": with_config(lora_alpha=10**400),
    "infinite alpha": with_config(lora_alpha="@1e400@"),
    "alpha beyond float32": with_config(lora_alpha=1e300),
    "pattern with infinite alpha": with_config(alpha_pattern={".*": "@1e400@"}),
    "pattern with NaN": with_config(alpha_pattern={".*": "@NaN@"}),
    "half a term": with_config("peft_oft", num_cayley_neumann_terms="2.5"),
    "negative terms": with_config("peft_oft", num_cayley_neumann_terms=-3),
    "endless terms": with_config("peft_oft", num_cayley_neumann_terms=10**12),
}


@pytest.mark.parametrize("data", CORRUPT.values(), ids=CORRUPT)
@pytest.mark.parametrize("mapped", [True, False])
def test_malformed_files_are_corrupt(
    engine: LoraEngine, path: Path, data: bytes, mapped: bool
) -> None:
    path.write_bytes(data)
    with limited(SECONDS_PER_INPUT), pytest.raises(LoraCorrupt) as caught:
        use(engine, load(path, engine.key_map, "x", mapped=mapped), Mode.MERGED)
    str(caught.value).encode()


HARMLESS = {
    "no terms": with_config("peft_oft", num_cayley_neumann_terms=None),
    "complex alpha": as_bytes(
        tensors_of("locon") | {"unet.conv.alpha": torch.tensor(1 + 1j, dtype=torch.complex64)}
    ),
    "complex alpha of everything": as_bytes(
        {f"unet.linear.lora_{x}.weight": randn(*s) for x, s in (("A", (2, 12)), ("B", (8, 2)))}
        | {"unet.linear.alpha": torch.tensor(2j, dtype=torch.complex64)}
    ),
    "no rank and no alpha": with_config("lokr", r=0, lora_alpha=0),
    "seventy axes": as_bytes({"unet.linear.diff": torch.ones([1] * 62 + [8, 12])}),
    "a pattern that backtracks": with_config(alpha_pattern={"((((u|n|e|t|.)+)+)+)+!": 1}),
    "a key of dots": as_bytes({"." * 200_000: randn(2)}),
    "a key as long as a book": as_bytes({f"unet.linear.{'x' * 200_000}": randn(2)}),
}


@pytest.mark.parametrize("data", HARMLESS.values(), ids=HARMLESS)
def test_odd_files_are_read_or_refused_in_time_and_in_few_words(
    engine: LoraEngine, path: Path, data: bytes
) -> None:
    for number in (0, 2):
        error = trouble(engine, path, data, number)
        assert error is None


def test_tensors_that_share_their_bytes_take_no_memory_of_their_own(
    engine: LoraEngine, path: Path
) -> None:
    """2,000 tensors over the same megabyte, at an odd offset, so that views will not do."""
    header = {
        f"t{number}": {"dtype": "F32", "shape": [250_000], "data_offsets": [1, 1_000_001]}
        for number in range(2000)
    }
    path.write_bytes(pack(header, bytes(1_000_001)))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with limited(60), pytest.raises(LoraError):
        load(path, engine.key_map, "x")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    assert grown < MEGABYTES * 1000


# --- jobs, links and headers, at random --------------------------------------------------------------

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


def read_head(data: bytes) -> None:
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
    read_head(bytes(data))


@given(st.dictionaries(st.text(max_size=8), JSON, max_size=3), st.binary(max_size=32))
@settings(max_examples=600, deadline=None)
def test_a_header_of_any_json_is_read_or_refused(fields: dict[str, object], data: bytes) -> None:
    text = json.dumps(fields).encode()
    read_head(struct.pack("<Q", len(text)) + text + data)
