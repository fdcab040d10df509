"""The tools' table in docs/benchmarks.md and its plot, from a result: `python -m benchmarks.tools_page`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import DOCS, RESULTS, fill_in, write_result

EXTRACT_FACTOR, EXTRACT_GB, MERGE_GB, RESIZE_FACTOR = 10, 3.0, 2.0, 20
"""What was to be reached: times faster than whole SVDs, and peaks of memory."""


@dataclass(frozen=True)
class Row:
    """A tool's time beside what it is measured against."""

    title: str
    against: str
    ours: float
    theirs: float
    peak_gb: float
    factor: float | None
    """Times faster than that, at least."""
    most_gb: float | None


def keep(figures: dict[str, Any], *, tiny: bool) -> Path:
    """Writes a result; a full one's also into the page and its plot."""
    path = write_result("tools_tiny" if tiny else "tools", figures)
    if not tiny:
        write_page()
    return path


def write_page() -> None:
    """Draws docs/benchmarks_tools.svg, and puts the table into docs/benchmarks.md."""
    result = json.loads((RESULTS / "tools.json").read_text())
    (DOCS / "benchmarks_tools.svg").write_text(plot(rows_of(result["figures"])))
    fill_in("benchmarks.md", "tools", table(result))


def rows_of(figures: Mapping[str, Any]) -> list[Row]:
    """The three tools."""
    extracted, merged, resized = (figures[name] for name in ("extract", "merge", "resize"))
    return [
        Row(
            f"extract, rank {figures['rank']}",
            "a whole SVD of each difference",
            extracted["seconds"],
            figures["svds_of_differences_whole_s"],
            extracted["peak_gb"],
            EXTRACT_FACTOR,
            EXTRACT_GB,
        ),
        Row(
            "merge",
            "a copy of the model's files",
            merged["seconds"],
            figures["copy"]["seconds"],
            merged["peak_gb"],
            None,
            MERGE_GB,
        ),
        Row(
            f"resize, rank 128 to {figures['rank']}",
            "a whole SVD of each product",
            resized["seconds"],
            figures["svds_of_products_whole_s"],
            resized["peak_gb"],
            RESIZE_FACTOR,
            None,
        ),
    ]


def table(result: Mapping[str, Any]) -> str:
    """The result as Markdown."""
    figures, machine = result["figures"], result["machine"]
    extracted = figures["extract"]
    lines = [
        f"{result['date']}, {machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB; "
        f"{', '.join(f'{k} {v}' for k, v in result['versions'].items())}.",
        "",
        "| | against | that | ours | times faster | at least | peak memory | at most |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows_of(figures):
        lines.append(
            f"| {row.title} | {row.against} | {row.theirs:.1f} s | {row.ours:.1f} s | "
            f"{row.theirs / row.ours:.2g} | {_told(row.factor, row.theirs / row.ours)} | "
            f"{row.peak_gb:.2f} GB | {_told_most(row.most_gb, row.peak_gb)} |"
        )
    lines += [
        "",
        f"The extracted file has {extracted['mb']} MB and keeps {extracted['kept']:.2%} of the change's "
        f"energy; as stored its relative error is {extracted['relative_error']:.4f}. Each SVD by itself:",
        "",
        "| difference | layers | whole SVD | ours | times faster | error beside the best |",
        "| --- | --- | --- | --- | --- | --- |",
        *map(_svd_row, figures["svds_of_differences"]),
    ]
    return "\n".join(lines)


def _svd_row(row: Mapping[str, Any]) -> str:
    shape = " x ".join(map(str, row["shape"]))
    return (
        f"| {shape} | {row['count']} | {row['whole_s']:.2f} s | {row['ours_s'] * 1e3:.0f} ms | "
        f"{row['whole_s'] / row['ours_s']:.1f} | {row['error_beside_best']:.4f} |"
    )


def _told(target: float | None, reached: float) -> str:
    if target is None:
        return ""
    return f"{target:g}, {'reached' if reached >= target else 'missed'}"


def _told_most(target: float | None, reached: float) -> str:
    if target is None:
        return ""
    return f"{target:g} GB, {'reached' if reached <= target else 'missed'}"


WIDTH, BAR, LEFT = 860, 18, 220


def plot(rows: Sequence[Row]) -> str:
    """Each tool's seconds and those of what it is measured against, as bars of one scale per tool: SVG."""
    height = len(rows) * (2 * BAR + 22) + 44
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        '<text x="10" y="20">The tools on SDXL\'s full UNet, seconds: '
        '<tspan fill="#c0504d">what it is measured against</tspan>, '
        '<tspan fill="#1f6fb4">ours</tspan>; each pair has its own scale</text>',
    ]
    for number, row in enumerate(rows):
        top = 38 + number * (2 * BAR + 22)
        scale = (WIDTH - LEFT - 260) / max(row.ours, row.theirs, 1e-9)
        parts.append(
            f'<text x="{LEFT - 8}" y="{top + BAR + 4}" text-anchor="end">{row.title}</text>'
        )
        bars = ((row.theirs, "#c0504d", row.against), (row.ours, "#1f6fb4", f"{row.peak_gb} GB"))
        for place, (seconds, colour, what) in enumerate(bars):
            width, y = max(1.0, seconds * scale), top + place * BAR
            parts.append(
                f'<rect x="{LEFT}" y="{y}" width="{width:.0f}" height="{BAR - 2}" fill="{colour}"/>'
                f'<text x="{LEFT + width + 5:.0f}" y="{y + BAR - 5}">{seconds:.1f} s ({what})</text>'
            )
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    write_page()
