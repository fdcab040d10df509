"""What `combine`, `resize` and `convert` share: how an adapter is written, and what is told of it."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora.commands.shared import (
    KINDS,
    NAMINGS,
    dtype_of,
    key_lines,
    output_format,
    plain,
    size,
    table,
)

if TYPE_CHECKING:
    from lora.tools.adapters.saving import WriteOptions
    from lora.tools.factors.cutting import Report

WORST = 5


def add_write_options(parser: ArgumentParser) -> None:
    """Where the result goes and in what form."""
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="F",
        help="the new file; a folder for PEFT's naming",
    )
    parser.add_argument("--output-format", choices=KINDS, help="by default what F's ending says")
    parser.add_argument(
        "--output-dtype", choices=("fp32", "fp16", "bf16"), help="by default each tensor's own"
    )
    parser.add_argument(
        "--naming", choices=NAMINGS, help="how tensors are named; by default as now"
    )
    parser.add_argument(
        "--allow-unused", action="store_true", help="leave out tensors that cannot be carried"
    )


def write_options(options: Namespace) -> WriteOptions:
    """The options of `add_write_options`."""
    from lora.formats.names.naming import Naming
    from lora.tools.adapters.saving import Format, WriteOptions

    return WriteOptions(
        naming=Naming(options.naming) if options.naming else None,
        dtype=dtype_of(options.output_dtype) if options.output_dtype else None,
        format=Format(output_format(options)),
    )


def told(report: Report, output: Path) -> dict[str, Any]:
    """The report as JSON can hold it."""
    files = [output] if output.is_file() else [one for one in output.iterdir() if one.is_file()]
    changes = [{**plain(one), "relative_error": one.relative_error} for one in report.changes]
    unused = [{"key": key, "reason": reason} for key, reason in report.unused]
    return {
        "output": str(output),
        "bytes": sum(file.stat().st_size for file in files),
        "layers": report.layers,
        "changes": changes,
        "relative_error": report.relative_error,
        "unused": unused,
    }


def show(result: Mapping[str, Any]) -> str:
    """The file, the layers that were approximated and their errors, what was left out."""
    changes = result["changes"]
    lines = [f"{result['output']}: {size(result['bytes'])}, {result['layers']} modules"]
    if changes:
        lines.append(
            f"{len(changes)} layers approximated: relative error {result['relative_error']:.3g} "
            "(as stored, over all of them)"
        )
        worst = sorted(changes, key=lambda one: -one["relative_error"])[:WORST]
        head = ("  layer", "rank", "energy kept", "relative error")
        lines.append(f"the largest errors, {len(worst)} of {len(changes)}:")
        lines += table([head, *(_row(one) for one in worst)])
        if dropped := sum(not one["rank"] for one in changes):
            lines.append(f"{dropped} of them were dropped: nothing of them is worth a rank")
    else:
        lines.append("exact: no layer was approximated")
    if result["unused"]:
        lines.append(f"left out: {len(result['unused'])} tensors")
        lines += key_lines(result["unused"])
    return "\n".join(lines)


def _row(one: Mapping[str, Any]) -> tuple[str, ...]:
    before = one["before"] or "full"
    return (
        f"  {one['name']}",
        f"{before} -> {one['rank']}",
        f"{one['kept']:.4%}",
        f"{one['relative_error']:.3g}",
    )
