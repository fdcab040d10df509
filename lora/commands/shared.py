"""What several commands share: options, the progress bar, and how results are shown."""

from __future__ import annotations

import re
import sys
import time
from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lora.formats.names.naming import Naming
from lora.tools import FILE_FORMATS, WEIGHTS, Format, OnProgress

if TYPE_CHECKING:
    import torch

    from lora.formats.names.keys import KeyMap
    from lora.tools.factors.ranks import RankPolicy


class Command(Protocol):
    """What each module of `lora.commands` has."""

    SUMMARY: str
    EXAMPLE: str
    """A line that runs in the worker's own folder, behind `python -m lora`."""

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Adds the command's own options."""

    def run(self, options: Namespace) -> Mapping[str, Any]:
        """Does the work. The result can be written as JSON; its `errors`, if any, has a sentence for each
        part that failed. Raises: CodedError; OSError.
        """

    def show(self, result: Mapping[str, Any]) -> str:
        """The result as text for a person."""


def add_json(parser: ArgumentParser) -> None:
    """Adds `--json` to a command or to one of its actions."""
    text = "print the whole result as JSON"
    parser.add_argument("--json", action="store_true", default=SUPPRESS, help=text)


def with_scale(text: str) -> tuple[str, float | None]:
    """`L:0.8` -> (L, 0.8); None without a scale.

    The end of an existing file's name is no scale, and neither is the number of a model on Civitai.
    """
    source, colon, tail = text.rpartition(":")
    number = re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", tail, re.IGNORECASE)
    if not colon or not source or not number or re.fullmatch(r"(?:.*:)?civitai", source):
        return text, None
    return (text, None) if Path(text).exists() else (source, float(tail))


RANKS = {
    "energy": "for each layer the smallest rank that keeps this share of its change (such as 0.99)",
    "threshold": "for each layer as many as it has singular values of at least X",
    "ratio": "for each layer as many as it has singular values of at least X times its largest",
}
"""Rule of a `RankPolicy` -> its help."""


def add_output(parser: ArgumentParser, text: str) -> None:
    """Adds `--output` and `--force`."""
    parser.add_argument("--output", type=Path, required=True, metavar="OUT", help=text)
    add_force(parser, "OUT")


def add_force(parser: ArgumentParser, what: str) -> None:
    """Adds `--force`, without which `refuse_overwriting` refuses to replace what the option names."""
    text = f"replace {what} if it exists, once the new one is complete"
    parser.add_argument("--force", action="store_true", help=text)


def add_format_option(parser: ArgumentParser) -> None:
    """Adds `--output-format`."""
    text = "format of OUT; by default the one that its ending means"
    parser.add_argument("--output-format", choices=FILE_FORMATS, help=text)


def output_format(options: Namespace) -> Format:
    """`--output-format`, or the format that the ending of `--output` means."""
    pickle = options.output.suffix in WEIGHTS[1:]
    return Format(options.output_format or ("pytorch" if pickle else "safetensors"))


def add_naming_option(parser: ArgumentParser, text: str) -> None:
    """Adds `--naming`."""
    parser.add_argument("--naming", choices=tuple(map(str, Naming)), help=text)


def naming(options: Namespace) -> Naming | None:
    """The option of `add_naming_option`."""
    return Naming(options.naming) if options.naming else None


DTYPES = ("fp32", "fp16", "bf16")
"""The dtypes in which adapters are written."""


def dtype_of(name: str) -> torch.dtype:
    """The dtype that an option names. Raises: KeyError."""
    from lora.tools.models.weights import NAMED_DTYPES

    return NAMED_DTYPES[name]


def add_rank_options(parser: ArgumentParser, prefix: str = "", default: int | None = None) -> None:
    """Adds the options of a `RankPolicy`; `prefix` (`rank-`, say) goes before the names of the rules."""
    group = parser.add_argument_group("the rank of each layer: one rule, and bounds")
    rule = group.add_mutually_exclusive_group()
    usual = f" (default: {default})" if default else ""
    rule.add_argument("--rank", type=int, metavar="N", help=f"the same for every layer{usual}")
    for name, text in RANKS.items():
        rule.add_argument(f"--{prefix}{name}", type=float, dest=name, metavar="X", help=text)
    group.add_argument(
        "--max-rank", type=int, metavar="N", help="the largest rank that a layer may get"
    )
    group.add_argument(
        "--max-bytes",
        type=byte_count,
        metavar="SIZE",
        help="size that OUT may have (such as 60M); layers that matter more get a larger rank",
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


def rank_policy(options: Namespace, default: int | None = None) -> RankPolicy | None:
    """The policy of `add_rank_options`; None if there is neither an option nor a default.

    Raises: ToolError for a number out of range.
    """
    from lora.tools.factors.ranks import RankPolicy

    names = ("rank", *RANKS, "max_rank", "max_bytes")
    rules = {name: value for name in names if (value := getattr(options, name)) is not None}
    if not set(rules) - {"max_rank"} and default is not None:
        rules["rank"] = default
    return RankPolicy(**rules) if rules else None


def key_map_of(model: str | None) -> KeyMap | None:
    """The names of the modules of a checkpoint, or of SDXL for `sdxl`. Raises: ToolError."""
    if model is None:
        return None
    if model.lower() == "sdxl" and not Path(model).exists():
        from lora.tools.adapters.known import sdxl_key_map

        return sdxl_key_map()
    from lora.tools.models.checkpoints import Checkpoint

    with Checkpoint.open(Path(model)) as checkpoint:
        return checkpoint.key_map()


INTERVAL = 0.1
"""Seconds between two updates of the bar, at least."""


@contextmanager
def progress() -> Iterator[OnProgress]:
    """A progress bar on stderr if that is a terminal, else nothing."""
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


def bytes_of(name: str, on_progress: OnProgress) -> Callable[[int, int | None], None]:
    """What a download of this name reports its bytes to."""
    return lambda done, total: on_progress(done, total or 0, name)


def plain(value: Any) -> Any:
    """A result as values that JSON has: dataclasses as objects, paths as texts."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return str(value)


def with_errors(layers: Sequence[Any]) -> list[dict[str, Any]]:
    """Layers as `plain` has them, with their relative errors."""
    return [{**plain(layer), "relative_error": layer.relative_error} for layer in layers]


def worst(layers: Sequence[Mapping[str, Any]], count: int = 5) -> list[Mapping[str, Any]]:
    """The layers of `with_errors` that have the largest errors."""
    return sorted(layers, key=lambda layer: -layer["relative_error"])[:count]


def table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines with aligned columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        first = row[0].ljust(widths[0])
        rest = (text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))
        lines.append("  ".join((first, *rest)).rstrip())
    return lines


SHOWN_KEYS = 20


def key_lines(keys: Sequence[Mapping[str, str]], count: int | None = None) -> list[str]:
    """The first tensors, with their reasons; `count` if there are more than `keys`."""
    from lora.tools.adapters.metadata import clean

    lines = [f"    {clean(key['key'])}: {clean(key['reason'])}" for key in keys[:SHOWN_KEYS]]
    more = (len(keys) if count is None else count) - len(lines)
    return [*lines, f"    and {more} more (see --json)"] if more > 0 else lines


def size(count: float) -> str:
    """A number of bytes for a person."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.3g} GB"


def write_file(path: Path, data: bytes) -> None:
    """Writes a file, whole or not at all. Raises: ToolError if the disk is full or fails."""
    from lora.durable import write_durably
    from lora.tools.writing import write_errors

    with write_errors(path):
        write_durably(path, data)
