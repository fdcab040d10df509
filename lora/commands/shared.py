"""What several commands share: a source with a scale, the rank's options, progress and results."""

from __future__ import annotations

import re
import sys
import time
from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError, Namespace, _ArgumentGroup
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from lora.formats.names.keys import KeyMap
    from lora.tools import OnProgress
    from lora.tools.factors.ranks import RankPolicy


class Command(Protocol):
    """What a module of `lora.commands` has."""

    SUMMARY: str

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Adds the command's own options."""

    def run(self, options: Namespace) -> Mapping[str, Any]:
        """Does the work; everything that there is to tell, as JSON can hold it.

        `errors`, if it is there and not empty, has a sentence for each part that failed.
        Raises: CodedError; OSError.
        """

    def show(self, result: Mapping[str, Any]) -> str:
        """The result for a person, in lines."""


# --- arguments --------------------------------------------------------------------------------


def add_json(parser: ArgumentParser) -> None:
    """`--json`, on a command and on each of its actions."""
    words = "the whole result as JSON on stdout"
    parser.add_argument("--json", action="store_true", default=SUPPRESS, help=words)


def with_scale(text: str) -> tuple[str, float | None]:
    """`L:0.8` -> (L, 0.8); None where no scale is given.

    What is a file by its whole name is no scale; nor is a model's number on Civitai.
    """
    source, colon, tail = text.rpartition(":")
    number = re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", tail, re.IGNORECASE)
    if not colon or not source or not number or re.fullmatch(r"(?:.*:)?civitai", source):
        return text, None
    return (text, None) if Path(text).exists() else (source, float(tail))


RANKS: Mapping[str, tuple[type, str]] = {
    "energy": (float, "as few as keep this share of each layer's ||change||^2 (0.99, say)"),
    "threshold": (float, "the singular values that are at least this"),
    "ratio": (float, "the singular values that are at least this share of the layer's largest"),
}


KINDS = ("safetensors", "pytorch")
"""How checkpoints, and what is written, may be stored."""

PYTORCH_ENDINGS = (".pt", ".pth", ".bin", ".ckpt")


def output_format(options: Namespace) -> str:
    """`--output-format`, or what the ending of `--output` says."""
    by_name = "pytorch" if options.output.suffix in PYTORCH_ENDINGS else "safetensors"
    return str(options.output_format or by_name)


NAMINGS = ("kohya", "diffusers", "peft", "original")


def dtype_of(name: str) -> torch.dtype:
    """The dtype that an option names. Raises: KeyError."""
    from lora.tools.merged_tensors import NAMED

    return NAMED[name]


def add_rank_options(parser: ArgumentParser, prefix: str, default: int | None) -> None:
    """How many ranks are kept; `prefix` stands before the rules' names (`rank-`, or nothing)."""
    group = parser.add_argument_group("rank, one rule and bounds")
    rule = group.add_mutually_exclusive_group()
    rule.add_argument("--rank", type=int, metavar="N", help=_rank_help(default))
    for name, (kind, words) in RANKS.items():
        rule.add_argument(f"--{prefix}{name}", type=kind, dest=name, metavar="X", help=words)
    _add_bounds(group)


def _rank_help(default: int | None) -> str:
    return "the same for every layer" + (
        f" ({default}, if nothing else is said)" if default else ""
    )


def _add_bounds(group: _ArgumentGroup) -> None:
    group.add_argument("--max-rank", type=int, metavar="N", help="never more in a layer")
    group.add_argument(
        "--max-bytes",
        type=byte_count,
        metavar="N",
        help="the file's size, spent where it counts (60M)",
    )


def byte_count(text: str) -> int:
    """`60M` -> 60,000,000. Raises: ArgumentTypeError."""
    units = {"K": 1e3, "M": 1e6, "G": 1e9}
    unit = text[-1:].upper()
    try:
        count = float(text[:-1]) * units[unit] if unit in units else float(text)
        return int(count)
    except (ValueError, OverflowError):
        raise ArgumentTypeError(f"{text!r} is no number of bytes, such as 60M or 5G") from None


def rank_policy(options: Namespace, default: int | None) -> RankPolicy | None:
    """The policy of `add_rank_options`; None if nothing is said and there is no default.

    Raises: ToolError for a number out of its range.
    """
    from lora.tools.factors.ranks import RankPolicy

    names = ("rank", *RANKS, "max_rank", "max_bytes")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    if not set(given) - {"max_rank"} and default is not None:
        given["rank"] = default
    return RankPolicy(**given) if given else None


def key_map_of(model: str | None) -> KeyMap | None:
    """The names of a model's modules: of a checkpoint, or of SDXL itself for `sdxl`. Raises: ToolError."""
    if model is None:
        return None
    if model.lower() == "sdxl" and not Path(model).exists():
        from lora.tools.adapters.known import sdxl_key_map

        return sdxl_key_map()
    from lora.tools.models.checkpoints import Checkpoint

    with Checkpoint.open(Path(model)) as checkpoint:
        return checkpoint.key_map()


# --- progress ---------------------------------------------------------------------------------


INTERVAL = 0.1
"""Least seconds between two looks of a bar."""


@contextmanager
def progress() -> Iterator[OnProgress]:
    """A bar on stderr where that is a terminal, else nothing."""
    if not sys.stderr.isatty():
        yield lambda done, total, what: None
        return
    from tqdm import tqdm

    from lora.tools.adapters.metadata import clean

    with tqdm(file=sys.stderr, dynamic_ncols=True, leave=False) as bar:
        last = float("-inf")

        def on_progress(done: int, total: int, what: str) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last < INTERVAL:
                return
            last = now
            bar.total, bar.n = total or None, done
            bar.set_postfix_str(clean(what, 40), refresh=False)
            bar.refresh()

        yield on_progress


# --- results ----------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """A result as JSON can hold it: dataclasses as objects, paths by their names."""
    if is_dataclass(value) and not isinstance(value, type):
        return {one.name: plain(getattr(value, one.name)) for one in fields(value)}
    if isinstance(value, Mapping):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(one) for one in value]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return str(value)


def table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines with columns of the same width; the first column is words, the others numbers."""
    if not rows:
        return []
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        first = row[0].ljust(widths[0])
        rest = (text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))
        lines.append("  ".join((first, *rest)).rstrip())
    return lines


SHOWN_KEYS = 20


def key_lines(keys: Sequence[Mapping[str, str]], count: int | None = None) -> list[str]:
    """Tensors with their reasons, the first of them; `count` if there are more than `keys`."""
    from lora.tools.adapters.metadata import clean

    lines = [f"    {clean(one['key'])}: {clean(one['reason'])}" for one in keys[:SHOWN_KEYS]]
    more = (len(keys) if count is None else count) - len(lines)
    return [*lines, f"    and {more} more (see --json)"] if more > 0 else lines


def size(count: float) -> str:
    """Bytes for a person."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.3g} GB"


def write_file(path: Path, data: bytes) -> None:
    """Writes a file, whole or not at all. Raises: ToolError if the disk is full or fails."""
    from lora.durable import write_durably
    from lora.tools.writing import telling

    with telling(path):
        write_durably(path, data)
