"""What `combine`, `resize` and `convert` share: how an adapter is written, and the report on it."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora.commands import shared

if TYPE_CHECKING:
    from lora.tools.adapters.saving import WriteOptions
    from lora.tools.factors.cutting import Report


def add_write_options(
    parser: ArgumentParser, dtype: str = "by default each tensor keeps its own"
) -> None:
    """Adds the options that say where and how the result is written. `dtype`: the help for its dtype."""
    add = parser.add_argument
    shared.add_output(parser, "file to write; with --naming peft a folder")
    shared.add_format_option(parser)
    add("--output-dtype", choices=shared.DTYPES, help=f"precision of OUT; {dtype}")
    shared.add_naming_option(parser, "how the tensors of OUT are named; by default as in the input")
    add(
        "--allow-unused",
        action="store_true",
        help="leave out tensors that no LoRA can have, instead of refusing the file",
    )


def write_options(options: Namespace) -> WriteOptions:
    """The options of `add_write_options`."""
    from lora.tools.adapters.saving import WriteOptions

    dtype = shared.dtype_of(options.output_dtype) if options.output_dtype else None
    return WriteOptions(shared.naming(options), dtype, shared.output_format(options), options.force)


def as_result(report: Report, output: Path) -> dict[str, Any]:
    """The report as values that JSON has."""
    files = [output] if output.is_file() else [one for one in output.iterdir() if one.is_file()]
    return {
        "output": str(output),
        "bytes": sum(file.stat().st_size for file in files),
        "layers": report.modules,
        "changes": shared.with_errors(report.changes),
        "relative_error": report.relative_error,
        "unused": [{"key": key, "reason": reason} for key, reason in report.unused],
    }


def show(result: Mapping[str, Any]) -> str:
    """The file, the approximated layers with the largest errors, and what was left out."""
    changes = result["changes"]
    lines = [f"{result['output']}: {shared.size(result['bytes'])}, {result['layers']} modules"]
    if changes:
        lines.append(
            f"{len(changes)} layers approximated: relative error {result['relative_error']:.3g} "
            "(as stored, over all of them)"
        )
        shown = shared.worst(changes)
        head = ("  layer", "rank", "energy kept", "relative error")
        lines.append(f"the largest errors, {len(shown)} of {len(changes)}:")
        lines += shared.table([head, *map(_row, shown)])
        if dropped := sum(not change["rank"] for change in changes):
            lines.append(f"{dropped} of them were dropped: nothing of them is worth a rank")
    else:
        lines.append("exact: no layer was approximated")
    if result["unused"]:
        lines.append(f"left out: {len(result['unused'])} tensors")
        lines += shared.key_lines(result["unused"])
    return "\n".join(lines)


def _row(change: Mapping[str, Any]) -> tuple[str, ...]:
    ranks = f"{change['before'] or 'full'} -> {change['rank']}"
    error = f"{change['relative_error']:.3g}"
    return f"  {change['name']}", ranks, f"{change['kept']:.4%}", error
